"""Synthetic phone screens: where things are, and how they look.

In: a seed. Out: a `Screen` (`pocket_canvas`): elements with boxes in dp, and a list of drawing operations.
This module knows nothing of questions or models.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from pocket_canvas import Area, Element, Screen
from pocket_glyphs import draw_glyph
from pocket_vocabulary import (
    APPS,
    BUTTONS,
    FIELDS,
    HEADER_ICONS,
    PEOPLE,
    PLAIN_ROWS,
    SWITCH_ROWS,
    TITLES,
    Color,
)

WIDTH = 360
HEIGHTS = (800, 800, 800, 800, 780)
WHITE: Color = (255, 255, 255)
BLACK: Color = (0, 0, 0)
FILLER = (
    "the",
    "your",
    "new",
    "for",
    "with",
    "update",
    "photo",
    "and",
    "today",
    "file",
    "meet",
    "sent",
    "call",
    "at",
    "list",
    "read",
    "time",
    "one",
    "more",
    "see",
)
DIALOG_HEADS = (
    "Are you sure?",
    "Permission request",
    "Low battery",
    "New version",
    "Leave this page?",
    "Connection lost",
)


@dataclass(frozen=True)
class Theme:
    """Colours of one screen."""

    page: Color
    card: Color
    ink: Color
    faint: Color
    accent: Color


def make_screen(seed: str | int, kind: str | None = None) -> Screen:
    """Lay out the screen of a seed.

    Args:
        seed: any value; the same one gives the same screen on every machine.
        kind: one of `KINDS`, or None to draw it too.
    """
    rng = random.Random(f"screen:{seed}")
    kind = kind or rng.choices(tuple(KINDS), KIND_WEIGHTS)[0]
    screen = Screen(kind, WIDTH, rng.choice(HEIGHTS))
    theme = _theme(rng)
    screen.rectangle((0, 0, WIDTH, screen.height), theme.page)
    KINDS[kind](screen, theme, rng)
    _status_bar(screen, theme, rng)
    return screen


def _shade(color: Color, amount: int, rng: random.Random) -> Color:
    red, green, blue = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in color)
    return red, green, blue


def _theme(rng: random.Random) -> Theme:
    accent = rng.choice(((30, 110, 230), (20, 140, 120), (130, 70, 200), (210, 90, 30)))
    if rng.random() < 0.5:
        page = _shade((240, 241, 244), 12, rng)
        return Theme(page, WHITE, _shade((28, 28, 32), 20, rng), (165, 165, 172), accent)
    return Theme(
        _shade((18, 18, 22), 12, rng), _shade((44, 44, 50), 8, rng), (236, 236, 240), (112, 112, 120), accent
    )


def _status_bar(screen: Screen, theme: Theme, rng: random.Random) -> None:
    screen.text(16, 15, f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}", 14, theme.ink)
    screen.rectangle((322, 9, 344, 21), theme.faint, 2)
    screen.rectangle((322, 9, 322 + rng.randint(6, 22), 21), theme.ink, 2)


def _header(screen: Screen, theme: Theme, rng: random.Random) -> float:
    """Title on the left, up to two icons on the right; returns the y where content may begin."""
    y = rng.uniform(88, 98)
    title = rng.choice(tuple(TITLES))
    size = rng.uniform(24, 28)
    left = 20.0
    if rng.random() < 0.5:
        screen.line((30, y - 8, 20, y, 30, y + 8), theme.ink, 3)
        left = 46.0
    sign = screen.text(left, y, title, size, theme.ink)
    screen.elements.append(Element("title", title, (left - 6, y - 22, 216, y + 22), sign))
    icons = rng.sample(tuple(HEADER_ICONS), rng.choice((0, 1, 1, 2, 2)))
    for index, label in enumerate(icons):
        x = 328 - 60 * index + rng.uniform(-6, 6)
        _header_icon(screen, label, x, y, theme.ink)
        area = (x - 26, y - 26, x + 26, y + 26)
        screen.elements.append(Element("icon", label, area, area))
    return y + 34


def _header_icon(screen: Screen, label: str, x: float, y: float, ink: Color) -> None:
    if label == "Search":
        screen.ellipse((x - 12, y - 12, x + 6, y + 6), ink)
        screen.ellipse((x - 8, y - 8, x + 2, y + 2), WHITE if sum(ink) < 380 else BLACK)
        screen.line((x + 4, y + 4, x + 13, y + 13), ink, 4)
    elif label == "More":
        for shift in (-10, 0, 10):
            screen.ellipse((x - 3, y + shift - 3, x + 3, y + shift + 3), ink)
    elif label == "Add":
        screen.rectangle((x - 13, y - 2, x + 13, y + 2), ink)
        screen.rectangle((x - 2, y - 13, x + 2, y + 13), ink)
    else:
        screen.ellipse((x - 14, y - 14, x + 14, y + 14), ink)
        screen.text(x, y, "?", 22, WHITE if sum(ink) < 380 else BLACK, "mm")


def _home(screen: Screen, theme: Theme, rng: random.Random) -> None:
    ink = theme.ink
    if rng.random() < 0.5:  # a wallpaper in bands instead of the plain page
        dark = sum(theme.page) < 380
        top = _shade((40, 50, 80) if dark else (205, 215, 235), 35, rng)
        bottom = _shade((50, 40, 60) if dark else (225, 210, 215), 35, rng)
        for band in range(20):
            color = tuple(round(a + (b - a) * band / 19) for a, b in zip(top, bottom, strict=True))
            screen.rectangle((0, band * 40, WIDTH, band * 40 + 40), color)  # type: ignore[arg-type]
    columns = rng.choice((3, 4))
    icon = rng.uniform(54, 62) if columns == 4 else rng.uniform(60, 76)
    pitch = rng.uniform(icon + 44, icon + 64)
    top_y = rng.uniform(60, 130)
    places = [
        (column, row)
        for row in range(int((screen.height - 50 - top_y) // pitch))
        for column in range(columns)
        if rng.random() > 0.08
    ]
    labels = rng.sample(tuple(APPS), min(len(APPS), len(places), rng.randint(5, 24)))
    width = WIDTH / columns
    label_size = rng.uniform(15, 17)
    for (column, row), label in zip(places, labels, strict=False):
        x = width * (column + 0.5) + rng.uniform(-2, 2)
        y = top_y + pitch * row
        _tile(screen, label, x, y, icon, rng)
        screen.text(x, y + icon + 13, label, label_size, ink, "mm")
        half = max(icon / 2, 36)
        area = (x - half, y - 4, x + half, y + icon + 24)
        screen.elements.append(Element("app", label, area, area))


def _tile(screen: Screen, label: str, x: float, y: float, size: float, rng: random.Random) -> None:
    app = APPS[label]
    color = _shade(app.color, 10, rng)
    screen.rectangle((x - size / 2, y, x + size / 2, y + size), color, size * 0.22)
    ink: Color = BLACK if sum(color) > 480 else WHITE
    draw_glyph(screen, app.glyph, x, y + size / 2, size * 0.32, ink, color)


def _list(screen: Screen, theme: Theme, rng: random.Random) -> None:
    y = _header(screen, theme, rng) + rng.uniform(2, 20)
    height = rng.uniform(62, 78)
    size = rng.uniform(20, 23)
    has_icons = rng.random() < 0.5
    switches = rng.sample(tuple(SWITCH_ROWS), rng.randint(2, 6))
    labels = switches + rng.sample(tuple(PLAIN_ROWS), rng.randint(2, 5))
    rng.shuffle(labels)
    for label in labels[: int((screen.height - 20 - y) // height)]:
        middle = y + height / 2
        screen.rectangle((10, y + 2, 350, y + height - 2), theme.card, 10)
        left = 24.0
        if has_icons:
            screen.ellipse((20, middle - 13, 46, middle + 13), _shade((130, 150, 170), 60, rng))
            left = 58.0
        sign = screen.text(left, middle, label, size, theme.ink)
        state, switch = None, None
        if label in SWITCH_ROWS:
            state = rng.choice(("on", "off"))
            switch = _switch(screen, theme, 312 + rng.uniform(-3, 3), middle, state == "on")
        else:
            screen.line((326, middle - 7, 333, middle, 326, middle + 7), theme.faint, 3)
        screen.elements.append(Element("row", label, (10, y + 2, 350, y + height - 2), sign, state, switch))
        y += height


def _switch(screen: Screen, theme: Theme, x: float, y: float, is_on: bool) -> Area:
    screen.rectangle((x - 27, y - 15, x + 27, y + 15), theme.accent if is_on else theme.faint, 15)
    knob = x + 12 if is_on else x - 12
    screen.ellipse((knob - 11, y - 11, knob + 11, y + 11), WHITE)
    return (x - 29, y - 18, x + 29, y + 18)


def _button(screen: Screen, theme: Theme, area: Area, label: str, is_main: bool) -> None:
    x0, y0, x1, y1 = area
    face = theme.accent if is_main else theme.card if theme.card != WHITE else (226, 228, 232)
    screen.rectangle(area, face, (y1 - y0) / 3, None if is_main else theme.faint)
    sign = screen.text((x0 + x1) / 2, (y0 + y1) / 2, label, 21, WHITE if is_main else theme.ink, "mm")
    screen.elements.append(Element("button", label, area, sign))


def _buttons(
    screen: Screen, theme: Theme, rng: random.Random, y: float, x0: float, x1: float, is_stacked: bool
) -> float:
    """Two or three buttons from y downwards between x0 and x1; returns the y below them."""
    labels = rng.sample(tuple(BUTTONS), rng.choice((2, 2, 3)) if is_stacked or x1 - x0 > 270 else 2)
    main = rng.randrange(len(labels))
    height = rng.uniform(48, 56)
    for index, label in enumerate(labels):
        if is_stacked:
            area = (x0, y + index * (height + 10), x1, y + index * (height + 10) + height)
        else:
            width = (x1 - x0) / len(labels)
            area = (x0 + index * width + 4, y, x0 + (index + 1) * width - 4, y + height)
        _button(screen, theme, area, label, index == main)
    return y + (height + 10) * (len(labels) if is_stacked else 1)


def _dialog(screen: Screen, theme: Theme, rng: random.Random) -> None:
    dim = _shade((118, 118, 122) if sum(theme.page) > 380 else (8, 8, 10), 8, rng)
    screen.rectangle((0, 0, WIDTH, screen.height), dim)
    is_stacked = rng.random() < 0.4
    lines = [" ".join(rng.sample(FILLER, rng.randint(3, 5))) for _ in range(rng.randint(1, 3))]
    y = rng.uniform(130, 420)
    bottom = y + 84 + 26 * len(lines) + (200 if is_stacked else 70)
    left, right = rng.uniform(16, 36), WIDTH - rng.uniform(16, 36)
    screen.rectangle((left, y, right, bottom), theme.card if sum(theme.page) < 380 else WHITE, 20)
    screen.text(left + 22, y + 34, rng.choice(DIALOG_HEADS), 22, theme.ink)
    for index, line in enumerate(lines):
        screen.text(left + 22, y + 70 + 26 * index, line, 16, theme.faint)
    _buttons(screen, theme, rng, y + 70 + 26 * len(lines), left + 14, right - 14, is_stacked)


def _form(screen: Screen, theme: Theme, rng: random.Random) -> None:
    y = _header(screen, theme, rng) + rng.uniform(4, 24)
    pitch = rng.uniform(76, 92)
    for label in rng.sample(tuple(FIELDS), rng.randint(2, 5)):
        height = rng.uniform(54, 60)
        screen.rectangle((20, y, 340, y + height), theme.card, 8, theme.faint)
        sign = screen.text(34, y + height / 2, label, 21, theme.ink)
        screen.elements.append(Element("field", label, (20, y, 340, y + height), sign))
        y += pitch
    _buttons(screen, theme, rng, y + rng.uniform(0, 16), 20, 340, rng.random() < 0.4 and y < 560)


def _chats(screen: Screen, theme: Theme, rng: random.Random) -> None:
    y = _header(screen, theme, rng) + rng.uniform(0, 16)
    height = rng.uniform(68, 84)
    people = rng.sample(tuple(PEOPLE), rng.randint(4, 9))
    for name in people[: int((screen.height - 20 - y) // height)]:
        middle = y + height / 2
        screen.ellipse((18, middle - 23, 64, middle + 23), _shade((120, 130, 150), 70, rng))
        screen.text(41, middle, name[0], 22, WHITE, "mm")
        sign = screen.text(78, middle - 11, name, 22, theme.ink)
        screen.text(78, middle + 15, " ".join(rng.sample(FILLER, rng.randint(2, 5))), 14, theme.faint)
        screen.line((78, y + height, 350, y + height), theme.faint, 1)
        screen.elements.append(Element("person", name, (8, y + 2, 352, y + height - 2), sign))
        y += height


KINDS: dict[str, Callable[[Screen, Theme, random.Random], None]] = {
    "home": _home,
    "list": _list,
    "dialog": _dialog,
    "form": _form,
    "chats": _chats,
}
"""Screen kinds and the functions that lay them out."""
KIND_WEIGHTS = (30, 25, 15, 15, 15)
