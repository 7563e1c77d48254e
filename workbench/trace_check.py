"""What a trace that was read from a folder must hold for figures to rely on it: shapes, number kinds, entries that exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import get_args

import numpy as np

from workbench.errors import InputError
from workbench.trace import ATTENDING_TO_ALL, INDEXING, SELECTING, EngramTrace, LayerTrace, Origin, Timeline, Trace

ARRAYS = ("token_ids", "step_starts", "cache_reserved", "top_ids", "top_probs", "next_ids")  # of a trace, whatever its layers
NEEDED: dict[str, tuple[str, ...]] = {
    "window": (),
    **dict.fromkeys(SELECTING, ("selected", "selected_scores", "selected_probs")),
    **dict.fromkeys(INDEXING, ("selected", "selected_scores", "selected_probs", "index_queries", "index_weights")),
    **dict.fromkeys(ATTENDING_TO_ALL, ("entry_probs",)),
}
# The shapes and number kinds of a layer's arrays: letters as above, I index heads, D their width, E recorded columns; every
# array may be absent. A letter stands for one size within a layer, an array of half-precision floats is read as bits.
_SHAPES = {
    "window_probs": ("LHW", "half"),
    "sink_probs": ("LH", "half"),
    "selected": ("LK", "whole"),
    "selected_scores": ("LK", "real"),
    "selected_probs": ("LHK", "half"),
    "runner_up": ("L", "whole"),
    "runner_up_scores": ("L", "real"),
    "index_queries": ("LID", "real"),
    "index_weights": ("LI", "real"),
    "index_keys": ("SD", "real"),
    "entry_probs": ("LHE", "half"),
    "rows": ("LR", "whole"),
    "gates": ("LM", "real"),
    "ids": ("L", "whole"),
}
_KINDS: dict[str, Callable[[np.dtype], bool]] = {
    "half": lambda d: d == np.float16,
    "real": lambda d: d.kind == "f",
    "whole": lambda d: d.kind == "i",
}
FINITE = ("index_queries", "index_weights", "index_keys", "gates")
NOT_FINITE = 0x7C00  # the bits of a half-precision infinity; a NaN has more, less its sign


def check_loaded(trace: Trace) -> None:
    """What figures rely on, so that a foreign file fails here and not inside a picture."""
    length, steps = trace.length, trace.steps
    if type(trace.prompt_length) is not int or not 0 <= trace.prompt_length <= length:
        raise InputError(f"a trace of {length} tokens has prompt_length {trace.prompt_length!r:.40}")
    if len(trace.token_texts) < length or not set(map(type, trace.token_texts)) <= {str}:
        raise InputError(
            f"a trace of {length} tokens has a text for each, got {len(trace.token_texts)}, or one that is no text"
        )
    if not isinstance(trace.config, dict) or not isinstance(trace.notes, dict):
        raise InputError("config and notes of a trace are objects; save it again")
    strange = [name for name in ("model", "what", "device", "storage") if not isinstance(getattr(trace, name), str)]
    if strange:
        raise InputError(f"{strange[0]} of a trace is text, got {getattr(trace, strange[0])!r:.40}")
    _check_timeline(trace.timeline)
    per_step = {name: getattr(trace, name) for name in ARRAYS if name != "token_ids"}
    per_step |= {f"cache.{part}": held for part, held in trace.cache_bytes.items()}
    for name, held in {"token_ids": trace.token_ids, **per_step}.items():
        kind = "real" if name == "top_probs" else "whole"
        sides, rows = (2 if name.startswith("top_") else 1), length if name == "token_ids" else steps
        if kind == "real" and not np.isfinite(held).all():
            raise InputError(f"{name} of a trace holds what is no finite number")
        may_lack = name not in ("token_ids", "step_starts") and not name.startswith("cache.") and len(held) == 0
        if held.ndim != sides or not _KINDS[kind](held.dtype) or (len(held) != rows and not may_lack):
            raise InputError(f"{name} of a trace of {steps} steps has the shape {list(held.shape)} of {held.dtype}")
    starts = trace.step_starts
    if length and steps and (starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= length):
        raise InputError(f"the steps of a trace begin one after the other within its {length} tokens, the first with token 0")
    for layer in trace.layers:
        if layer.kind not in NEEDED or type(layer.layer) is not int or type(layer.ratio) is not int or layer.layer < 0:
            raise InputError(f"layer {layer.layer!r:.40} of kind {layer.kind!r:.40}, ratio {layer.ratio!r:.40} is not known")
        needed = ("selected",) if layer.selection_only and not layer.heads else NEEDED[layer.kind]
        missing = [name for name in needed if getattr(layer, name) is None]
        if missing or (layer.ratio < 1) != (layer.kind == "window"):
            raise InputError(f"layer {layer.layer} ({layer.kind}, ratio {layer.ratio}) lacks {missing or 'a ratio'}")
    if len({layer.layer for layer in trace.layers}) < len(trace.layers):
        raise InputError("a trace has each layer once")
    records: tuple[LayerTrace | EngramTrace, ...] = (*trace.layers, *trace.engram)
    for record in records:
        sizes = {"L": length}
        if isinstance(record, LayerTrace):
            sizes |= {"S": record.entries}
        for name, value in ((f.name, getattr(record, f.name)) for f in fields(record)):
            if isinstance(value, np.ndarray):
                _check_array(f"layer {record.layer}: {name}", value, *_SHAPES[name], sizes)
        if isinstance(record, LayerTrace):
            for name in ("selected", "runner_up"):
                value = getattr(record, name)
                if value is not None and value.size and not -1 <= value.min() <= value.max() < max(1, record.entries):
                    raise InputError(f"layer {record.layer}: {name} names entries beyond its {record.entries}")


def _check_timeline(timeline: Timeline) -> None:
    origins = get_args(Origin)
    texts = [timeline.device, timeline.note, *(text for s in timeline.spans for text in (s.lane, s.name, *s.after))]
    named = timeline.origin in origins and all(s.origin in origins for s in timeline.spans)
    if not named or not all(isinstance(x, str) for x in texts) or not all(type(s.step) is int for s in timeline.spans):
        raise InputError(f"spans have names, whole steps and an origin ({', '.join(origins)}); save the trace again")


def _check_array(name: str, value: np.ndarray, letters: str, kind: str, sizes: dict[str, int]) -> None:
    if value.ndim != len(letters) or not _KINDS[kind](value.dtype):
        raise InputError(f"{name} has {value.ndim} sides of {value.dtype}; expected [{', '.join(letters)}], {kind} numbers")
    for letter, side in zip(letters, value.shape, strict=True):
        if sizes.setdefault(letter, side) != side:
            if letter == "L":
                raise InputError(f"{name} has {side} rows for {sizes['L']} tokens")
            raise InputError(f"{name} has the shape {list(value.shape)}, but {letter} is {sizes[letter]}")
    if name.split(": ")[1] in FINITE and not np.isfinite(value).all():
        raise InputError(f"{name} holds what is no finite number")
    if kind == "half" and value.size and int((value.view(np.uint16) & 0x7FFF).max()) >= NOT_FINITE:
        raise InputError(f"{name} holds probabilities that are no finite numbers")
