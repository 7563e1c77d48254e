"""One axis of a still picture: where its numbers or categories lie, and which ticks it has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import date
from html import unescape
from typing import Any, Literal

PAD = 0.05  # of the axis, beyond what is drawn
TICK_PIXELS = {"x": 90, "y": 45}
_SI = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Axis:
    """Numbers are those of the data, their logarithms on a logarithmic axis, and 0, 1, 2 for categories."""

    def __init__(self, name: str, spec: Mapping[str, Any], values: Sequence[Any]) -> None:
        self.name, self.letter, self.spec = name, name[0], spec
        kind = spec.get("type")
        words = any(isinstance(v, str) and not _plain(v) for v in values)
        self.kind: Literal["linear", "log", "category"] = (
            "log" if kind == "log" else "category" if kind == "category" or (kind is None and words) else "linear"
        )
        known = [str(c) for c in spec.get("categoryarray") or ()] if spec.get("categoryorder") in ("array", None) else []
        self.categories = list(dict.fromkeys([*known, *(str(v) for v in values)])) if self.kind == "category" else []
        self.group = str(spec.get("matches") or name)
        domain = spec.get("domain") or (0.0, 1.0)
        self.domain = (float(domain[0]), float(domain[1]))
        title = spec.get("title") or {}
        self.title = title.get("text") if isinstance(title, Mapping) else title
        self.seen: list[tuple[float, bool]] = []  # a number that must lie on the axis, and whether beyond it there is room
        self.low, self.high = 0.0, 1.0
        self.ends = (0.0, 1.0)

    def number(self, value: Any) -> float | None:
        """Where ``value`` lies; None for a gap and for what has no place here."""
        if self.kind == "category":
            if str(value) in self.categories:
                return float(self.categories.index(str(value)))
            return float(value) if isinstance(value, int | float) else None
        try:
            found = float(value)
        except (TypeError, ValueError):
            return None
        if self.kind == "log":
            return math.log10(found) if found > 0 else None
        return found if math.isfinite(found) else None

    def reach(self, *numbers: float, pad: bool = True) -> None:
        self.seen += [(number, pad) for number in numbers]

    def settle(self, group: Sequence[Axis]) -> None:
        """Fix the ends, the same for all axes of a group: as asked for, or around everything that is drawn."""
        given = self.spec.get("range")
        if given is not None and None not in given:
            self.low, self.high = (float(self.number(v) or 0) if isinstance(v, str) else float(v) for v in given)
            return
        if self.kind == "category":
            most = max(len(axis.categories) for axis in group)
            low, high = -0.5, max(most, 1) - 0.5
        else:
            seen = [item for axis in group for item in axis.seen] or [(0.0, False), (1.0, False)]
            low, high = min(n for n, _ in seen), max(n for n, _ in seen)
            room = PAD * (high - low) or 0.5
            low -= room if any(pad and n == low for n, pad in seen) else 0.0
            high += room if any(pad and n == high for n, pad in seen) else 0.0
            if low >= high:
                low, high = low - 0.5, high + 0.5
            if self.spec.get("rangemode") == "tozero":
                low, high = min(0.0, low) if low > 0 else low, max(0.0, high)
        self.low, self.high = (high, low) if self.spec.get("autorange") == "reversed" else (low, high)

    def between(self, start: float, end: float) -> None:
        self.ends = (start, end)

    def px(self, number: float) -> float:
        """Pixels of a number as ``number`` gives it."""
        return self.ends[0] + (number - self.low) / ((self.high - self.low) or 1.0) * (self.ends[1] - self.ends[0])

    def at(self, value: float) -> float:
        """Pixels of a value of the data, or of a tick."""
        return self.px(math.log10(value) if self.kind == "log" and value > 0 else value)

    def on_edge(self, axes: Mapping[str, Axis]) -> bool:
        """Whether labels of this upright axis stand in the picture's margin."""
        across = axes.get(str(self.spec.get("anchor") or "x"))
        return bool(self.spec.get("showticklabels", True)) and (across is None or across.domain[0] < 0.02)

    def labels(self) -> list[str]:
        return [label for _, label in ticks(self)]


def ticks(axis: Axis) -> list[tuple[float, str]]:
    """(value, label) of every tick between the ends."""
    low, high = sorted((axis.low, axis.high))
    wanted = axis.spec.get("tickvals")
    if wanted is not None:
        texts = axis.spec.get("ticktext")
        texts = [label(v, axis.spec) for v in wanted] if texts is None else texts
        return [(float(v), _bare(t)) for v, t in zip(wanted, texts, strict=False) if low <= (axis.number(v) or 0) <= high]
    if axis.kind == "category":
        return [(float(i), _bare(name)) for i, name in enumerate(axis.categories) if low <= i <= high]
    room = abs(axis.ends[1] - axis.ends[0])
    count = int(axis.spec.get("nticks") or 0) or max(2, round(room / TICK_PIXELS[axis.letter])) if room > 1 else 5
    if axis.kind == "log":
        decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        step = max(1, math.ceil(len(decades) / max(count, 2)))
        values = [10.0**d for d in decades if d % step == 0]
        if high - low < 2.5 and len(values) < 3:
            digits = (1, 2, 5)
            values = [d * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for d in digits]
            values = [v for v in values if low - 1e-9 <= math.log10(v) <= high + 1e-9]
        return [(v, label(v, axis.spec)) for v in values]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    size = power * next((m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9)), 10)
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [(n * size, label(n * size, axis.spec, size)) for n in range(first, last + 1)]


def label(value: Any, spec: Mapping[str, Any], step: float = 0.0) -> str:
    """A tick's number: a share where percent are asked for, large ones with k, M, G, as many digits as the step needs."""
    if not isinstance(value, int | float):
        return _bare(value) if not isinstance(value, date) else value.isoformat()
    form = str(spec.get("tickformat") or "")
    if form.endswith("%"):
        digits = max(int(form.strip(".,%") or 0), max(0, -math.floor(math.log10(100 * step))) if step else 0)
        return f"{100 * value:.{digits}f}%"
    size = max(abs(value), step)
    for unit, letter in _SI:
        if size >= max(unit, 1e4 if unit == 1e3 and not spec.get("exponentformat") else unit):
            return f"{value / unit:.4g}{letter}".replace("-", "\u2212") if value else "0"
    return f"{value:.6g}".replace("-", "\u2212") if abs(value) >= 1e-4 or not value else f"{value:.1e}"


def _bare(text: Any) -> str:
    """A label without markup."""
    plain = str(text)
    while "<" in plain and ">" in plain[plain.index("<") :]:
        start = plain.index("<")
        plain = plain[:start] + plain[plain.index(">", start) + 1 :]
    return unescape(plain)


def _plain(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
