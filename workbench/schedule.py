"""The virtual clock: given how long everything takes, when does each lane work, and how long does compute stand still?

A forward pass computes its blocks one after the other. Before some of them an Engram layer needs rows, fetched in three
parts: the row numbers are hashed from the token ids, the rows gathered, and copied over the link. Nothing is measured here:
durations go in (`workbench.cost.fetch` derives them from presets, devices and links), a modelled `Timeline` comes out.

One queue serves the fetches in the order of their layers, each whole before the next begins. With fetch times T_f1, T_f2, ...
and the ids known at t0 (reference/engram-and-overlap.md, section 3):

    done_1 = t0 + T_f1      done_k = done_(k-1) + T_fk
    stall_k = max(0, done_k - start_k)      T = T_compute + sum of stall_k

start_k is when compute reaches layer k, earlier stalls included. "prefetch" does that; "serial" begins a fetch only when
compute has reached its layer; "resident" rows lie on the device already and nothing is fetched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from workbench.errors import InputError
from workbench.trace import Span, Timeline

Policy = Literal["prefetch", "serial", "resident"]
POLICIES: tuple[Policy, ...] = ("prefetch", "serial", "resident")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Seconds that the rows of one Engram layer take. ``chunked``: gather and copy go on side by side, chunk after chunk, as
    do the reads of memory and link in a kernel that fetches rows itself; the longer of the two counts instead of their sum.
    """

    layer: int  # the block that needs the rows, counted from zero
    hash_s: float = 0.0
    gather_s: float = 0.0
    link_s: float = 0.0
    chunked: bool = False

    def __post_init__(self) -> None:
        for name in ("hash_s", "gather_s", "link_s"):
            _check_seconds(f"{name} of the fetch for layer {self.layer}", getattr(self, name))

    @property
    def total_s(self) -> float:
        """T_f: until all rows are there, with the queue to itself."""
        return self.hash_s + (max(self.gather_s, self.link_s) if self.chunked else self.gather_s + self.link_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStall:
    """What became of one fetch: ``start_s`` when compute reached the layer, ``done_s`` when its rows were there."""

    fetch: Fetch
    start_s: float
    done_s: float

    @property
    def layer(self) -> int:
        return self.fetch.layer

    @property
    def stall_s(self) -> float:
        return max(0.0, self.done_s - self.start_s)

    @property
    def hidden_fraction(self) -> float:
        """1 - stall / T_f; negative where a layer also waits for the fetches before its own, NaN where nothing is fetched."""
        return 1.0 - self.stall_s / self.fetch.total_s if self.fetch.total_s > 0 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A forward pass on the virtual clock: its totals in seconds, each Engram layer's stall, and the spans to draw."""

    policy: Policy
    compute_s: float
    layers: tuple[LayerStall, ...]
    timeline: Timeline

    @property
    def stall_s(self) -> float:
        return math.fsum(x.stall_s for x in self.layers)

    @property
    def fetch_s(self) -> float:
        return math.fsum(x.fetch.total_s for x in self.layers)

    @property
    def total_s(self) -> float:
        return self.compute_s + self.stall_s

    @property
    def hidden_fraction(self) -> float:
        """1 - stall / fetch over all layers, the share of fetching that compute covered; NaN where nothing is fetched."""
        return 1.0 - self.stall_s / self.fetch_s if self.fetch_s > 0 else math.nan


def plan(
    block_s: Sequence[float],
    fetches: Sequence[Fetch],
    policy: Policy = "prefetch",
    *,
    ids_known_s: float = 0.0,
    device: str = "",
    note: str = "",
) -> Schedule:
    """One forward pass that computes ``block_s`` seconds in each block and needs the rows of ``fetches``.

    ``ids_known_s`` after compute began the token ids are where the hashing is done: a decoded token's id must first come to
    the host. ``device`` and ``note`` go to the timeline. Raises InputError for durations that are negative or not finite, for
    a layer that is no block or is given twice, and for an unknown policy.
    """
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r} is unknown; choose one of {POLICIES}")
    for block, seconds in enumerate(block_s):
        _check_seconds(f"compute of block {block}", seconds)
    _check_seconds("ids_known_s", ids_known_s)
    by_layer = {fetch.layer: fetch for fetch in fetches}
    if len(by_layer) < len(fetches) or not all(0 <= layer < len(block_s) for layer in by_layer):
        layers = [fetch.layer for fetch in fetches]
        raise InputError(f"fetches must be for different layers among 0..{len(block_s) - 1}, got layers {layers}")
    wanted = {} if policy == "resident" else by_layer

    spans = [Span("ids", "token ids", 0, 0.0, ids_known_s, "modelled")] if wanted else []
    free = ids_known_s  # when the queue is
    queued = {}
    if policy == "prefetch":
        for layer in sorted(wanted):
            queued[layer] = free
            free += wanted[layer].total_s
    now, outcomes = 0.0, []
    for layer, seconds in enumerate(block_s):
        after: tuple[str, ...] = ()
        if layer in wanted:
            fetch = wanted[layer]
            begun = queued.get(layer, max(now, free))
            outcome = LayerStall(fetch=fetch, start_s=now, done_s=begun + fetch.total_s)
            free = max(free, outcome.done_s)
            outcomes.append(outcome)
            steps = _fetch_spans(fetch, begun)
            spans += steps
            after = (steps[-1].name,)
            if outcome.stall_s > 0:
                spans.append(Span("stall", f"layer {layer} waits", 0, now, outcome.done_s, "modelled", after))
                now = outcome.done_s
        spans.append(Span("compute", f"layer {layer}", 0, now, now + seconds, "modelled", after))
        now += seconds
    about = f"policy {policy}; {note}" if note else f"policy {policy}"
    timeline = Timeline("modelled", tuple(spans), device, about)
    return Schedule(policy=policy, compute_s=math.fsum(block_s), layers=tuple(outcomes), timeline=timeline)


def _fetch_spans(fetch: Fetch, begun: float) -> list[Span]:
    """Token ids -> hash -> gather -> copy, if there is a link to cross."""
    name = f"layer {fetch.layer}"
    hashed, done = begun + fetch.hash_s, begun + fetch.total_s
    gathered = min(hashed + fetch.gather_s, done)  # equal but for rounding where there is no link
    spans = [
        Span("lookup", f"{name} hash", 0, begun, hashed, "modelled", ("token ids",)),
        Span("lookup", f"{name} gather", 0, hashed, gathered, "modelled", (f"{name} hash",)),
    ]
    if fetch.link_s > 0:
        spans.append(
            Span("transfer", f"{name} copy", 0, max(hashed, done - fetch.link_s), done, "modelled", (f"{name} gather",))
        )
    return spans


def _check_seconds(what: str, seconds: object) -> None:
    if not isinstance(seconds, Real) or not math.isfinite(seconds) or seconds < 0:
        raise InputError(f"{what} must be seconds, 0 or more, got {seconds!r}")
