"""What an exercise is: a question, a number computed by our own accounting, and the numbers typical mistakes lead to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

# Counted, so right only if exact.
Counted = Literal["entries", "entry number", "keys", "weights", "tokens", "token number", "slot", "sessions", "layer"]
Unit = Literal["GB", "bytes", "share", "times", "seconds"] | Counted
WHOLE: tuple[Unit, ...] = get_args(Counted)
ROUNDING = 0.01  # other answers may be rounded to two or three digits
# Unit -> what the right number looks like in another one, and what to say then.
_OTHER_UNITS: dict[str, tuple[tuple[Callable[[float], float], str], ...]] = {
    "GB": (
        (lambda x: x * 1e9 / 2**30, "This is in GiB (2**30 bytes); the question asks for GB, 1e9 bytes."),
        (lambda x: x * 1e9, "This is in bytes; the question asks for GB, 1e9 bytes."),
        (lambda x: x * 1e3, "This is in MB; the question asks for GB, 1e9 bytes."),
        (lambda x: x / 1e3, "This is in TB; the question asks for GB, 1e9 bytes."),
    ),
    "bytes": (
        (lambda x: x / 1024, "This is in KiB; the question asks for plain bytes."),
        (lambda x: x / 1e3, "This is in KB; the question asks for plain bytes."),
        (lambda x: x / 1e6, "This is in MB; the question asks for plain bytes."),
        (lambda x: x / 2**20, "This is in MiB; the question asks for plain bytes."),
        (lambda x: x * 8, "This is in bits; the question asks for bytes."),
    ),
    "seconds": (
        (lambda x: x * 1e3, "This is in milliseconds; the question asks for seconds."),
        (lambda x: x * 8, "A rate in GB/s counts bytes, not bits: there is no factor of eight."),
        (lambda x: x * 1e9 / 2**30, "The bytes were counted in GiB (2**30 bytes), the rate in GB (1e9 bytes)."),
    ),
    "share": (
        (lambda x: x * 100, "This is a percentage; the question asks for a share from 0 to 1."),
        (lambda x: 1 - x, "This is the share of all the rest; read once more which part is asked for."),
    ),
    "times": (
        (lambda x: 1 / x, "This is the fraction upside down: divide the larger by the smaller."),
        (lambda x: 100 / x, "This is what is left, in percent; the question asks how many times smaller."),
        (lambda x: 1 - 1 / x, "This is the share that is saved; the question asks how many times smaller."),
    ),
}
_ONE_OFF = "Close, but counted from the wrong end of one: tokens, entries and slots are numbered from 0."


@dataclass(frozen=True, slots=True)
class Mistake:
    """A typical wrong way: the number it leads to, and what to tell somebody who took it."""

    value: float
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exercise:
    """One question with one number as its answer.

    ``solve`` computes the right number, ``mistakes`` those that typical errors lead to; ``general`` is the hint for any other.
    """

    name: str
    notebook: int
    question: str
    unit: Unit
    solve: Callable[[], float]
    mistakes: Callable[[], tuple[Mistake, ...]]
    general: str

    @property
    def tolerance(self) -> float:
        """Relative; 0 where something is counted."""
        return 0.0 if self.unit in WHOLE else ROUNDING

    def known_errors(self, right: float) -> Iterator[Mistake]:
        """This exercise's mistakes, the right number in a wrong unit, and at last both at once."""
        own, units = self.mistakes(), _OTHER_UNITS.get(self.unit, ())
        yield from own
        yield from (Mistake(change(right), hint) for change, hint in units)
        if self.unit in WHOLE:
            yield from (Mistake(right + step, _ONE_OFF) for step in (-1, 1))
        yield from (Mistake(change(m.value), f"{m.hint} And: {hint}") for m in own for change, hint in units)
