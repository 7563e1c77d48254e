"""The frontier: small variants of V4, what each recalls, and what its KV cache holds and reads. Records only, no torch.

A *point* is one variant trained with one seed, kept as one JSON file that is named after both. ``workbench sweep`` makes them
(training/sweep.py), ``figures.frontier`` draws them, and about two dozen ship with the workbench.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from workbench import cost
from workbench.config import HybridConfig
from workbench.config.hybrid import LayerKind
from workbench.errors import InputError
from workbench.training import light

SHIPPED = Path(__file__).parent / "assets" / "frontier"
FORMAT = 1
STEPS = 300
HCA_RATIO = 32  # symbols an entry; far below the released 128, as the texts are short
SHARES = (0.0, 0.5, 1.0)  # of the two layers
SCORED_LENGTH = 1024  # symbols in a scored text, eight times what was trained on
MOST_RATIO, MOST_TOPK, MOST_STEPS = 64, 64, 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to build and train the light model. Raises InputError for a setting outside its range.

    ``ratio`` symbols per CSA entry, ``topk`` entries a CSA query keeps, ``hca_share`` of the two layers that are HCA (with all
    of them HCA, ratio and topk are idle), Engram on or off, ``seed`` of weights and texts, optimiser ``steps``.
    """

    ratio: int = 4
    topk: int = 4
    hca_share: float = 0.0
    engram: bool = False
    seed: int = 1
    steps: int = STEPS

    def __post_init__(self) -> None:
        limits = {"ratio": (1, MOST_RATIO), "topk": (1, MOST_TOPK), "seed": (0, 2**31 - 1), "steps": (1, MOST_STEPS)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise InputError(f"{name} of a variant must be a whole number from {low} to {high:,}, got {value!r}")
        if self.hca_share not in SHARES or isinstance(self.hca_share, bool):
            raise InputError(f"hca_share must be one of {SHARES}, got {self.hca_share!r}")
        if type(self.engram) is not bool:
            raise InputError(f"engram must be true or false, got {self.engram!r}")

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Of the two layers; each has its window besides."""
        return {0.0: ("csa", "csa"), 0.5: ("csa", "hca"), 1.0: ("hca", "hca")}[self.hca_share]  # type: ignore[return-value]

    @property
    def shape(self) -> str:
        """The variant without its seed, as in file names: "m4-k2-hca50-engram"."""
        entries = f"m{self.ratio}-k{self.topk}-" if self.hca_share < 1 else ""
        length = f"-{self.steps}steps" if self.steps != STEPS else ""
        return f"{entries}hca{round(100 * self.hca_share)}{'-engram' if self.engram else ''}{length}"

    @property
    def name(self) -> str:
        return f"{self.shape}-seed{self.seed}"

    @property
    def label(self) -> str:
        """The shape in words."""
        parts = [f"{self.ratio} symbols an entry, top-{self.topk}"] if self.hca_share < 1 else []
        parts.append({0.0: "CSA only", 0.5: "half HCA", 1.0: f"HCA only ({HCA_RATIO} symbols an entry)"}[self.hca_share])
        return ", ".join(parts + (["Engram"] if self.engram else []))

    def config(self) -> HybridConfig:
        return light.config(self.kinds, csa_ratio=self.ratio, hca_ratio=HCA_RATIO, topk=self.topk, engram=self.engram)

    @classmethod
    def from_dict(cls, stored: Any) -> Variant:
        names = {field.name for field in fields(cls)}
        if not isinstance(stored, dict) or set(stored) != names:
            raise InputError(f"a variant has the settings {', '.join(sorted(names))}, got {stored!r:.200}")
        return cls(**stored)


@dataclass(frozen=True)
class Point:
    """A trained variant. ``scores`` say how each was taken: texts, length, questions, chance; ``trained_with`` what on."""

    variant: Variant
    scores: dict[str, float]
    recipe: dict[str, Any]
    trained_with: dict[str, Any]

    @cached_property
    def config(self) -> HybridConfig:
        return self.variant.config()

    def held(self, length: int = SCORED_LENGTH, storage: str = "bf16") -> int:
        """Bytes of KV cache one sequence holds, by formula."""
        return cost.kv_bytes(self.config, length, storage)["total"]

    def read(self, length: int = SCORED_LENGTH, storage: str = "bf16") -> int:
        """Bytes of it that one decoded symbol reads, by formula."""
        return cost.decode_bytes(self.config, length, storage)["total"]

    def to_dict(self) -> dict[str, Any]:
        kv = {"length": SCORED_LENGTH, "storage": "bf16", "held_bytes": self.held(), "read_bytes": self.read()}
        return {"format": FORMAT, "variant": asdict(self.variant), "scores": self.scores, "kv": kv, "recipe": self.recipe} | {
            "trained_with": self.trained_with
        }

    @classmethod
    def from_dict(cls, stored: Any) -> Point:
        """Raises InputError for anything that ``to_dict`` would not write."""
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise InputError(f"no point of format {FORMAT}")
        scores = stored.get("scores")
        numbers = {name for name, value in scores.items() if _is_number(value)} if isinstance(scores, dict) else set()
        missing = {"recall", "chance", "questions", "text_loss"} - numbers
        if missing:
            raise InputError(f"its scores lack {', '.join(sorted(missing))}")
        recipe, trained_with = stored.get("recipe"), stored.get("trained_with")
        if not isinstance(scores, dict) or not isinstance(recipe, dict) or not isinstance(trained_with, dict):
            raise InputError("its recipe or what it was trained with is missing")
        return cls(Variant.from_dict(stored.get("variant")), scores, recipe, trained_with)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def write_point(point: Point, folder: Path) -> Path:
    """One JSON file, there as a whole or not at all. OSError if the folder cannot be written."""
    path = folder / f"{point.variant.name}.json"
    temporary = path.with_suffix(f".part{os.getpid()}")
    temporary.write_text(json.dumps(point.to_dict(), indent=1), encoding="utf-8")
    temporary.replace(path)
    return path


def read_point(path: Path) -> Point:
    """Raises InputError, naming the file, if it cannot be read or holds no point of its name."""
    try:
        point = Point.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # InputError and broken JSON are ValueErrors
        raise InputError(f"{path} is no point of a sweep: {error}") from None
    if path.stem != point.variant.name:
        raise InputError(f"{path} holds the point {point.variant.name}; a file is named after its point")
    return point


def read_points(folder: Path | str) -> tuple[list[Point], list[str]]:
    """The points of a folder by name, and what was wrong with files that hold none. InputError if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of points; make one with: workbench sweep --out {folder}")
    points, wrong = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            points.append(read_point(path))
        except InputError as error:
            wrong.append(str(error))
    return points, wrong


def frontier_points(folder: Path | str = SHIPPED) -> list[Point]:
    """The points that ship, or those of a sweep of your own. Raises InputError, naming the first file that is no point."""
    points, wrong = read_points(folder)
    if wrong:
        raise InputError(f"{wrong[0]}; remove it{f' and {len(wrong) - 1} more' if wrong[1:] else ''}, or sweep again")
    if not points:
        raise InputError(f"{folder} holds no points; make some with: workbench sweep --out {folder}")
    return points


def grid(size: str = "small", seeds: int = 1, steps: int = STEPS) -> list[Variant]:
    """The variants of a sweep, most telling first; "small" has 14 shapes, "full" 50. ``seeds`` counts from 1.

    All shapes come with the first seed before any comes with the second. Raises InputError for another size or no seeds.
    """
    if size not in ("small", "full"):
        raise InputError(f"a grid is 'small' or 'full', got {size!r}")
    if type(seeds) is not int or not 1 <= seeds <= 100:
        raise InputError(f"a sweep takes from 1 to 100 seeds, got {seeds!r}")
    shapes = SMALL if size == "small" else _full()
    return [replace(shape, seed=seed, steps=steps) for seed in range(1, seeds + 1) for shape in shapes]


SMALL = (
    Variant(),
    Variant(ratio=8),
    Variant(ratio=16),
    Variant(topk=1),
    Variant(hca_share=1.0),
    Variant(hca_share=0.5),
    Variant(engram=True),
    Variant(ratio=8, topk=1),
    Variant(ratio=2),
    Variant(ratio=8, hca_share=0.5),
    Variant(hca_share=1.0, engram=True),
    Variant(topk=16),
    Variant(ratio=16, engram=True),
    Variant(ratio=16, topk=1),
)


def _full() -> list[Variant]:
    both = (False, True)
    mixed = [
        Variant(ratio=ratio, topk=topk, hca_share=share, engram=engram)
        for engram in both
        for share in (0.0, 0.5)
        for ratio in (2, 4, 8, 16)
        for topk in (1, 4, 16)
    ]
    return mixed + [Variant(hca_share=1.0, engram=engram) for engram in both]


def table_lines(points: Iterable[Point], length: int = SCORED_LENGTH, storage: str = "bf16") -> list[str]:
    """One line a point, and one above that says what was measured and what was counted."""
    head = f"{'point':36}{'recall':>8}{'text loss':>11}{f'held, B at {length:,}':>18}{'read, B':>10}"
    rows = [
        f"{p.variant.name:36}{p.scores['recall']:8.1%}{p.scores['text_loss']:11.3f}"
        f"{p.held(length, storage):18,}{p.read(length, storage):10,}"
        for p in points
    ]
    return [head, *rows]


def by_shape(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Points that differ in nothing but their seed, together."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.variant.shape, []).append(point)
    return groups


def pareto(places: Sequence[tuple[float, float]]) -> list[int]:
    """Of (cost, quality) pairs those that none beats: no other costs as little and is as good, and better in one of the two.

    Indices by rising cost; of equal pairs the first.
    """
    best, front = -float("inf"), []
    for i in sorted(range(len(places)), key=lambda i: (places[i][0], -places[i][1])):
        if places[i][1] > best:
            front.append(i)
            best = places[i][1]
    return front
