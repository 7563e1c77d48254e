"""What a run recorded: plain numpy arrays and spans. Knows nothing of torch, models, figures or widgets.

One letter sizes: L tokens, H heads, W window, K kept entries, S compressed entries, N steps, R Engram rows per token,
M mHC streams. A *step* is one call of the model: a prefill chunk or one decoded token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from workbench.errors import InputError
from workbench.intervals import length, union
from workbench.scoring import index_scores

Origin = Literal["measured", "modelled", "recorded"]
# Beyond this many tokens of context a row over all entries is max-pooled, so that memory grows with L and never with L x L.
FULL_ROW_TOKENS = 2048
ROW_VALUES = 2**24  # and a head's rows over all entries together hold at most about this many values, however long the text
# Kinds of attention layers. Those that keep a few entries for each query, and of these the ones that choose for themselves;
# those that attend to every entry. In MLA, GQA and MHA, and in V3.2's selection, an entry is a token.
SELECTING = ("csa", "csa2-full", "csa2-reindex", "csa2-reuse", "mla-dsa")
INDEXING = ("csa", "csa2-full", "csa2-reindex", "mla-dsa")
ATTENDING_TO_ALL = ("hca", "mla", "gqa", "mha")
FETCHING = ("lookup", "transfer")  # lanes on which Engram rows are on their way
OVERLAPPING = "csa"  # its entries are made from two blocks of tokens, their own and the one before


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work on one lane; times are seconds since the run began."""

    lane: str  # "compute", "transfer", "lookup", "stall", "ids", or a stream's name in an imported trace
    name: str
    step: int
    start_s: float
    end_s: float
    origin: Origin = "measured"
    after: tuple[str, ...] = ()  # names of the spans it had to wait for

    def __post_init__(self) -> None:
        if not 0.0 <= self.start_s <= self.end_s < float("inf"):
            raise InputError(f"span {self.name!r} runs from {self.start_s} s to {self.end_s} s")


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans on one clock; ``device`` says where they were measured, ``note`` what a reader must know about them."""

    origin: Origin
    spans: tuple[Span, ...]
    device: str = ""
    note: str = ""

    def of_step(self, step: int) -> Timeline:
        return Timeline(self.origin, tuple(s for s in self.spans if s.step == step), self.device, self.note)

    @property
    def lookup_s(self) -> float:
        return sum(s.end_s - s.start_s for s in self.spans if s.lane == "lookup")

    @property
    def stall_s(self) -> float:
        """Seconds the compute lane stood still because rows were not there yet."""
        return sum(s.end_s - s.start_s for s in self.spans if s.lane == "stall")

    @property
    def hidden_fraction(self) -> float:
        """1 - stall / fetch, the share of the fetching that compute covered; NaN without any."""
        return 1.0 - self.stall_s / self.fetch_s if self.fetch_s > 0 else float("nan")

    @property
    def fetch_s(self) -> float:
        """Seconds in which rows were on their way, looked up or copied: ``lookup_s`` where there is no link to cross."""
        fetching = [s for s in self.spans if s.lane in FETCHING]
        return length(union(np.array([s.start_s for s in fetching]), np.array([s.end_s for s in fetching])))

    def origins(self) -> list[Origin]:
        """Of each span. "measured" is what a span says by default, so where none says more the timeline speaks for all."""
        plain = all(s.origin == "measured" for s in self.spans)
        return [self.origin if plain else s.origin for s in self.spans]

    def dependencies(self) -> list[tuple[Span, Span]]:
        """Each span with those it had to wait for, cause first, by the names in ``after``: of a step's spans of that name the
        last that began no later, or while it lasted (a stall ends with its cause), or one of another step if only one span
        has the name. Absent names give nothing.
        """
        named: dict[Any, list[Span]] = {}
        for span in sorted(self.spans, key=lambda s: s.start_s):
            named.setdefault((span.step, span.name), []).append(span)
            named.setdefault(span.name, []).append(span)
        pairs = []
        for span in self.spans:
            for name in span.after:
                alone = named.get(name, [])
                known = named.get((span.step, name)) or (alone if len(alone) == 1 else [])
                others = [s for s in known if s is not span]
                place = bisect_right(others, span.start_s, key=lambda s: s.start_s)
                place = place or bisect_right(others, span.end_s, key=lambda s: s.start_s)
                if place:
                    pairs.append((others[place - 1], span))
        return pairs


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """What one attention layer did for each of L query tokens (batch entry 0).

    ``window_probs`` [L, H, W] float16: column w is token t - W + 1 + w, the last one the query itself; 0 before token 0; W is 0
    in layers without a window. ``sink_probs`` [L, H] float16, 0 where there is no sink.
    Layers that select (``SELECTING``): ``selected`` [L, K] int32 entries, best first, -1 where none was left;
    ``selected_scores`` [L, K] float32 index scores; ``selected_probs`` [L, H, K] float16; ``runner_up`` [L] int32 and
    ``runner_up_scores`` [L] float32, the best entry that was not kept (-1, NaN if none). Those that choose for themselves
    (``INDEXING``): ``index_queries`` [L, Hi, Di], ``index_weights`` [L, Hi], ``index_keys`` [S, Di], from which any row of
    scores is recomputed (``index_scores``). Layers that attend to all (``ATTENDING_TO_ALL``): ``entry_probs`` [L, H, E]
    float16 over all entries; column c of row t is the maximum over entries c * p .. c * p + p - 1 with
    p = ``entry_pooling(t)``, which is 1 up to 2,048 tokens of context (less in long traces of layers with an entry a token).
    Where an entry is a token (MLA, GQA, MHA and V3.2's selection) there is neither window nor sink.
    Of a model that runs on a server only the choice is known (``selection_only``): ``selected`` is there, in the server's
    order, H and W are 0 and everything else is None.
    """

    layer: int
    kind: str
    ratio: int
    window_probs: np.ndarray
    sink_probs: np.ndarray
    selected: np.ndarray | None = None
    selected_scores: np.ndarray | None = None
    selected_probs: np.ndarray | None = None
    runner_up: np.ndarray | None = None
    runner_up_scores: np.ndarray | None = None
    index_queries: np.ndarray | None = None
    index_weights: np.ndarray | None = None
    index_keys: np.ndarray | None = None
    entry_probs: np.ndarray | None = None

    @property
    def length(self) -> int:
        return self.window_probs.shape[0]

    @property
    def heads(self) -> int:
        return self.window_probs.shape[1]

    @property
    def window(self) -> int:
        return self.window_probs.shape[2]

    @property
    def selects(self) -> bool:
        """True where each query keeps a few entries, False where it attends to all of them or has none."""
        return self.kind in SELECTING

    @property
    def selection_only(self) -> bool:
        """True where nothing but the kept entries is known: no probabilities, no scores, neither window nor sink."""
        return self.selected is not None and self.selected_probs is None

    @property
    def indexes(self) -> bool:
        """True where the layer scores entries itself; V4.1's reusing layers take another layer's choice."""
        return self.kind in INDEXING

    @property
    def attends_to_all(self) -> bool:
        return self.kind in ATTENDING_TO_ALL

    @property
    def of_tokens(self) -> bool:
        """True where an entry is a token itself, not made from tokens beside a window of them."""
        return self.ratio == 1 and not self.window

    @property
    def has_sink(self) -> bool:
        return bool(self.sink_probs.any())

    def has_sink_at(self, t: int) -> bool:
        """Whether the sink got anything from query ``t``, as it always does where there is one."""
        return bool(self.sink_probs[t].any())

    @property
    def entries(self) -> int:
        """Entries complete at the end of the trace."""
        return self.length // self.ratio if self.ratio else 0

    def visible_entries(self, t: int) -> int:
        """How many entries are complete before the output of token ``t``: floor((t + 1) / ratio)."""
        return (t + 1) // self.ratio if self.ratio else 0

    def entry_tokens(self, entry: int) -> tuple[int, int]:
        """First and last source token of an entry; CSA's overlapping compressor also reads the block before its own."""
        if not 0 <= entry < self.entries:
            raise InputError(f"layer {self.layer} has entries 0..{self.entries - 1}, got {entry}")
        first = entry * self.ratio
        return max(0, first - self.look_back), first + self.ratio - 1

    @property
    def look_back(self) -> int:
        """Tokens before its own block that an entry is made from too."""
        return self.ratio if self.kind == OVERLAPPING else 0

    def entries_of(self, token: int) -> tuple[int, ...]:
        """The entries that ``token`` goes into, whether complete yet or not."""
        return entries_of(self.kind, self.ratio, token)

    def entry_pooling(self, t: int) -> int:
        return entry_pooling(t, row_tokens(self.length, self.ratio))

    def pooled_alike_until(self, t: int) -> int:
        """The first query after ``t`` whose row was pooled more."""
        width = row_tokens(self.length, self.ratio)
        return width * entry_pooling(t, width)

    def index_scores(self, t: int) -> np.ndarray:
        """All index scores of query ``t`` over its visible entries, [visible] float32, recomputed from recorded q, w, k.

        I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s])   (DeepSeek-V4 lightning indexer, reference section 2.2)
        """
        if self.index_queries is None or self.index_weights is None or self.index_keys is None:
            raise InputError(f"layer {self.layer} is a {self.kind} layer and has no lightning indexer; choose another layer")
        return index_scores(self.index_queries[t], self.index_weights[t], self.index_keys[: self.visible_entries(t)])


def entries_of(kind: str, ratio: int, token: int) -> tuple[int, ...]:
    """The entries of a layer that ``token`` goes into; none in a layer with a window alone."""
    if not ratio:
        return ()
    own = token // ratio
    return (own, own + 1) if kind == OVERLAPPING else (own,)


def row_tokens(length: int, ratio: int) -> int:
    """Tokens' worth of entries in a recorded row at most: 2,048, halved while the rows of ``length`` tokens are too many.

    Only layers with an entry for every token, or nearly, are ever cut: beyond 8,192 tokens at a ratio of 1.
    """
    width = FULL_ROW_TOKENS
    while length * width > ROW_VALUES * ratio and width > 1:
        width //= 2
    return width


def entry_pooling(t: int, width: int = FULL_ROW_TOKENS) -> int:
    """Entries per recorded column for query ``t``: the power of two that keeps a row within ``width`` tokens' worth of them."""
    pooling = 1
    while pooling * width < t + 1:
        pooling *= 2
    return pooling


@dataclass(frozen=True, slots=True)
class EngramTrace:
    """Rows fetched and gates applied by one Engram layer: ``rows`` [L, R] int64, order by order; ``gates`` [L, M] float16.

    ``ids`` [L] int32: the canonical ids that were hashed, negative where a token is masked; ``pad`` is the one that stands for
    what lies before the text or behind a masked token. Older recordings lack both (None, -1).
    """

    layer: int
    rows: np.ndarray
    gates: np.ndarray
    ids: np.ndarray | None = None
    pad: int = -1


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)  # compared by identity: widgets of one trace share a session
class Trace:
    """Everything one run recorded. ``save`` and ``load`` keep it in a folder of plain arrays and JSON, never code.

    ``what`` is the label every picture shows ("toy, trained", "true size, random weights"), ``origin`` whether it was
    measured in this session, or loaded ("recorded"). ``step_starts`` [N] first token of each step; ``cache_bytes`` maps part
    to bytes held after each step [N], ``cache_reserved`` [N] the room beyond them. ``top_ids`` / ``top_probs`` [N, 5], or all
    of a smaller vocabulary: the model's best guesses for the token after each step; ``next_ids`` [N] the token that followed,
    -1 if none was chosen.
    """

    model: str
    what: str
    device: str
    config: dict[str, Any]
    token_ids: np.ndarray  # [L] int32
    token_texts: tuple[str, ...]
    prompt_length: int
    layers: tuple[LayerTrace, ...] = ()
    engram: tuple[EngramTrace, ...] = ()
    timeline: Timeline = Timeline("measured", ())
    step_starts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    cache_bytes: dict[str, np.ndarray] = field(default_factory=dict)
    cache_reserved: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    top_ids: np.ndarray = field(default_factory=lambda: np.zeros((0, 5), np.int32))
    top_probs: np.ndarray = field(default_factory=lambda: np.zeros((0, 5), np.float32))
    next_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    storage: str = "fp32"
    origin: Origin = "measured"
    notes: dict[str, Any] = field(default_factory=dict)  # plain values, e.g. where the needle was hidden

    @property
    def length(self) -> int:
        """Tokens the model has processed; ``token_texts`` may hold one more, chosen and not yet fed back."""
        return int(self.token_ids.shape[0])

    @property
    def steps(self) -> int:
        return int(self.step_starts.shape[0])

    def step_end(self, step: int) -> int:
        """Tokens in the cache after ``step``."""
        return int(self.step_starts[step + 1]) if step + 1 < self.steps else self.length

    def step_of_token(self, t: int) -> int:
        """The step that processed token ``t``."""
        return int(np.searchsorted(self.step_starts, t, side="right")) - 1

    def token_text(self, t: int) -> str:
        """The text of token ``t``; InputError where a trace made by hand has none."""
        text = self.token_texts[t] if t < len(self.token_texts) else None
        if not isinstance(text, str):
            raise InputError(f"a trace of {self.length} tokens has a text for each; that of token {t} is {text!r:.40}")
        return text

    def layer(self, number: int) -> LayerTrace:
        if isinstance(number, int | np.integer):
            for layer in self.layers:
                if layer.layer == number:
                    return layer
        raise InputError(f"trace has layers {[layer.layer for layer in self.layers]}, got {number!r:.60}")

    def chooser(self, number: int) -> LayerTrace | None:
        """The layer whose indexer chose the entries of layer ``number``: itself, or for V4.1's reusing layers the last one
        before it that has an indexer; None where nothing is chosen or that layer was not recorded.
        """
        layer = self.layer(number)
        if not layer.selects:
            return None
        before = [x for x in self.layers if x.layer <= number and x.index_queries is not None]
        return max(before, key=lambda x: x.layer, default=None)

    @property
    def label(self) -> str:
        named = f"{self.model} ({self.what}), {self.origin} on {self.device}"
        return named.encode(errors="replace").decode()  # half a character cannot be sent to a page

    def save(self, folder: str | Path, *, half: bool = False) -> Path:
        """Write ``trace.json`` and ``arrays.npz`` into ``folder`` (made if missing) and return it.

        ``half=True`` keeps indexer queries and keys in float16, for small traces that ship; recomputed scores then agree
        to about 1e-3.
        """
        from workbench.trace_files import save

        return save(self, folder, half=half)

    @classmethod
    def load(cls, folder: str | Path) -> Trace:
        """Read what ``save`` wrote: a folder, or the name of a shipped trace where no folder has that name.

        A missing, truncated, altered or foreign folder and an unknown name raise one InputError.
        """
        from workbench.trace_files import load

        return load(folder)

    @classmethod
    def from_capture(
        cls,
        file: str | Path,
        preset: Any = None,
        *,
        layers: Sequence[int] | None = None,
        prompt: str | Sequence[int] | None = None,
        tokenizer: Any = None,
    ) -> Trace:
        """The selections of a real model, from what `wb.capture` or a server's answer holds: no probabilities, no scores.

        ``preset`` is the model the server runs: a name, a Preset or a configuration (default: the one noted in the file).
        ``layers`` keeps some of the layers that choose. More than 256 MiB is decoded once into files beside the capture and
        mapped. ``prompt`` (as sent) and ``tokenizer`` (the model's tokenizer.json) give the tokens where the file lacks them.
        Raises InputError for a file of another model or shape, and for what does not fit, saying what to choose.
        """
        from workbench.captures import trace_of

        return trace_of(file, preset, layers=layers, prompt=prompt, tokenizer=tokenizer)


def stored_origin(origin: Origin) -> Origin:
    """What a saved measurement is called when it comes back; what was modelled stays modelled."""
    return "modelled" if origin == "modelled" else "recorded"
