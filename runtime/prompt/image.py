"""Pictures: any common file to upright RGB, and RGB to the rows that the vision graph takes.

In: a Pillow image, the bytes of a file, a path or a data URI. Out: an RGB image (`load_image`), and
normalised patches with their grid (`patchify`). Knows sizes, filters and budgets only from ImageSpec;
knows nothing of tokens in a prompt.

The rows equal those of transformers' Glm4vImageProcessorPil bit for bit: over 600 random sizes, budgets,
filters and modes the largest difference was 0, and both refused the same 71 (transformers 5.23, Pillow 13,
numpy 2.4; tests/test_image.py repeats a part). Rescaling and normalising act on single bytes, so both are one
table of 256 float32 values per channel, computed with the same roundings (float64 product, then float32
difference and quotient).

Colour: transparency is dropped by `convert("RGB")`, as transformers does for every image that it opens
from a path, URL or base64. Screenshots keep the colours that the screen showed, whatever their alpha says.
(Only a Pillow *object* with alpha is laid on white by transformers 5.23; flatten it first to get that.)
16-bit grey is scaled to 8 bits, never clipped as `convert` would.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
import math
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from autoglm_edge.errors import BundleError, ImageError
from autoglm_edge.runtime.manifest import ImageSpec

# An 8K frame has 33 million pixels; decoded to RGB this limit costs 192 MB. Checked before decoding.
MAX_SOURCE_PIXELS = 64_000_000
# A longer side above this many shorter sides is refused, as by transformers.
MAX_ASPECT = 200
# Decoders that hostile bytes may reach. EPS, which runs a program, and the rare ones stay shut.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# EXIF orientation to the turn that makes the picture upright (EXIF 2.32, tag 0x0112); 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class PatchedImage:
    """One image, ready for the vision graph.

    Kept as bytes, an eighth of the numbers that the graph takes: those exist only while it runs.

    Attributes:
        patches: (P, 3, side, side) uint8, a patch a row, in merge-block order, so that merge_size ** 2
            consecutive rows make one token.
        values: (3, 256) float32, what each byte of each channel becomes.
        frames: of a patch; every frame of a still image is the same.
        grid: (1, height, width) in patches.
        tokens: N, image tokens in the prompt.
        original_size: (width, height) in pixels of the upright picture.
    """

    patches: NDArray[np.uint8]
    values: NDArray[np.float32]
    frames: int
    grid: tuple[int, int, int]
    tokens: int
    original_size: tuple[int, int]

    @property
    def pixel_values(self) -> NDArray[np.float32]:
        """(P, spec.patch_dim) float32, made anew; a row is channel, frame, y, x."""
        count, channels, height, width = self.patches.shape
        rows = np.empty((count, channels, self.frames, height, width), dtype=np.float32)
        for channel in range(channels):
            rows[:, channel] = self.values[channel][self.patches[:, channel, np.newaxis]]
        return rows.reshape(count, -1)


def load_image(source: Image.Image | bytes | bytearray | str | Path) -> Image.Image:
    """Decode a picture to upright RGB.

    Args:
        source: a Pillow image (its current frame), the bytes of an image file, a path, a `file://` URL or
            a base64 data URI. Of an animation the first frame is taken.

    Returns:
        A new RGB image without metadata. EXIF orientation is applied, transparency dropped. Integer and
        float grey images are read as 8-bit if no value exceeds 255, as 16-bit if none exceeds 65535; float
        images within 0..1 are scaled by 255.

    Raises:
        ImageError: not found, not an image, truncated, of an unknown format, empty, too large, or a mode
            that cannot become RGB.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, f"the {source.mode} image")
    if isinstance(source, (bytes, bytearray)):
        return _decode(io.BytesIO(source), f"an image of {len(source)} bytes")
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith("data:"):
            data = _data_uri_bytes(source)
            return _decode(io.BytesIO(data), f"an image of {len(data)} bytes in a data URI")
        if scheme.startswith(("http://", "https://")):
            raise ImageError(
                f"the image {_short(source)} is on the network, and nothing is downloaded here; "
                "fetch it and pass its bytes, its path or a data URI"
            )
        if scheme.startswith("file://"):
            source = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
        source = Path(source)
    if not isinstance(source, Path):
        raise ImageError(
            f"an image is given as {type(source).__name__}, must be a Pillow image, bytes, path or data URI"
        )
    where = f"the image file {_short(str(source))}"
    try:
        if not source.is_file():
            raise ImageError(f"{where} does not exist or is no regular file; check the path")
        with source.open("rb") as file:
            return _decode(file, where)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError(f"{where} cannot be read ({_short(str(error))}); check the path") from error


def fit(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    """The size in pixels to which a still picture is resized.

    Both sides become multiples of patch_size * merge_size, rounded half to even. The budget counts all
    frames of a patch: if the rounded size leaves it, the unrounded one is scaled into it and rounded down
    (too large) or up (too small). The formula is `smart_resize` of transformers' glm4v image processor.

    Args:
        height: pixels.
        width: pixels.
        spec: the image processor.

    Returns:
        (height, width) in pixels.

    Raises:
        ImageError: a side below one pixel, or one side more than 200 times the other.
    """
    if height < 1 or width < 1:
        raise ImageError(f"the image is {width}x{height} pixels; both sides must be at least 1")
    size = f"{width}x{height}"
    frames, factor = spec.temporal_patch_size, spec.patch_size * spec.merge_size
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ImageError(f"the image is {size} pixels, its sides differ more than {MAX_ASPECT}-fold; crop it")

    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    pixels = frames * new_height * new_width
    if pixels > spec.max_pixels:
        shrink = math.sqrt((frames * height * width) / spec.max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif pixels < spec.min_pixels:
        grow = math.sqrt(spec.min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def fit_grid(height: int, width: int, spec: ImageSpec) -> tuple[int, int, int]:
    """The grid (1, height, width) in patches of a picture of that many pixels, without touching it.

    Raises:
        ImageError: as `fit`.
    """
    new_height, new_width = fit(height, width, spec)
    return 1, new_height // spec.patch_size, new_width // spec.patch_size


def count_tokens(grid: tuple[int, int, int], spec: ImageSpec) -> int:
    """Image tokens, N, of a grid (t, h, w) in patches."""
    return math.prod(grid) // spec.merge_size**2


def patchify(image: Image.Image, spec: ImageSpec) -> PatchedImage:
    """Resize, normalise and cut a picture.

    Args:
        image: RGB as from `load_image`; any other mode goes through `load_image` first.
        spec: the image processor.

    Returns:
        The rows, equal to transformers' `pixel_values`, and their grid.

    Raises:
        ImageError: as `load_image` and `fit`.
        BundleError: the spec names no Pillow filter.
    """
    if image.mode != "RGB":
        image = load_image(image)
    try:
        resample = Image.Resampling(spec.resample)
    except ValueError as error:
        raise BundleError(f"image.resample is {spec.resample}, must be a Pillow filter 0..5") from error
    height, width = fit(image.height, image.width, spec)
    resized = np.asarray(image.resize((width, height), resample=resample))  # (height, width, 3) uint8

    merge, side = spec.merge_size, spec.patch_size
    blocks_y, blocks_x = height // (side * merge), width // (side * merge)
    split = resized.reshape(blocks_y, merge, side, blocks_x, merge, side, 3)
    patches = split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, side, side)
    grid = (1, blocks_y * merge, blocks_x * merge)
    tokens = count_tokens(grid, spec)
    frames = spec.temporal_patch_size
    return PatchedImage(patches, _normalised_bytes(spec), frames, grid, tokens, image.size)


@functools.lru_cache(maxsize=8)
def _normalised_bytes(spec: ImageSpec) -> NDArray[np.float32]:
    """(3, 256) float32: what each byte of each channel becomes, rounded where transformers rounds."""
    rescaled = (np.arange(256, dtype=np.float64) * spec.rescale_factor).astype(np.float32)
    mean = np.array(spec.mean, dtype=np.float32)[:, np.newaxis]
    std = np.array(spec.std, dtype=np.float32)[:, np.newaxis]
    table: NDArray[np.float32] = (rescaled - mean) / std
    table.setflags(write=False)
    return table


def _decode(file: IO[bytes], where: str) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"{where} is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{where} is larger than {MAX_SOURCE_PIXELS} pixels; scale it down first") from error
    # Decoders raise struct, zlib, key, type and other errors on damaged headers; all mean the same here.
    except Exception as error:
        raise ImageError(f"{where} is damaged ({_short(str(error))})") from error
    with image:
        return _upright_rgb(image, where)


def _upright_rgb(image: Image.Image, where: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_SOURCE_PIXELS:
        raise ImageError(
            f"{where} is {width}x{height}, more than {MAX_SOURCE_PIXELS} pixels; scale it down first"
        )
    if width < 1 or height < 1:
        raise ImageError(f"{where} is {width}x{height} pixels; both sides must be at least 1")
    try:
        image.load()
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        rgb = _to_rgb(image, where)
        if turn is not None:
            rgb = rgb.transpose(turn)
    except ImageError:
        raise
    # As in _decode: whatever a decoder raises on damaged data.
    except Exception as error:
        raise ImageError(f"{where} is truncated or damaged ({_short(str(error))})") from error
    rgb.info = {}
    return rgb


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    """A new RGB image; `image` stays as it was."""
    mode = image.mode
    if mode.startswith("I;16"):
        return _grey_to_rgb(np.asarray(image), 65535.0)
    if mode in ("I", "F"):
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 65535):  # also true of NaN
            raise ImageError(
                f"{where} has grey values {low:g}..{high:g}, must lie within 0..65535; rescale it"
            )
        top = 1.0 if mode == "F" and high <= 1 else 255.0 if high <= 255 else 65535.0
        return _grey_to_rgb(values, top)
    if "transparency" in image.info:
        # Pillow would carry it over, and warns for palettes with alpha; it is dropped here anyway.
        image = image.copy()
        del image.info["transparency"]
    if mode in ("RGBa", "La"):  # premultiplied; Pillow converts these to straight alpha only
        image = image.convert(mode[:-1] + "A")
    return image.copy() if mode == "RGB" else image.convert("RGB")


def _grey_to_rgb(values: NDArray[Any], top: float) -> Image.Image:
    """Scale grey values of 0..top to 8 bits, rounded to nearest."""
    scaled = np.rint(values.astype(np.float32) * np.float32(255.0 / top)).astype(np.uint8)
    return Image.fromarray(scaled).convert("RGB")


def _data_uri_bytes(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ImageError(
            f"the data URI {_short(uri)} is not base64; write data:image/png;base64, and then the data"
        )
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data URI {_short(uri)} holds no valid base64 ({error})") from error


def _short(text: str) -> str:
    """Quoted for a message, cut to a readable length."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
