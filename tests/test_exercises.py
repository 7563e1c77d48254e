"""Each exercise: its right answer by hand or from the reference, three typical wrong ones with their hints, and no leaks."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import workbench as wb
from tests import cases_fitting, choosing_cases, mechanism_exercises
from workbench.errors import InputError
from workbench.exercises import EXERCISES, check
from workbench.exercises.questions import LUCK_TOKENS

# Right answer, by hand from reference/deepseek-v4.md, sections 0, 4 and 5, and reference/deepseek-v41.md, section 9.2; then
# wrong ones, each with words its hint must have.
CASES = {
    "kept by luck": (
        1 - (1 - 2 / 1024) ** 2,
        {2 / 1024: "two queries look", 100 * 4 / 1024: "percentage", 1 / 1024: "Either every token"},
    ),
    "entries to choose from": (
        80,
        {320: "Those are tokens", 2: "HCA", 76: "do not take them off", 79: "token before", 81: "numbered from 0"},
    ),
    "gqa bytes per token": (
        61 * 8 * 128 * 2 * 2,
        {8 * 128 * 2 * 2: "one layer", 61 * 8 * 128 * 2: "factor of two", 61 * 128 * 128 * 2 * 2: "query heads", 244: "KiB"},
    ),
    "v3.2 at a million": (50.40, {46.94: "GiB", 41.96: "indexer's keys", 90.06: "all in BF16", 50.4e9: "in bytes"}),
    "smaller than v3.2": (9.55, {4.877: "two storages", 13.67: "V4-Flash", 0.1047: "upside down", 10.5: "percent"}),
    "index share of reading": (
        0.535 / 0.706,
        {0.535 / 5.280: "what is held", 0.374 / 0.480: "V4-Flash", 75.8: "percentage", 0.242: "all the rest"},
    ),
    "ring slot": (104, {7: "went round", 111: "one slot too few", 105: "numbered from 0", 1000: "starts again"}),
    "tokens in the tail": (32, {781: "finished", 96: "still waits", 0: "CSA layer's block", 33: "numbered from 0"}),
    "first to see an entry": (39, {36: "begins", 35: "entry before", 1279: "HCA", 79: "overlap"}),
    "bytes at a block's end": (
        21 * (584 + 68) + 20 * 584,
        {652 + 584: "Every layer", 41 * 584: "index key", 21 * 652: "HCA layers", 3514: "average", 24.78: "KiB"},
    ),
    "bytes of all windows": (
        43 * 128 * 584,
        {128 * 584: "one layer", 41 * 128 * 584: "without compressed", 43 * 32768 * 584: "no more tokens", 3.0654: "MiB"},
    ),
    "ninety percent outside": (9 * 307, {3070: "tables alone", 276.3: "of the whole", 203: "V4.1-Flash are", 2573: "GiB"}),
    "share outside": (
        203 / 510,
        {203 / 307: "by what stays", 510 / 307: "whole over", 0.602: "all the rest", 39.8: "percentage"},
    ),
    **choosing_cases.CASES,
    **cases_fitting.CASES,
    **mechanism_exercises.CASES,
    "twice the ratio": (
        # 21 CSA layers of L / 4 entries with keys, 20 HCA layers of L / 128, 43 windows, CSA's overlap of FP32 rows
        (21 * 2**17 * 652 + 20 * 2**13 * 584 + 43 * 128 * 584 + 860_160)
        / (21 * 2**18 * 652 + 20 * 2**13 * 584 + 43 * 128 * 584 + 430_080),
        {0.5: "only CSA layers", 0.6097: "what is held", 0.5643: "fewer keys", 0.9494: "keys alone", 0.486: "all the rest"},
    ),
    "twice the top-k": (
        21 * 512 * 584,
        {
            512 * 584: "one layer",
            43 * 512 * 584: "HCA layers read all",
            21 * 512 * 652: "read anyway",
            42 * 512 * 584: "how much more",
        },
    ),
}


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def test_every_exercise_is_tried_here_with_at_least_three_wrong_answers():
    assert set(CASES) == set(EXERCISES) and len(CASES) >= 8
    notebooks = {int(path.name[:2]) for path in (Path(__file__).parents[1] / "notebooks").glob("*.ipynb")}
    assert {exercise.notebook for exercise in EXERCISES.values()} == notebooks
    assert all(len(wrong) >= 3 for _, wrong in CASES.values())


@pytest.mark.parametrize("name", CASES)
def test_the_right_answer_is_right_and_a_rounded_one_where_nothing_is_counted(name):
    right, _ = CASES[name]
    assert check(name, right) and check(name, np.float64(right)) and "Right" in check(name, right)._repr_html_()
    assert bool(check(name, right * 1.004)) == (EXERCISES[name].tolerance > 0)


@pytest.mark.parametrize(("name", "answer", "words"), [(name, *item) for name in CASES for item in CASES[name][1].items()])
def test_a_typical_wrong_answer_gets_its_own_hint(name, answer, words):
    verdict = check(name, answer)
    assert verdict.right is False and words in verdict.hint
    assert verdict.hint != EXERCISES[name].general


@pytest.mark.parametrize("name", CASES)
def test_no_verdict_shows_the_answer(name):
    exercise, right = EXERCISES[name], CASES[name][0]
    shown = [check(name, answer) for answer in (*CASES[name][1], 12345.678, -1)] + [check(name)]
    for text in (str(verdict) + verdict._repr_html_() for verdict in shown):
        assert not [n for n in numbers(text) if abs(n - right) <= max(exercise.tolerance, 1e-9) * abs(right)]
    assert "12345" not in str(shown)


@pytest.mark.parametrize("name", CASES)
def test_mistakes_lead_elsewhere_than_the_answer_and_each_other(name):
    exercise = EXERCISES[name]
    right, own = exercise.solve(), exercise.mistakes()
    values = sorted([right, *(mistake.value for mistake in own)])
    assert all(b - a > exercise.tolerance * b for a, b in zip(values, values[1:], strict=False))
    assert len({mistake.hint for mistake in own}) == len(own) >= 3
    for mistake in own:
        assert check(name, mistake.value).hint == mistake.hint


def test_two_mistakes_at_once_get_both_hints():
    verdict = check("v3.2 at a million", 41.95982e9 / 2**30)  # without index keys, in GiB
    assert "indexer's keys" in verdict.hint and "GiB" in verdict.hint


def test_an_unknown_wrong_answer_gets_the_general_hint():
    assert check("ring slot", 55).hint == EXERCISES["ring slot"].general


def test_dots_show_the_question_and_case_does_not_matter():
    for verdict in (check("Ring  SLOT", ...), check("ring slot"), check("ring slot", None)):
        assert verdict.right is None and not verdict and EXERCISES["ring slot"].question in str(verdict)


@pytest.mark.parametrize("answer", ["104", True, float("nan"), float("inf"), [104], 1j])
def test_an_answer_that_is_no_number_is_one_clear_error(answer):
    with pytest.raises(InputError, match="a whole number .*got"):
        check("ring slot", answer)


@pytest.mark.parametrize(("name", "said"), [("ring slots", "ring slot"), ("qqqq", "share outside"), (3, "by its name")])
def test_an_unknown_exercise_is_one_clear_error_with_near_names(name, said):
    with pytest.raises(InputError, match=said):
        check(name, 1)


def test_fractions_and_integers_are_numbers():
    assert check("share outside", Fraction(203, 510)) and check("ring slot", np.int64(104))


def test_the_public_name_is_this_check():
    assert wb.check is check


def test_the_needles_largest_text_is_the_one_asked_about():
    from workbench.widgets.needle import MAX_TOKENS

    assert LUCK_TOKENS == MAX_TOKENS


def test_hints_are_escaped_in_html():
    import workbench.exercises.verdict as verdict

    shown = verdict.Verdict(EXERCISES["ring slot"], False, "<b>&")._repr_html_()
    assert "&lt;b&gt;&amp;" in shown and "<b>&" not in shown


# Exercise -> its folded solution, as it stands in the notebook.
SOLUTIONS = {
    "kept by luck": "1 - (1 - 2 / (4096 // 4)) ** 2",
    "entries to choose from": "trace.length // 4",
    "gqa bytes per token": "61 * 8 * 128 * 2 * 2",
    "v3.2 at a million": "61 * 2**20 * (512 + 16 + 128 + 128 + 4) / 1e9",
    "smaller than v3.2": 'wb.kv_bytes("v3.2", 2**20)["total"] / wb.kv_bytes("v4-pro", 2**20)["total"]',
    "index share of reading": 'read["index"] / read["total"]',
    "ring slot": "1000 % 128",
    "tokens in the tail": "100_000 % 128",
    "first to see an entry": "10 * 4 - 1",
    "bytes at a block's end": 'kinds.count("csa") * (584 + 68) + kinds.count("hca") * 584',
    "bytes of all windows": 'wb.kv_bytes("v4-flash", 32_768)["window"]',
    **choosing_cases.SOLUTIONS,
    **cases_fitting.SOLUTIONS,
    **mechanism_exercises.SOLUTIONS,
    "ninety percent outside": "9 * weights.device_bytes / 1e9",
    "share outside": "weights.host_bytes / (weights.host_bytes + weights.device_bytes)",
    "twice the ratio": 'wb.kv_bytes(replace(flash, csa_ratio=8), 2**20)["total"] / wb.kv_bytes(flash, 2**20)["total"]',
    "twice the top-k": 'flash.layer_kinds.count("csa") * 512 * 584',
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_folded_solution_of_a_notebook_is_right(name):
    path = next((Path(__file__).parents[1] / "notebooks").glob(f"{EXERCISES[name].notebook:02d}_*.ipynb"))
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    assert f'wb.check("{name}", ...)' in cells and f"`{SOLUTIONS[name]}`" in cells[-1] and "<details>" in cells[-1]
    known = choosing_cases.KNOWN | {
        "wb": wb,
        "read": wb.decode_bytes("v4-pro", 2**20),
        "kinds": wb.presets["v4-flash"].layer_kinds,
        "config": wb.presets["v4.1-flash"].config,
        "weights": wb.presets["v4.1-flash"].weights,
        "trace": wb.Trace.load("needle"),
        "flash": wb.presets["v4-flash"].config,
        "replace": replace,
    }
    assert check(name, eval(SOLUTIONS[name], known))  # our own text, a few lines up
