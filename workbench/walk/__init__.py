"""One token through one layer, operation by operation: the line of our code that does it, and what it made of the numbers.

`walk_token` runs the model on the tokens up to the one that is walked and watches chosen lines of the layer's own code while
they run, so values and lines belong together by construction. Records are plain: numpy arrays and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.model.language_model import LanguageModel

TOPICS = {
    "csa": "CSA attention",
    "hca": "HCA attention",
    "indexer": "lightning indexer",
    "csa2": "CSA2 attention (V4.1)",
    "mhc": "mHC residual streams",
    "moe": "MoE routing",
    "engram": "Engram",
}


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A statement of the project: file below the checkout, number of its first line, text, and the function it stands in."""

    file: str
    line: int
    text: str
    function: str


@dataclass(frozen=True, slots=True)
class Value:
    """The walked token's part of one tensor: ``array`` with a name for each axis; ``in_call`` is the whole tensor's shape.

    ``row_labels`` and ``column_labels`` name the places along the first and the last axis, where they stand for tokens or
    entries; () where they do not.
    """

    name: str
    array: np.ndarray
    axes: tuple[str, ...]
    in_call: tuple[int, ...]
    row_labels: tuple[str, ...] = ()
    column_labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.axes) != self.array.ndim:
            raise InputError(f"value {self.name!r} of shape {self.array.shape} needs {self.array.ndim} axis names: {self.axes}")

    @property
    def shape(self) -> str:
        """ "heads 4 × channels 64", and what it is a part of."""
        mine = " × ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.array.shape, strict=True)) or "one number"
        return f"{self.name}: {mine}, of {list(self.in_call)} in the call"


@dataclass(frozen=True, slots=True)
class Step:
    """One operation. ``ran`` is False where the line was not reached, for instance because no block was complete yet."""

    title: str
    equation: str
    values: tuple[Value, ...]
    source: SourceLine
    note: str = ""
    ran: bool = True

    @property
    def shapes(self) -> tuple[str, ...]:
        return tuple(value.shape for value in self.values)

    def value(self, name: str) -> np.ndarray:
        """The array called ``name``. Raises InputError if the step has none."""
        found = next((value.array for value in self.values if value.name == name), None)
        if found is None:
            raise InputError(f"step {self.title!r} has values {[value.name for value in self.values]}, got {name!r}")
        return found


@dataclass(frozen=True, slots=True)
class Walk:
    """All operations of one topic in one layer for one token; ``label`` says which model ran where."""

    topic: str
    layer: int
    kind: str
    token: int
    label: str
    steps: tuple[Step, ...]


def walkable(model: LanguageModel) -> dict[str, tuple[int, ...]]:
    """Topic -> the layers of ``model`` that have it; topics it does not have are left out."""
    config = model.config
    kinds = tuple(enumerate(config.layer_kinds))
    streams = getattr(config, "hc_mult", 0) > 0
    found = {
        "csa": tuple(i for i, kind in kinds if kind == "csa"),
        "hca": tuple(i for i, kind in kinds if kind == "hca"),
        "indexer": tuple(i for i, kind in kinds if kind == "csa"),
        "csa2": tuple(i for i, kind in kinds if kind.startswith("csa2")),
        "mhc": tuple(i for i, _ in kinds) if streams else (),
        "moe": tuple(i for i, _ in kinds) if streams else (),
        "engram": tuple(config.engram.layer_ids) if config.engram else (),
    }
    return {topic: layers for topic, layers in found.items() if layers}


def walk_token(
    model: LanguageModel, ids: Sequence[int], topic: str, *, layer: int | None = None, token: int | None = None
) -> Walk:
    """Walk token number ``token`` (the last unless given) of ``ids`` through ``layer`` (the first that has the topic).

    Tokens after it play no part. The model runs once, without a cache; nothing of it changes, and hooks and tracing end with
    the call. Raises InputError for a topic or layer the model does not have, and a token that is not among ``ids``.
    """
    layers = walkable(model)
    if topic not in layers:
        raise InputError(f"{model.name} can be walked through {list(layers)}, got {topic!r}")
    layer = layers[topic][0] if layer is None else layer
    if layer not in layers[topic]:
        raise InputError(f"{TOPICS[topic]} is in layers {list(layers[topic])} of {model.name}, got {layer!r}")
    token = len(ids) - 1 if token is None else token
    if not 0 <= token < len(ids):
        raise InputError(f"token must be one of 0..{len(ids) - 1}, got {token!r}")
    from workbench.walk.run import run_walk  # needs torch

    return run_walk(model, list(ids[: token + 1]), topic, layer)
