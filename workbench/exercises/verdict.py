"""``wb.check(name, answer)``: whether a number is right, or what was probably overlooked. A verdict never shows the number."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from html import escape
from numbers import Real
from types import EllipsisType

from workbench.errors import InputError
from workbench.exercises.questions import EXERCISES
from workbench.exercises.record import Exercise


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ``check`` found; shows itself in a notebook. ``right`` is None while nothing was answered."""

    exercise: Exercise
    right: bool | None
    hint: str

    def __bool__(self) -> bool:
        return bool(self.right)

    def __str__(self) -> str:
        mark = {None: "?", True: "✓ Right.", False: "✗ Not yet."}[self.right]
        return f"{mark} {self.hint}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        mark, colour = {None: ("?", "#7d7d7d"), True: ("✓ Right.", "#009e73"), False: ("✗ Not yet.", "#d55e00")}[self.right]
        return (
            f"<div class='wb-check' role='status' style='border-left:4px solid {colour};padding:2px 10px;line-height:1.5'>"
            f"<b>{mark}</b> {escape(self.hint)}</div>"
        )


def check(exercise: str, answer: float | EllipsisType | None = ...) -> Verdict:
    """Whether ``answer`` is right; if not, a hint at what was probably overlooked, never the answer.

    ``wb.check(name)`` or ``wb.check(name, ...)`` shows the question. Answers that are no counts may be rounded to within 1 %.
    Raises InputError for an unknown exercise, and for an answer that is no finite number.
    """
    found = exercise_named(exercise)
    if answer is None or answer is ...:
        return Verdict(found, None, f"{found.question} Put {_asked_for(found)} in place of the dots.")
    if isinstance(answer, bool) or not isinstance(answer, Real):
        raise InputError(f"the answer to {found.name!r} is {_asked_for(found)}, got {answer!r:.60}")
    given = float(answer)
    if not math.isfinite(given):
        raise InputError(f"the answer to {found.name!r} is {_asked_for(found)}, got {given}")
    right = found.solve()
    if _distance(given, right) <= found.tolerance:
        return Verdict(found, True, "")
    likely = [m for m in found.known_errors(right) if _distance(given, m.value) <= found.tolerance]
    if likely:
        return Verdict(found, False, min(likely, key=lambda m: _distance(given, m.value)).hint)
    return Verdict(found, False, found.general)


def exercise_named(name: str) -> Exercise:
    """Case and spaces do not matter; InputError with the nearest names for one there is not."""
    if isinstance(name, str):
        wanted = " ".join(name.lower().split())
        if wanted in EXERCISES:
            return EXERCISES[wanted]
        near = difflib.get_close_matches(wanted, EXERCISES, n=3, cutoff=0.5)
        raise InputError(f"no exercise {name!r:.60}; choose one of {near or sorted(EXERCISES)}")
    raise InputError(f"an exercise is chosen by its name, got {name!r:.60}; there are {sorted(EXERCISES)}")


def _asked_for(exercise: Exercise) -> str:
    known = {
        "GB": "a number of GB",
        "bytes": "a number of bytes",
        "seconds": "a number of seconds",
        "share": "a share from 0 to 1",
        "times": "a factor",
    }
    return known.get(exercise.unit, f"a whole number ({exercise.unit})")


def _distance(given: float, value: float) -> float:
    """Relative where it can be."""
    return abs(given - value) / (abs(value) or 1.0)
