"""A step of a walk as HTML: which values become numbers and which colours, and that nothing of it can be markup."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from workbench.errors import InputError
from workbench.figures.walk import strip_png, value_html, walk_html
from workbench.walk import SourceLine, Step, Value, Walk

EVIL = "<script>alert('x')</script>&"
LINE = SourceLine("workbench/model/moe.py", 58, f"weights = scores < {EVIL!r}", "Gate.forward")


def walk_of(*values, ran=True):
    steps = (Step("First", "a < b & c", values, LINE, EVIL, ran), Step(EVIL, "x", (), LINE))
    return Walk("moe", 1, "csa", 5, EVIL, steps)


def pixels(html):
    data = re.search(r"data:image/png;base64,([^']+)'", html).group(1)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


def test_the_step_shows_equation_source_with_its_place_and_the_list_of_all_steps():
    html = walk_html(walk_of(), 0, "tok")
    assert "1 of 2: First" in html and "a &lt; b &amp; c" in html and "“<bdi>tok</bdi>”" in html
    assert "workbench/model/moe.py, line 58, in Gate.forward" in html
    assert re.findall(r'<li class="(\w*)" data-token="(\d)"', html) == [("q", "0"), ("", "1")]
    assert 'class="q" data-token="1"' in walk_html(walk_of(), 1, "tok")


def test_nothing_shown_is_taken_for_markup():
    value = Value(EVIL, np.ones((2, 3), np.float32), (EVIL, "y"), (2, 3), (EVIL, "r"), (EVIL, "c", "d"))
    html = walk_html(walk_of(value), 0, EVIL) + walk_html(walk_of(value), 1, EVIL)
    assert "<script" not in html and html.count("&lt;script&gt;") >= 8


def test_a_line_that_did_not_run_says_so():
    assert "did not run" in walk_html(walk_of(ran=False), 0, "t") and "did not run" not in walk_html(walk_of(), 0, "t")


def test_few_values_are_numbers_under_their_labels():
    array = np.array([[0.25, -0.5], [np.nan, -np.inf]])
    html = value_html(Value("p", array, ("heads", "tokens"), (1, 9, 2, 2), column_labels=("token 7", "token <8>")))
    assert re.findall(r"<td[^>]*>([^<]+)</td>", html) == ["0.25", "-0.5", "?", "-∞"]
    assert "<td class='n' style='--a:70'>-0.5" in html and "<td class='p' style='--a:35'>0.25" in html
    assert "heads 2 × tokens 2, of [1, 9, 2, 2] in the call" in html and "token &lt;8&gt;" in html and "head 1<" in html
    assert re.findall(r"<td[^>]*>([^<]+)</td>", value_html(Value("mix", np.array(2**62), (), (1, 9)))) == [str(2**62)]


def test_many_values_become_one_pixel_each_with_zero_clear_and_sign_as_hue():
    array = np.zeros((3, 40), np.float32)
    array[0, 0], array[2, 39], array[1, 5] = 2.0, -1.0, -np.inf
    html = value_html(Value("q", array, ("heads", "channels"), (1, 9, 3, 40), ("h0", "h1", "h2")))
    drawn = pixels(html)
    assert drawn.shape == (3, 40, 4) and "-1 … 2 (orange above zero, blue below)" in html and "<span>h1</span>" in html
    assert drawn[0, 0, 3] == 255 and drawn[0, 0, 0] > drawn[0, 0, 2]  # full red
    assert 100 < drawn[2, 39, 3] < 155 and drawn[2, 39, 2] > drawn[2, 39, 0]  # half blue
    assert drawn[1, 5, 0] == drawn[1, 5, 2] and drawn[1, 5, 3] > 0  # grey
    assert drawn[0, 1, 3] == 0


def test_a_large_value_is_pooled_to_what_is_largest_in_either_direction():
    array = np.zeros((300, 129))
    array[299, 128], array[0, 1], array[0, 0] = -3.0, 1.0, -0.5
    html = value_html(Value("entries", array, ("entries", "channels"), (1, 300, 129), tuple("abc" * 100)))
    drawn = pixels(html)
    assert (
        drawn.shape[:2] == (100, 65)
        and "the largest of 3 × 2 places each" in html
        and "<span>" not in html.split("img")[0][-9:]
    )
    assert drawn[99, 64, 3] == 255 and drawn[99, 64, 2] > drawn[99, 64, 0] and drawn[0, 0, 0] > drawn[0, 0, 2]


def test_pixels_of_nothing_but_zeros_are_clear():
    image = np.asarray(Image.open(io.BytesIO(strip_png(np.zeros((2, 2)), 0.0))).convert("RGBA"))
    assert (image[..., 3] == 0).all()


def test_an_empty_value_and_a_step_that_is_not_there():
    assert "nothing yet" in value_html(Value("p", np.zeros((4, 0)), ("heads", "entries"), (1, 3, 4, 0)))
    for number in (-1, 2):
        with pytest.raises(InputError, match=rf"steps 0\.\.1, got {number}"):
            walk_html(walk_of(), number, "t")
