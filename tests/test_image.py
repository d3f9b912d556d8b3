from __future__ import annotations

import base64
import contextlib
import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front_fixtures import picture, reference_image_processor, spec
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from autoglm_edge.errors import BundleError, ImageError
from autoglm_edge.runtime.prompt import image as image_module
from autoglm_edge.runtime.prompt.image import FORMATS, count_tokens, fit, fit_grid, load_image, patchify


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def assert_equal_to_transformers(image: Image.Image, **changes: Any) -> None:
    own = spec(**changes)
    wanted = reference_image_processor(own)(images=[image], return_tensors="np")
    got = patchify(load_image(image), own)
    assert got.grid == tuple(wanted["image_grid_thw"][0])
    assert got.pixel_values.dtype == wanted["pixel_values"].dtype == np.float32
    np.testing.assert_array_equal(got.pixel_values, wanted["pixel_values"])


# Patches


@pytest.mark.parametrize(
    "size",
    [
        (1, 1),
        (1, 40),
        (40, 1),
        (5, 7),
        (27, 27),
        (28, 28),
        (29, 27),
        (42, 70),
        (13, 2000),
        (27, 5400),
        (20, 3999),
        (333, 517),
        (112, 112),
        (1080, 2400),
        (1440, 3200),
    ],
    ids=str,
)
def test_patches_equal_those_of_transformers_to_the_bit(size: tuple[int, int]) -> None:
    assert_equal_to_transformers(picture(*size))


@pytest.mark.parametrize("max_pixels", [12544 * 2, 127008, 500_000, 1_000_000])
@pytest.mark.parametrize("size", [(360, 800), (641, 479), (30, 4000)], ids=str)
def test_patches_over_the_budget_equal_those_of_transformers(size: tuple[int, int], max_pixels: int) -> None:
    assert_equal_to_transformers(picture(*size), max_pixels=max_pixels)


@pytest.mark.parametrize("resample", range(6))
def test_every_filter_equals_that_of_transformers(resample: int) -> None:
    assert_equal_to_transformers(picture(190, 75), resample=resample)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_modes_without_alpha_equal_those_of_transformers(mode: str) -> None:
    assert_equal_to_transformers(picture(100, 61, mode))


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 16},
        {"merge_size": 1},
        {"merge_size": 3},
        {"temporal_patch_size": 1},
        {"temporal_patch_size": 4},
        {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)},
        {"rescale_factor": 1 / 127.5},
    ],
    ids=str,
)
def test_the_whole_spec_acts_as_in_transformers(changes: dict[str, Any]) -> None:
    assert_equal_to_transformers(picture(123, 200), **changes)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([3136, 12544, 90_000]), st.integers(0, 999))
def test_patches_of_any_size_equal_those_of_transformers(
    width: int, height: int, min_pixels: int, seed: int
) -> None:
    if max(width, height) > 150 * min(width, height):
        height = width
    assert_equal_to_transformers(picture(width, height, seed=seed), min_pixels=min_pixels, max_pixels=200_000)


def test_a_merge_block_makes_four_consecutive_rows() -> None:
    array = np.zeros((56, 56, 3), dtype=np.uint8)
    array[:28, 28:] = 255  # the second block
    rows = patchify(Image.fromarray(array), spec(min_pixels=1)).pixel_values
    bright = rows.max(axis=1) > 0
    assert bright.tolist() == [False] * 4 + [True] * 4 + [False] * 8


def test_both_frames_of_a_patch_are_the_same() -> None:
    rows = patchify(picture(60, 90), spec()).pixel_values.reshape(-1, 3, 2, 196)
    np.testing.assert_array_equal(rows[:, :, 0], rows[:, :, 1])


def test_a_picture_waits_for_the_graph_as_bytes() -> None:
    patched = patchify(picture(140, 280), spec())

    assert patched.patches.dtype == np.uint8
    assert patched.pixel_values.nbytes == 8 * patched.patches.nbytes


def test_a_patched_image_knows_its_tokens_and_its_first_size() -> None:
    patched = patchify(picture(1080, 2400), spec())
    assert patched.grid == (1, 172, 78)
    assert patched.tokens == 3354
    assert patched.original_size == (1080, 2400)
    assert patched.pixel_values.shape == (13416, 1176)
    assert patched.pixel_values.flags.c_contiguous


def test_a_screenshot_is_cut_in_well_under_a_second() -> None:
    shot = picture(1080, 2400)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        patchify(shot, spec())
        times.append(time.perf_counter() - start)
    # About 0.1 s on two cores of a shared server; the margin is for busy machines, not for float64.
    assert min(times) < 0.5


def test_patchify_takes_any_mode() -> None:
    rgba = picture(60, 90).convert("RGBA")
    np.testing.assert_array_equal(
        patchify(rgba, spec()).pixel_values, patchify(picture(60, 90), spec()).pixel_values
    )


def test_an_unknown_filter_number_is_refused() -> None:
    with pytest.raises(BundleError, match="resample is 9"):
        patchify(picture(30, 30), spec(resample=9))


# Sizes


@pytest.mark.parametrize(
    ("width", "height", "fitted", "tokens"),
    [
        (540, 1200, (1204, 532), 817),
        (720, 1600, (1596, 728), 1482),
        (1080, 1920, (1932, 1092), 2691),
        (1080, 2340, (2352, 1092), 3276),
        (1080, 2400, (2408, 1092), 3354),
        (1440, 3200, (3192, 1428), 5814),
        (42, 70, (112, 84), 12),  # both halves round to even, then the least budget acts
    ],
)
def test_screens_have_the_published_sizes(
    width: int, height: int, fitted: tuple[int, int], tokens: int
) -> None:
    own = spec()
    assert fit(height, width, own) == fitted
    assert count_tokens(fit_grid(height, width, own), own) == tokens


def test_halves_round_to_even() -> None:
    own = spec(min_pixels=1)
    assert [fit(28 * 10 + 14, 28 * half + 14, own)[1] // 28 for half in range(1, 7)] == [2, 2, 4, 4, 6, 6]


@settings(max_examples=400, deadline=None)
@given(
    st.integers(1, 6000),
    st.integers(1, 6000),
    st.sampled_from([1, 3136, 12544, 400_000]),
    st.sampled_from([400_000, 1_000_000, 5_000_000, 9633792, 11_760_000]),
)
def test_every_size_is_that_of_transformers(height: int, width: int, least: int, most: int) -> None:
    pytest.importorskip("transformers")
    from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize

    own = spec(min_pixels=least, max_pixels=most)
    try:
        wanted = smart_resize(2, height, width, 2, 28, least, most)
    except ValueError:
        with pytest.raises(ImageError, match="200-fold"):
            fit(height, width, own)
    else:
        assert fit(height, width, own) == wanted


@pytest.mark.parametrize("size", [(1, 201), (28, 5601), (8000, 30)], ids=str)
def test_extreme_aspects_are_refused_with_the_size_given(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"{size[0]}x{size[1]} pixels"):
        patchify(Image.new("RGB", size), spec())


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_an_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="at least 1"):
        load_image(Image.new("RGB", size))
    with pytest.raises(ImageError, match="at least 1"):
        fit(size[1], size[0], spec())


# Sources


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_read_as_pillow_reads_it(form: str) -> None:
    data = encoded(picture(40, 30), form)
    with Image.open(io.BytesIO(data)) as opened:
        wanted = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(data)), wanted)


def test_bytes_path_string_file_url_and_data_uri_give_the_same(tmp_path: Path) -> None:
    original = picture(33, 21)
    data = encoded(original)
    path = tmp_path / "a screen 屏幕.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (
        data,
        bytearray(data),
        path,
        str(path),
        path.as_uri(),
        uri,
        uri.replace("data:", "DATA:", 1),
        original,
    ):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(original))


def test_a_data_uri_may_be_wrapped_into_lines() -> None:
    data = base64.encodebytes(encoded(picture(33, 21))).decode()
    assert "\n" in data
    assert load_image("data:image/png;base64," + data).size == (33, 21)


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64",
        "data:image/png,abc",
        "data:image/png;base64,####",
        "data:image/png;base64,abc",
        "data:,",
    ],
)
def test_a_malformed_data_uri_is_refused(uri: str) -> None:
    with pytest.raises(ImageError, match="base64"):
        load_image(uri)


def test_a_data_uri_with_no_image_is_refused() -> None:
    with pytest.raises(ImageError, match="in a data URI is not a PNG"):
        load_image("data:image/png;base64," + base64.b64encode(b"hello").decode())


@pytest.mark.parametrize("url", ["http://example.com/a.png", "HTTPS://example.com/a.png"])
def test_nothing_is_downloaded(url: str) -> None:
    with pytest.raises(ImageError, match="nothing is downloaded"):
        load_image(url)


@pytest.mark.parametrize("path", ["no/such/file.png", "nul\0byte.png", "x" * 5000, ""])
def test_a_path_that_leads_nowhere_is_refused_briefly(path: str) -> None:
    with pytest.raises(ImageError, match="check the path") as caught:
        load_image(path)
    assert len(str(caught.value)) < 400


def test_a_folder_and_a_device_are_no_images(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(ImageError, match="no regular file"):
            load_image(path)


def test_a_source_of_another_type_is_refused() -> None:
    with pytest.raises(ImageError, match="given as int"):
        load_image(3)  # type: ignore[arg-type]


# Hostile bytes


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>"]
)
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match=f"an image of {len(data)} bytes"):
        load_image(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(form: str, share: float) -> None:
    data = encoded(picture(200, 150), form)
    with pytest.raises(ImageError):
        load_image(data[: int(len(data) * share)])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM"]), st.data())
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_give_an_image_or_an_image_error(form: str, data: st.DataObject) -> None:
    damaged = bytearray(encoded(picture(24, 18), form))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert load_image(bytes(damaged)).mode == "RGB"


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(8001, 8000), (10_000, 9_000), (100_000, 100_000)], ids=str)
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_decompression_bomb_is_refused_before_decoding(size: tuple[int, int], action: str) -> None:
    # Between our limit and twice its own Pillow only warns; both settings of that warning must end the same.
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter(action)  # type: ignore[arg-type]
        with pytest.raises(ImageError, match="64000000 pixels"):
            load_image(png_header(*size))


def test_a_pillow_image_over_the_limit_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MAX_SOURCE_PIXELS", 99)
    with pytest.raises(ImageError, match="10x10"):
        load_image(Image.new("RGB", (10, 10)))


# Colour


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_alpha_is_dropped_and_colours_stay(mode: str) -> None:
    image = picture(20, 20).convert("RGBA")
    image.putalpha(128)
    route = {"La": ("LA", "La"), "RGBa": ("RGBa",), "LA": ("LA",), "PA": ("P", "PA"), "RGBA": ()}[mode]
    for step in route:
        image = image.convert(step)
    assert image.mode == mode
    straight = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    np.testing.assert_array_equal(
        np.asarray(load_image(image)), np.asarray(image.convert(straight).convert("RGB"))
    )


def test_files_with_alpha_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers.image_utils import load_image as reference

    alpha = picture(31, 17).convert("RGBA")
    alpha.putalpha(picture(31, 17, "L", seed=1))
    grey = alpha.convert("LA")
    for index, image in enumerate((alpha, grey)):
        path = tmp_path / f"{index}.png"
        image.save(path)
        np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(reference(str(path))))


@pytest.mark.parametrize("transparency", [3, bytes(range(256))], ids=["index", "table"])
def test_a_palette_with_transparency_keeps_its_colours(transparency: int | bytes) -> None:
    image = picture(30, 30, "P")
    wanted = np.asarray(image.convert("RGB"))
    data = encoded(image, transparency=transparency)
    np.testing.assert_array_equal(np.asarray(load_image(data)), wanted)
    np.testing.assert_array_equal(np.asarray(load_image(Image.open(io.BytesIO(data)))), wanted)


def test_transparency_of_rgb_and_grey_files_is_dropped() -> None:
    for mode, key in (("RGB", (1, 2, 3)), ("L", 5)):
        image = picture(10, 10, mode)
        np.testing.assert_array_equal(
            np.asarray(load_image(encoded(image, transparency=key))), np.asarray(image.convert("RGB"))
        )


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    wanted = np.arange(256).reshape(16, 16)
    for form in ("PNG", "TIFF", "PPM"):  # PPM opens as 32-bit integers
        loaded = np.asarray(load_image(encoded(Image.fromarray(ramp), form)))
        assert loaded.shape == (16, 16, 3)
        np.testing.assert_array_equal(loaded[:, :, 0], wanted)
    big_endian = Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(load_image(big_endian))[:, :, 2], wanted)


def test_a_dark_sixteen_bit_image_stays_dark() -> None:
    assert np.asarray(load_image(Image.fromarray(np.full((4, 4), 200, dtype=np.uint16)))).max() == 1


@pytest.mark.parametrize(("mode", "top"), [("I", 255), ("I", 65535), ("F", 1), ("F", 255), ("F", 65535)])
def test_integer_and_float_grey_are_scaled_by_their_range(mode: str, top: int) -> None:
    values = np.linspace(0, top, 256).reshape(16, 16)
    array = np.rint(values).astype(np.int32) if mode == "I" else values.astype(np.float32)
    loaded = np.asarray(load_image(Image.fromarray(array)))
    np.testing.assert_array_equal(loaded[:, :, 1], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("value", [-1.0, 65536.0, float("nan"), float("inf")])
def test_grey_values_without_a_known_range_are_refused(value: float) -> None:
    array = np.zeros((3, 3), dtype=np.float32)
    array[1, 1] = value
    with pytest.raises(ImageError, match=r"0\.\.65535"):
        load_image(Image.fromarray(array))


@pytest.mark.parametrize("mode", ["CMYK", "1", "L", "P", "YCbCr", "HSV"])
def test_other_modes_become_rgb_as_pillow_does(mode: str) -> None:
    image = picture(19, 23, mode)
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))


# Orientation, animation, ownership


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(24, 16), form, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        wanted = ImageOps.exif_transpose(opened).convert("RGB")
    loaded = load_image(data)
    assert loaded.size == ((24, 16) if orientation < 5 else (16, 24))
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(wanted))


def test_an_upright_image_is_not_turned_again() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    once = load_image(encoded(picture(24, 16), exif=exif))
    assert load_image(once).size == once.size == (16, 24)
    assert once.info == {}


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_unknown_orientation_leaves_the_picture_as_it_is(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(
        np.asarray(load_image(encoded(picture(24, 16), exif=exif))), np.asarray(picture(24, 16))
    )


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert load_image(data).getpixel((3, 3)) == (255, 0, 0)


def test_the_result_is_a_copy_and_the_source_stays_as_it_was() -> None:
    source = picture(10, 10)
    source.info["transparency"] = (1, 2, 3)
    loaded = load_image(source)
    loaded.putpixel((0, 0), (9, 9, 9))
    assert source.getpixel((0, 0)) == picture(10, 10).getpixel((0, 0))
    assert source.info == {"transparency": (1, 2, 3)}


def test_the_file_is_closed_after_reading(tmp_path: Path) -> None:
    path = tmp_path / "shot.png"
    picture(10, 10).save(path)
    load_image(path)
    path.unlink()  # a leaked handle would raise ResourceWarning, which is an error here
