import numpy as np
import pytest
from PIL import Image

from autoglm_edge.runtime.actions import Action, parse_action
from autoglm_edge.runtime.draw import draw_action


def changed(size, action, mode="RGB"):
    image = Image.new(mode, size)
    before = image.copy()

    marked = draw_action(image, action)

    assert marked.size == size
    assert marked.mode == "RGB"
    assert image == before
    return np.argwhere(np.asarray(marked).any(axis=2))[:, ::-1]  # (n, 2) of x, y


def test_a_tap_is_marked_around_the_pixel_that_the_client_touches():
    points = changed((1080, 2400), Action("Tap", (("element", (499, 120)),)))

    near = points[np.abs(points - [538, 288]).max(axis=1) < 80]
    np.testing.assert_allclose((near.min(axis=0) + near.max(axis=0)) / 2, [538, 288], atol=2)
    assert [538, 288] in points.tolist()


@pytest.mark.parametrize("element", [(0, 0), (1000, 0), (0, 1000), (1000, 1000), (999, 500)])
@pytest.mark.parametrize("size", [(336, 672), (2400, 1080), (28, 28), (1, 1)])
def test_marks_at_the_border_and_on_odd_sizes_stay_in_the_picture(size, element):
    for kind in ("Tap", "Long Press", "Double Tap"):
        changed(size, Action(kind, (("element", element),)))


def test_press_and_double_tap_look_unlike_a_tap():
    def picture(kind):
        return draw_action(Image.new("RGB", (336, 672)), Action(kind, (("element", (500, 500)),))).tobytes()

    assert len({picture("Tap"), picture("Long Press"), picture("Double Tap")}) == 3


def test_a_swipe_runs_from_its_start_to_its_end_and_shows_which_is_which():
    def picture(start, end):
        return np.asarray(
            draw_action(Image.new("RGB", (400, 800)), Action("Swipe", (("start", start), ("end", end))))
        )

    up, down = picture((500, 800), (500, 200)), picture((500, 200), (500, 800))

    assert all(up[y, 200].any() for y in range(165, 640))
    assert (up != down).any()


def test_a_swipe_that_does_not_move_is_marked_too():
    assert len(changed((336, 672), Action("Swipe", (("start", (500, 500)), ("end", (500, 500)))))) > 20


@pytest.mark.parametrize(
    "text",
    [
        'do(action="Back")',
        'do(action="Type", text="你好，世界")',
        'finish(message="{}")'.format("long " * 200),
        'do(action="Launch", app="a\nb")',
    ],
)
def test_an_action_without_a_point_is_a_strip_along_the_lower_edge(text):
    points = changed((336, 672), parse_action(text))

    assert points[:, 1].max() == 671
    assert {0, 335} <= set(points[:, 0].tolist())
    assert points[:, 1].min() > 336


@pytest.mark.parametrize("text", ["\U0010fffe", "no glyph \U0010fffe here"])
def test_a_text_that_the_font_cannot_show_is_left_out_whole(text):
    def picture(app):
        return draw_action(Image.new("RGB", (336, 672)), Action("Launch", (("app", app),))).tobytes()

    assert picture(text) == picture("…")
    assert picture("Camera") != picture("…")


def test_a_strip_fits_a_tiny_picture():
    changed((28, 28), parse_action('finish(message="a long sentence that needs room")'))


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_pictures_of_other_modes_are_marked_in_colour(mode):
    changed((100, 100), Action("Tap", (("element", (500, 500)),)), mode)
