"""Two recordings of the same tokens, one minus the other: by layer how far attention moved, and how many entries stayed.

Letters: L tokens, H heads, W window, K kept entries, N steps, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workbench.errors import InputError
from workbench.trace import LayerTrace, Trace

TOGETHER = 256  # queries compared at once
LEAST = 1e-30  # of a probability in a logarithm
ROUNDING = 1e-6  # of probabilities that add up to 1


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """One layer of two recordings, over all queries and heads.

    ``moved`` is half of what |b - a| adds up to (0: nothing moved, 1: all attention is elsewhere), ``mean_abs`` the mean
    |b - a| of the places (window tokens, entries, sink) that a query attends to in either, ``largest`` the largest of them.
    Where entries are chosen, ``common`` is the share of those that ``a`` kept which ``b`` kept too, over queries that leave
    something out; else None.
    """

    layer: int
    kind: str
    moved: float
    mean_abs: float
    largest: float
    common: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two recordings compared. ``kl_nats`` is KL(a || b) of the next token, on average over ``kl_tokens`` tokens; with
    ``kl_at_least`` only the likeliest guesses are known, whose KL is a lower bound. None where nothing is known of it."""

    layers: tuple[LayerDifference, ...]
    kl_nats: float | None
    kl_tokens: int
    kl_at_least: bool
    labels: tuple[str, str]


def settings_label(trace: Trace) -> str:
    """The recording and what about it may differ from another of the same tokens."""
    topk = trace.notes.get("topk")
    return f"{trace.label}{f', top-{topk}' if isinstance(topk, int) else ''}, cache {trace.storage}"


def check_alike(a: Trace, b: Trace) -> None:
    """Raises InputError, saying what differs, unless both recordings are of the same tokens and of layers of one kind."""
    if strange := [x for x in (a, b) if not isinstance(x, Trace)]:
        raise InputError(f"two recordings (wb.Trace) are compared, got {strange[0]!r:.60}")
    if not a.length or not b.length:
        raise InputError("a recording without tokens cannot be compared; read a text first")
    if a.length != b.length:
        raise InputError(f"the recordings have {a.length} and {b.length} tokens; compare two of the same text")
    if (unlike := np.flatnonzero(a.token_ids != b.token_ids)).size:
        at = int(unlike[0])
        texts = a.token_texts[at], b.token_texts[at]
        raise InputError(f"the recordings differ from token {at} on: {texts[0]!r} and {texts[1]!r}; compare two of one text")
    ours, theirs = ({x.layer: x for x in trace.layers} for trace in (a, b))
    if ours.keys() != theirs.keys():
        raise InputError(f"the recordings have layers {sorted(ours)} and {sorted(theirs)}; compare two of one model")
    for number, one in ours.items():
        other = theirs[number]
        shapes = [(x.kind, x.ratio, x.heads) for x in (one, other)]
        if shapes[0] != shapes[1]:
            said = ["{}, ratio {}, {} heads".format(*shape) for shape in shapes]
            raise InputError(f"layer {number} is {said[0]} in one recording and {said[1]} in the other; compare like models")
        if one.selection_only or other.selection_only:
            raise InputError(f"layer {number} comes from a capture, which has no probabilities; compare recordings of models")


def compare_runs(a: Trace, b: Trace, logits: tuple[np.ndarray, np.ndarray] | None = None) -> Comparison:
    """By layer how far the attention of ``b`` lies from that of ``a``, and how far the next token's distribution does.

    ``logits`` of both, each [L, V] or as many last tokens as there are, make the KL exact; without them the guesses recorded
    after each step give a lower bound. InputError as in ``check_alike``, and for logits of unequal shapes.
    """
    check_alike(a, b)
    layers = tuple(_compare(one, b.layer(one.layer)) for one in a.layers)
    if logits is None:
        kl, exact = _kl_of_guesses(a, b)
    else:
        kl, exact = _kl(*logits), True
    labels = (settings_label(a), settings_label(b))
    return Comparison(layers, float(kl.mean()) if len(kl) else None, len(kl), not exact, labels)


def _compare(one: LayerTrace, other: LayerTrace) -> LayerDifference:
    moved, places, largest = 0.0, 0, 0.0
    window = max(one.window, other.window)
    for start in range(0, one.length, TOGETHER):
        rows = slice(start, start + TOGETHER)
        parts = [_widened(one, rows, window), _widened(other, rows, window)]
        sinks = [x.sink_probs[rows].astype(np.float32)[..., None] for x in (one, other)]
        entries = [_entries(x, other if x is one else one, rows) for x in (one, other)]
        for p, q in zip(*((near, sink, far) for near, sink, far in zip(parts, sinks, entries, strict=True)), strict=True):
            change = np.abs(q - p)
            moved += float(change.sum())
            places += int(((p > 0) | (q > 0)).sum())
            largest = max(largest, float(change.max(initial=0)))
    queries = one.length * one.heads
    return LayerDifference(one.layer, one.kind, moved / 2 / queries, moved / max(1, places), largest, _common(one, other))


def _widened(layer: LayerTrace, rows: slice, window: int) -> np.ndarray:
    """Window probabilities of ``rows`` [n, H, window], the newest token last."""
    near = layer.window_probs[rows].astype(np.float32)
    return np.pad(near, ((0, 0), (0, 0), (window - near.shape[2], 0)))


def _entries(layer: LayerTrace, beside: LayerTrace, rows: slice) -> np.ndarray:
    """Entry probabilities in an order that both layers have: their own columns, or where entries are chosen K + K' places,
    the entries of the first recording and, behind them, those that only the second kept."""
    if layer.entry_probs is not None:
        return layer.entry_probs[rows].astype(np.float32)
    assert layer.selected is not None or not layer.ratio
    if layer.selected is None or beside.selected is None or layer.selected_probs is None:
        return np.zeros((len(layer.window_probs[rows]), layer.heads, 0), np.float32)
    return _by_entry(layer, beside, rows)


def _by_entry(layer: LayerTrace, beside: LayerTrace, rows: slice) -> np.ndarray:
    """[n, H, K + K']: probabilities by the sorted entries of both, an entry that both kept having the first of its places."""
    assert layer.selected is not None and beside.selected is not None and layer.selected_probs is not None
    mine, theirs = layer.selected[rows], beside.selected[rows]
    places = np.sort(np.concatenate([mine, theirs], axis=1), axis=1)  # the same for both layers
    most = int(max(places.max(initial=0), 0)) + 2
    base = np.arange(len(mine))[:, None] * most + 1
    order = (places + base).reshape(-1)
    at = np.searchsorted(order, (mine + base).reshape(-1)).reshape(mine.shape) - np.arange(len(mine))[:, None] * places.shape[1]
    out = np.zeros((len(mine), layer.heads, places.shape[1]), np.float32)
    probs = np.where((mine >= 0)[:, None], layer.selected_probs[rows].astype(np.float32), 0.0)
    row, head, _ = np.ogrid[: out.shape[0], : out.shape[1], : probs.shape[2]]
    np.add.at(out, (row, head, at[:, None]), probs)  # several -1 share a place, and are 0
    return out


def _common(one: LayerTrace, other: LayerTrace) -> float | None:
    if one.selected is None or other.selected is None:
        return None
    visible = np.array([one.visible_entries(t) for t in range(one.length)])
    kept = (one.selected >= 0).sum(1)
    choosing = np.flatnonzero((kept > 0) & ((visible > kept) | (visible > (other.selected >= 0).sum(1))))
    if not len(choosing):
        return None
    common = common_entries(one.selected[choosing], other.selected[choosing])
    return float((common / kept[choosing]).mean())


def common_entries(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """How many of the entries [N, K] and [N, M] of each row are the same, [N]; a row has each once, -1 is none."""
    most = int(max(ours.max(initial=0), theirs.max(initial=0))) + 1
    row = np.arange(len(ours), dtype=np.int64)[:, None]
    mine, known = ((row * most + each)[each >= 0] for each in (ours, theirs))
    both = np.isin(mine, known, assume_unique=True)  # sorts, which is many times faster here than looking for unique ones
    return np.bincount(mine[both] // most, minlength=len(ours))


def _kl(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """KL(a || b) of logits [N, V], in nats, [N]."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    if ours.ndim != 2 or ours.shape != theirs.shape:
        raise InputError(f"logits must be two arrays [tokens, words] of one shape, got {ours.shape} and {theirs.shape}")
    p, q = (x - x.max(1, keepdims=True) for x in (ours, theirs))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return np.asarray(np.maximum((np.exp(p) * (p - q)).sum(1), 0.0))


def _kl_of_guesses(a: Trace, b: Trace) -> tuple[np.ndarray, bool]:
    """After each step that ends at one token in both: KL over the words that both guessed and one for all others, [N]; and
    whether these are all words. Lumping words together never makes a KL larger, so it is a lower bound."""
    ends = [{trace.step_end(step): step for step in range(trace.steps) if step < len(trace.top_ids)} for trace in (a, b)]
    found, exact = [], True
    for end in sorted(ends[0].keys() & ends[1].keys()):
        ours, theirs = (
            dict(zip(t.top_ids[e[end]].tolist(), t.top_probs[e[end]].tolist(), strict=True))
            for t, e in zip((a, b), ends, strict=True)
        )
        both = sorted(ours.keys() & theirs.keys())
        p, q = (np.array([of[i] for i in both], np.float64) for of in (ours, theirs))
        rest = np.array([max(0.0, 1 - p.sum()), max(0.0, 1 - q.sum())])
        exact &= bool(rest.max() < ROUNDING)
        p, q = np.append(p, rest[0]), np.append(q, max(rest[1], ROUNDING))
        seen = p > 0
        found.append(max(0.0, float((p[seen] * np.log(p[seen] / np.maximum(q[seen], LEAST))).sum())))
    return np.array(found), exact and bool(found)
