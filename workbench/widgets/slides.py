"""What the demos show: each slide a title, a sentence or two with computed numbers, a picture, and notes for the presenter.

Pictures are the notebooks' own widgets on recorded runs. A slide with a subject can be run live; the others show formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ipywidgets as ipw

from workbench import cost
from workbench.presets import presets
from workbench.trace import LayerTrace, Trace
from workbench.widgets.session import Session

MILLION = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A recording, and the run that takes its place live: a model, a needle hidden in its text, tokens to generate."""

    trace: str  # a shipped one
    model: str
    key: str
    value: str
    depth: float
    tokens: int
    new_tokens: int


SUBJECTS = {
    "needle": Subject(trace="needle", model="tiny-v4", key="river", value="52", depth=0.4, tokens=320, new_tokens=1),
    "growth": Subject(trace="growth", model="tiny-v4-engram", key="river", value="64", depth=0.2, tokens=100, new_tokens=41),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Slide:
    """``said`` gets the subject's trace, recorded or live, ``view`` its session; without a subject both get None.

    Slides with the same ``view`` and subject share one widget.
    """

    title: str
    said: Callable[[Any], str]
    view: Callable[[Any], ipw.Widget]
    notes: str
    subject: str | None = None
    layer: int | None = None  # to look at; otherwise the one the recording opens on


def _attention(session: Session) -> ipw.Widget:
    from workbench.widgets.attention import AttentionExplorer

    return AttentionExplorer(session)


def _answer(session: Session) -> ipw.Widget:
    from workbench.widgets.needle import NeedleAnswer

    return NeedleAnswer(session.trace)


def _slots(session: Session) -> ipw.Widget:
    from workbench.widgets.caches import CacheSlots

    return CacheSlots(session)


def _growth(session: Session) -> ipw.Widget:
    from workbench.widgets.memory import KVCacheGrowth

    return KVCacheGrowth(session)


def _engram(session: Session) -> ipw.Widget:
    from workbench.widgets.engram import EngramExplorer

    return EngramExplorer(session)


def _timeline(session: Session) -> ipw.Widget:
    from workbench.widgets.timeline import TimelineView

    return TimelineView(session)


def _held(_: None) -> ipw.Widget:
    from workbench.widgets.caches import HeldAndRead

    return HeldAndRead()


def _shares(_: None) -> ipw.Widget:
    from workbench.caches import modelled_cache
    from workbench.figures.caches import read_shares
    from workbench.widgets.caches import COMPARED
    from workbench.widgets.render import as_output

    figure = read_shares([modelled_cache(name, MILLION, "released") for name in COMPARED])
    return ipw.Output(outputs=(as_output(figure),))


def _meters(_: None) -> ipw.Widget:
    from workbench.widgets.claims import MemoryMeters

    return MemoryMeters()


def _claims(_: None) -> ipw.Widget:
    from workbench.claims import article_claims
    from workbench.widgets.claims import ClaimsTable

    return ClaimsTable(article_claims())


def _what_if(_: None) -> ipw.Widget:
    from workbench.widgets.whatif import OverlapWhatIf

    return OverlapWhatIf()


def _words(_: None) -> ipw.Widget:
    from workbench.widgets.glossary import GlossarySearch

    return GlossarySearch()


def _selecting(trace: Trace) -> LayerTrace:
    return next(layer for layer in trace.layers if layer.indexes)


def _say_needle(trace: Trace) -> str:
    layer = _selecting(trace)
    return (
        f"A code is hidden in {trace.length} tokens of text; the window holds {layer.window}. "
        f"A CSA layer keeps one entry for {layer.ratio} tokens, and its indexer picks the few to attend to."
    )


def _say_answer(trace: Trace) -> str:
    layer = _selecting(trace)
    kept = layer.selected.shape[1] if layer.selected is not None else 0
    return f"Of {layer.entries} entries the query keeps {kept}. The table says where the needle's entry ranked, beside luck."


def _say_window(trace: Trace) -> str:
    layer = trace.layers[0]
    return f"This layer has a window alone: {layer.window} tokens, and nothing older. The needle is out of its sight."


def _say_coarse(trace: Trace) -> str:
    layer = next(layer for layer in trace.layers if layer.attends_to_all)
    return (
        f"An HCA layer folds {layer.ratio} tokens into an entry, {layer.entries} in this text, and attends to all of them: "
        "no indexer."
    )


def _say_slots(trace: Trace) -> str:
    layer = _selecting(trace)
    return (
        f"A ring of {layer.window} tokens, an open block, and an entry whenever {layer.ratio} tokens are full. "
        "Move the token and watch a block close."
    )


def _say_growth(trace: Trace) -> str:
    end = trace.steps - 1
    held = sum(int(part[end]) for part in trace.cache_bytes.values())
    return f"After {trace.length} tokens the cache of this toy holds {held:,} bytes. It does not grow evenly: blocks close."


def _say_held(_: None) -> str:
    flash, dense = (cost.kv_bytes(name, MILLION)["total"] / 1e9 for name in ("v4-flash", "gqa-8"))
    layers = len(presets["gqa-8"].layer_kinds)
    return (
        f"At {MILLION:,} tokens V4-Flash holds {flash:.1f} GB for one sequence, a dense GQA-8 baseline of {layers} layers "
        f"{dense:,.0f} GB. Modelled, by formula."
    )


def _say_shares(_: None) -> str:
    reads = cost.decode_bytes("v4-flash", MILLION)
    return (
        f"Reading decides the speed of decoding. Of what a token of V4-Flash reads from its cache at {MILLION:,} tokens, "
        f"{reads['index'] / reads['total']:.0%} are index keys. Modelled, by formula."
    )


def _say_engram(trace: Trace) -> str:
    layers = ", ".join(str(memory.layer) for memory in trace.engram)
    return (
        f"V4 + Engram, not a released combination: in layer {layers} the last few tokens alone say which rows of a table "
        "are read. A gate says how much of them is used."
    )


def _say_timeline(trace: Trace) -> str:
    timeline = trace.timeline
    return (
        f"The rows are known early, so they can be fetched while layers compute: lookup {1e3 * timeline.lookup_s:.1f} ms, "
        f"stall {1e3 * timeline.stall_s:.1f} ms in the whole run, {timeline.origin}. The toy's table is too small to matter."
    )


def _say_meters(_: None) -> str:
    weights = presets["v4.1-flash"].weights
    moved = weights.host_bytes / 1e9 if weights else 0.0
    return (
        f"Engram moves {moved:,.0f} GB of V4.1-Flash's weights to host memory. That frees room on the device; "
        "the KV cache itself stays as it is."
    )


def _fixed(text: str) -> Callable[[Any], str]:
    return lambda _: text


_NEEDLE = Slide(
    title="One sentence in a long text",
    said=_say_needle,
    view=_attention,
    subject="needle",
    notes="Point at the tall bar: that entry holds the code. Then at the text below: those are its tokens. The band in the map "
    "is the window, the wedge beside it the entries. Go live hides another code at another place.",
)
_ANSWER = Slide(
    title="Did it find the code, or was it luck?",
    said=_say_answer,
    view=_answer,
    subject="needle",
    notes="One layer that finds it is enough: from there on the code is in the residual streams. Ask the room what the chance "
    "column means before you say it.",
)
_WINDOW = Slide(
    title="What a window alone can see",
    said=_say_window,
    view=_attention,
    layer=0,
    subject="needle",
    notes="A narrow band and nothing else. Ask: how could a model with this layer alone answer the question?",
)
_COARSE = Slide(
    title="Coarse entries: HCA",
    said=_say_coarse,
    view=_attention,
    layer=2,
    subject="needle",
    notes="The staircase: a new entry only when a whole block is full. Compare the number of columns with the CSA layer's.",
)
_SLOTS = Slide(
    title="What lies in the cache",
    said=_say_slots,
    view=_slots,
    subject="needle",
    notes="Move the token one on with the arrow keys of the slider: at the block's end the tail empties and an entry appears.",
)
_GROWTH = Slide(
    title="How the cache grows",
    said=_say_growth,
    view=_growth,
    subject="growth",
    notes="The window is full soon and stays. The tail is what waits for its block. Go live and let it decode: the line falls "
    "when HCA closes a block.",
)
_HELD = Slide(
    title="At true size, a million tokens",
    said=_say_held,
    view=_held,
    notes="The axes are logarithmic. Move the length down to 8,192: windows and tails matter there.",
)
_SHARES = Slide(
    title="What a decoded token reads",
    said=_say_shares,
    view=_shares,
    notes="Selection saves the reading of entries, not the scan of the index. Ask what would happen at ten million tokens.",
)
_ENGRAM = Slide(
    title="Engram: a memory looked up by words",
    said=_say_engram,
    view=_engram,
    subject="growth",
    notes="Colour is the gate. Choose a token: below are its n-grams and the rows they read. Go live also measures what "
    "switching Engram off changes.",
)
_TIMELINE = Slide(
    title="What hides behind what",
    said=_say_timeline,
    view=_timeline,
    subject="growth",
    notes="Say clearly that this is a toy on a CPU. The arrows run to a span from what it had to wait for.",
)
_WHAT_IF = Slide(
    title="When does it stop hiding?",
    said=_fixed(
        "A virtual clock with published sizes and peak rates: break the overlap by layer, batch, link or drive. Modelled."
    ),
    view=_what_if,
    notes="Let the room guess before each button: Layer 1, Small batch, Huge chunk, NVMe.",
)
_METERS = Slide(
    title="Weights are not the cache",
    said=_say_meters,
    view=_meters,
    notes="Untick the box: only the second and third meter change. This is what headlines mix up.",
)
_CLAIMS = Slide(
    title="What the article says, and what holds",
    said=_fixed("Each claim with a verdict, our numbers and primary sources. Modelled numbers say so."),
    view=_claims,
    notes="Choose two claims and open their numbers. Leave the others for the notebook on claims.",
)
_WORDS = Slide(
    title="The words, once more",
    said=_fixed("Every term of today, searchable."),
    view=_words,
    notes="Let people ask for terms. This is the place for questions.",
)

SCRIPTS: dict[str, tuple[Slide, ...]] = {
    "3 minutes": (_NEEDLE, _SLOTS, _HELD),
    "10 minutes": (_NEEDLE, _ANSWER, _SLOTS, _GROWTH, _HELD, _ENGRAM, _WHAT_IF),
    "45 minutes": (
        _NEEDLE, _WINDOW, _COARSE, _ANSWER, _SLOTS, _GROWTH, _HELD, _SHARES, _ENGRAM, _TIMELINE, _WHAT_IF, _METERS, _CLAIMS,
        _WORDS,
    ),
}  # fmt: skip
