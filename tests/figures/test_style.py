"""The palette: contrast on JupyterLab's two grounds, and colours that people with two kinds of cones tell apart."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from workbench.figures import style
from workbench.figures.claims import MARKS, WEIGHT_COLOURS
from workbench.figures.memory import PART_COLOURS
from workbench.figures.timeline import LANE_COLOURS, OTHER_COLOUR

GROUNDS = {"light": "#ffffff", "dark": "#111111"}  # --jp-layout-color0 of JupyterLab's own themes
NAMES = ("BLUE", "SKY", "GREEN", "ORANGE", "VERMILLION", "PINK", "PURPLE", "GREY")
MARK, TEXT = 3.0, 4.5  # WCAG 2.2, success criteria 1.4.11 and 1.4.3
# Linear RGB as people without L or M cones see it: Machado, Oliveira and Fernandes (2009), severity 1.
SEEN_BY = {
    "everyone": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]),
}
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])
WHITE = TO_XYZ.sum(axis=1)
LEAST_DISTANCE = 15  # CIE 1976; about 2.3 is just noticeable side by side, small marks far apart need several times that


def linear(colour: str) -> np.ndarray:
    """Linear-light red, green and blue of "#rrggbb"."""
    value = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG's ratio, 1 to 21."""
    dark, bright = sorted(float(linear(c) @ TO_XYZ[1]) for c in (one, other))
    return (bright + 0.05) / (dark + 0.05)


def lab(colour: str, matrix: np.ndarray) -> np.ndarray:
    xyz = TO_XYZ @ np.clip(matrix @ linear(colour), 0, 1) / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(one: str, other: str) -> tuple[float, str]:
    """The least CIE distance of two colours, and for whom."""
    return min((float(np.linalg.norm(lab(one, m) - lab(other, m))), who) for who, m in SEEN_BY.items())


def test_the_ratio_and_the_distance_are_the_standards():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the example of WCAG's explanations
    assert lab("#ff0000", SEEN_BY["everyone"]) == pytest.approx([53.24, 80.09, 67.2], abs=0.1)  # sRGB's red
    assert distance("#ff0000", "#007000")[1] != "everyone"


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_line_or_bar_of_every_colour_stands_out_on_both_grounds(name, ground):
    assert contrast(getattr(style, name), GROUNDS[ground]) >= MARK


def test_grey_text_is_as_readable_as_one_colour_can_be_on_both_grounds():
    """No colour has 4.5 on white and on #111111, whence CHART_CSS; grey is within two percent of the best there is."""
    best = (contrast("#ffffff", "#111111")) ** 0.5
    assert best < TEXT and min(contrast(style.GREY, ground) for ground in GROUNDS.values()) > 0.98 * best


@pytest.mark.parametrize(
    "together",
    [
        {name: getattr(style, name) for name in NAMES if name not in ("PURPLE", "GREY")},  # purple is hatched, grey dashed
        {name: colour for name, colour in PART_COLOURS.items() if colour != style.PURPLE},
        LANE_COLOURS | {"streams": OTHER_COLOUR},
        WEIGHT_COLOURS,
        {"window": style.WINDOW_COLOUR, "entries": style.ENTRY_COLOUR, "sink": style.SINK_COLOUR},
        {"kept": style.ENTRY_COLOUR, "not kept": style.GREY, "window": style.WINDOW_COLOUR},
    ],
    ids=["palette", "parts", "lanes", "weights", "attention", "choice"],
)
def test_colours_used_together_are_told_apart_by_everyone(together):
    for (a, one), (b, other) in combinations(together.items(), 2):
        least, who = distance(one, other)
        assert least >= LEAST_DISTANCE, f"{a} and {b}: {least:.1f} for {who}"


def test_verdicts_of_one_colour_have_marks_of_their_own():
    looks = {}
    for mark, colour in MARKS.values():
        looks.setdefault(colour, set()).add(mark)
    assert len(looks) >= 4 and all(len(marks) == 1 for marks in looks.values())


INKS = ("#ffffff BLUE", "#222222 ORANGE", "#222222 SKY", "#111111 VERMILLION", "#111111 GREEN", "#111111 ORANGE")


@pytest.mark.parametrize("pair", INKS)
def test_labels_inside_bars_are_readable(pair):
    ink, ground = pair.split()
    assert contrast(ink, getattr(style, ground)) >= TEXT
