"""What a claim is: words, sources, numbers, and a verdict that is a function of the numbers and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from workbench.errors import InputError
from workbench.sources import Source

Verdict = Literal["supported", "partly", "not supported", "wrong for V4", "cannot be tested here"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
Origin = Literal["modelled (formula)", "measured here", "published", "said by the article"]
MODELLED: Origin = "modelled (formula)"
MEASURED: Origin = "measured here"
PUBLISHED: Origin = "published"
SAID: Origin = "said by the article"
ENOUGH, HALF = 0.9, 0.5  # of a claimed factor or share: as good as all of it, and half of it

_REFERENCE = "reference/engram-and-overlap.md, section"
PAPER = Source(f"Engram paper, arXiv 2601.07372 ({_REFERENCE} 2)", "published")
V4_REPORT = Source("DeepSeek-V4 report, arXiv 2606.19348 (reference/deepseek-v4.md, sections 0 and 5)", "published")
V41_REPORT = Source(
    "DeepSeek-V4.1-Flash report, arXiv 2609.19969, as quoted publicly (reference/deepseek-v41.md, sections 6 and 9)",
    "secondary",
)
ENGINES = Source("documentation and pull requests of the engines (reference/deepseek-v41.md, section 12)", "secondary")
SSD_PORT = Source(f"Rapid-MLX PR 3338, one M3 Ultra ({_REFERENCE} 2)", "secondary")
NO_SOURCE = Source(f"no primary source found ({_REFERENCE} 6)", "uncertain")
CARD_DATA = Source(f"data of the cards ({_REFERENCE} 7)", "secondary")
V4_MODELS, WITH_ENGRAM, ANCESTOR = ("v4-flash", "v4-pro"), "v4.1-flash", "v3.2"


class Judgement(NamedTuple):
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Number:
    """One number behind a verdict. ``unit`` is "B", "B/s", "s", "x" (a factor), "%" (a share of 1), "nats", or a noun."""

    key: str
    what: str
    value: float
    unit: str
    origin: Origin

    @property
    def text(self) -> str:
        return f"{self.what}: {with_unit(self.value, self.unit)}"


@dataclass(frozen=True, slots=True)
class Claim:
    """What the article says in our words, what primary sources support, our numbers, and the verdict that follows from them."""

    key: str
    said: str
    found: str
    sources: tuple[Source, ...]
    numbers: tuple[Number, ...]
    judge: Callable[[Mapping[str, float]], Judgement]
    needs: str = ""  # how to measure what the verdict waits for; empty if nothing is missing

    @property
    def judgement(self) -> Judgement:
        if self.needs:
            return Judgement("cannot be tested here", f"Nothing was measured yet: {self.needs}.")
        return self.judge({number.key: number.value for number in self.numbers})

    @property
    def verdict(self) -> Verdict:
        return self.judgement.verdict

    @property
    def reason(self) -> str:
        return self.judgement.reason

    def given(self, **values: float) -> Claim:
        """The same claim with other numbers; InputError for one it does not have."""
        if unknown := values.keys() - {number.key for number in self.numbers}:
            raise InputError(f"claim {self.key!r} has numbers {[n.key for n in self.numbers]}, got {sorted(unknown)}")
        return replace(self, numbers=tuple(replace(n, value=values.get(n.key, n.value)) for n in self.numbers))


def with_unit(value: float, unit: str) -> str:
    """A number as people read it: 5.28 GB, ×9.5, 39.8 %, 1,234 tokens."""
    if unit in ("B", "B/s"):
        size, name = next(
            ((s, n) for s, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if abs(value) >= s), (1, "B")
        )
        return f"{value / size:.4g} {name}{unit[1:]}"
    if unit == "x":
        return f"×{value:.3g}"
    if unit == "%":
        return f"{100 * value:.3g} %"
    if unit == "nats":
        return f"{value:.2g} nats"
    if unit == "s":
        return f"{1e3 * value:.3g} ms"
    unit = unit.removesuffix("s") if value == 1 else unit
    return f"{value:,.0f} {unit}" if abs(value) >= 100 or float(value).is_integer() else f"{value:,.3g} {unit}"


def against(claimed: float, reached: float) -> Verdict:
    """Against a claimed factor or share: enough of it, half of it, or less."""
    return "supported" if reached >= ENOUGH * claimed else "partly" if reached >= HALF * claimed else "not supported"


def numbers_of(origin: Origin, *numbers: tuple[str, str, float, str]) -> tuple[Number, ...]:
    return tuple(Number(key, what, float(value), unit, origin) for key, what, value, unit in numbers)
