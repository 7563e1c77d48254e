"""Runs a model under a watcher and makes the steps of a walk from what its lines left.

An ``Operation`` names a line and what to look at when it has run; where the model may take one of several ways, the last
line that ran is shown. Letters: B batch, T tokens, the walked one last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.model.language_model import LanguageModel
from workbench.runtime import device_name, threads_for_run, use_threads
from workbench.walk import Step, Value, Walk
from workbench.walk.lines import Statement, Watcher, find

Cut = Callable[[Tensor, Any], Tensor]  # a whole tensor and the layer it was met in -> the walked token's part


def last(x: Tensor, block: Any) -> Tensor:
    """[B, T, ...] -> [...]."""
    return x[0, -1]


def last_row(x: Tensor, block: Any) -> Tensor:
    """[N, ...] -> [...]."""
    return x[-1]


def softmax_of_last(x: Tensor, block: Any) -> Tensor:
    """Scores of the rows of each entry [B, n, rows, D] -> the last entry's weights [rows, D]."""
    return x[0, -1].softmax(0)


@dataclass(frozen=True, slots=True)
class Look:
    """One thing to look at: ``path`` starts at a variable and goes on by attributes and numbers ("return", "best.scores").

    ``at`` is the statement after which it is read, the operation's own unless given. ``rows`` and ``columns`` say what the
    places along the first and last axis are: "window" tokens, "entries", "kept" entries, tokens of a "block"; any other word
    is numbered.
    """

    name: str
    path: str
    axes: str
    cut: Cut = last
    at: Statement | None = None
    rows: str = ""
    columns: str = ""


@dataclass(frozen=True, slots=True)
class Way:
    """A line that may do an operation, and what to look at if it is the one that ran."""

    statement: Statement
    looks: tuple[Look, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    title: str
    equation: str
    ways: tuple[Way, ...]
    note: str = ""


def operation(title: str, equation: str, statement: Statement, *looks: Look, note: str = "") -> Operation:
    """One that is always done by the same line."""
    return Operation(title, equation, (Way(statement, looks),), note)


@dataclass
class Seen:
    """Which lines ran, in the order of their first run, and what each look found: the token's part and the whole shape."""

    order: dict[Statement, int] = field(default_factory=dict)
    parts: dict[tuple[Statement, Look], tuple[np.ndarray, tuple[int, ...]]] = field(default_factory=dict)


def run_walk(model: LanguageModel, ids: list[int], topic: str, layer: int) -> Walk:
    """See ``workbench.walk.walk_token``; the last of ``ids`` is the token that is walked."""
    from workbench.walk.topics import operations

    todo = operations(topic, model, layer)
    seen = _watch(model, ids, layer, todo)
    labels = _Labels(model.blocks[layer], len(ids) - 1, _kept(seen))
    steps = tuple(_step(one, seen, labels) for one in todo)
    label = f"{model.name} ({model.what}), measured on {device_name(str(model.device))}"
    return Walk(topic, layer, model.config.layer_kinds[layer], len(ids) - 1, label, steps)


def _watch(model: LanguageModel, ids: list[int], layer: int, todo: tuple[Operation, ...]) -> Seen:
    block, seen, thread = model.blocks[layer], Seen(), threading.get_ident()
    looks: dict[Statement, list[tuple[Statement, Look]]] = {}
    for one in todo:
        for way in one.ways:
            looks.setdefault(way.statement, [])
            for look in way.looks:
                looks.setdefault(look.at or way.statement, []).append((way.statement, look))

    def note(statement: Statement, variables: dict[str, Any]) -> None:
        """The last run counts: it is the one that deals with the last token."""
        seen.order.setdefault(statement, len(seen.order))
        for key in looks[statement]:
            seen.parts.pop(key, None)
            whole = _reach(variables, key[1].path)
            if whole is None or 0 in whole.shape[:-1]:  # nothing there yet, no complete block for instance
                continue
            part = key[1].cut(whole, block)
            seen.parts[key] = part.detach().cpu().clone().numpy(), tuple(whole.shape)

    watcher = Watcher(looks, lambda path: attrgetter(path)(block), note)

    def begin(*_: Any) -> None:
        if threading.get_ident() == thread:
            watcher.start()

    def end(*_: Any) -> None:
        if threading.get_ident() == thread:
            watcher.stop()

    hooks = [
        block.attn.attention_tap.register_forward_hook(lambda *_: None),  # nobody listening, attention keeps no probabilities
        block.register_forward_pre_hook(begin),
        block.register_forward_hook(end),
    ]
    use_threads(threads_for_run())
    try:
        with torch.inference_mode():
            model(torch.tensor([ids], device=model.device), logits="last", prefetch="resident")  # rows are read in this thread
    finally:
        watcher.stop()
        for hook in hooks:
            hook.remove()
    return seen


def _reach(variables: dict[str, Any], path: str) -> Tensor | None:
    """The tensor at ``path``; None where something on the way is None or does not exist in this call."""
    first, *rest = path.split(".")
    value = variables.get(first)
    for name in rest:
        if value is None:
            return None
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value if value is None or isinstance(value, Tensor) else value.read()  # rows of a cache or of one call


def _kept(seen: Seen) -> np.ndarray | None:
    """The numbers of the kept entries, if the walk saw any."""
    return next((part for (_, look), (part, _) in seen.parts.items() if look.name == "kept"), None)


class _Labels:
    """Names for places along an axis. Entries of CSA read the block before theirs, too; they are named by their own."""

    def __init__(self, block: Any, token: int, kept: np.ndarray | None) -> None:
        self.token, self.kept, self.ratio = token, kept, getattr(block.attn, "ratio", 0)

    def of(self, what: str, count: int) -> tuple[str, ...]:
        if what == "window":
            return tuple(self._token(t) for t in range(self.token - count + 1, self.token + 1))
        if what == "entries":
            return tuple(self._entry(j) for j in range(count))
        if what == "kept":
            return () if self.kept is None else tuple(self._entry(int(j)) for j in self.kept[:count])
        if what == "block":
            stop = (self.token + 1) // self.ratio * self.ratio
            return tuple(self._token(t) for t in range(stop - count, stop))
        return tuple(f"{what} {i}" for i in range(count)) if what else ()

    def _token(self, t: int) -> str:
        return f"token {t}" if t >= 0 else "before the text"

    def _entry(self, j: int) -> str:
        if j < 0:
            return "none left"
        first, final = j * self.ratio, (j + 1) * self.ratio - 1
        return f"entry {j}: token {first}" if first == final else f"entry {j}: tokens {first}–{final}"


def _step(one: Operation, seen: Seen, labels: _Labels) -> Step:
    ran = [way for way in one.ways if way.statement in seen.order]
    way = max(ran, key=lambda w: seen.order[w.statement]) if ran else one.ways[0]
    values = []
    for look in way.looks if ran else ():
        if (way.statement, look) in seen.parts:
            array, whole = seen.parts[way.statement, look]
            axes = tuple(look.axes.split(", ")) if look.axes else ()
            rows = labels.of(look.rows, array.shape[0]) if array.ndim > 1 else ()
            columns = labels.of(look.columns, array.shape[-1]) if array.ndim else ()
            values.append(Value(look.name, array, axes, whole, rows, columns))
    return Step(one.title, one.equation, tuple(values), find(way.statement), one.note, bool(values))
