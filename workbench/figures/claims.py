"""Claims as a table that reads well without colour, and two meters that people mix up: bytes of KV cache, bytes of weights."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench import cost
from workbench.claims import Claim
from workbench.claims.record import Number, with_unit
from workbench.cost import kv_bytes_per_token
from workbench.errors import InputError
from workbench.figures.memory import PART_COLOURS, PART_ORDER, PART_PATTERNS
from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, SKY, VERMILLION, chart_text, styled
from workbench.presets import Preset, presets

METERED = ("v3.2", "v4-pro", "v4-flash", "v4.1-flash")
KV_NAMES = {cost.KV_PART: "a row per token", "engram": "ids Engram looks back at"}
WEIGHT_PARTS = ("backbone", "experts", "Engram tables")
WEIGHT_COLOURS = {"backbone": GREY, "experts": VERMILLION, "Engram tables": SKY}
WEIGHT_PATTERNS = {"Engram tables": "x"}  # told apart without colour
MARKS = {
    "supported": ("✓", GREEN),
    "partly": ("◐", ORANGE),
    "not supported": ("✗", VERMILLION),
    "wrong for V4": ("✗", VERMILLION),
    "cannot be tested here": ("?", BLUE),
}

_CSS = (
    "<style>.wb-claims{overflow-x:auto;line-height:1.45;color:var(--jp-content-font-color1,inherit)}"
    ".wb-claims table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:52em;width:100%}"
    ".wb-claims caption{text-align:left;padding:4px 0}"
    ".wb-claims th,.wb-claims td{padding:6px 10px;text-align:left;vertical-align:top;white-space:normal;"
    "border-bottom:1px solid #8886}"
    ".wb-claims th[scope=row]{width:14em;font-weight:normal}.wb-claims td.v{width:8.5em}"
    ".wb-claims .mark{display:inline-block;border-left:4px solid;padding:0 0 0 6px;font-weight:bold}"
    ".wb-claims .mark span{color:var(--jp-content-font-color1,inherit)}"
    ".wb-claims details{margin-top:4px}.wb-claims summary{cursor:pointer}"
    ".wb-claims ul{margin:2px 0;padding-left:1.4em}.wb-claims small{opacity:0.85}</style>"
)


def claims_html(claims: Sequence[Claim]) -> str:
    """One table, a row a claim: what was said, the verdict, why, and what primary sources support; numbers fold out.

    All text is escaped. InputError without claims.
    """
    if not claims:
        raise InputError("give at least one claim, see wb.article_claims")
    head = "".join(
        f"<th scope='col'>{name}</th>"
        for name in ("the article says", "verdict", "because, by our numbers", "what primary sources support")
    )
    caption = "Numbers marked modelled follow from formulas and peak rates, not from a run."
    return (
        f"{_CSS}<div class='wb-claims'><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(map(_row, claims))}</tbody></table></div>"
    )


def _row(claim: Claim) -> str:
    mark, colour = MARKS[claim.verdict]
    verdict = f"<span class='mark' style='border-color:{colour}'><span>{mark} {escape(claim.verdict)}</span></span>"
    numbers = "".join(f"<li>{_number(number)}</li>" for number in claim.numbers)
    folded = f"<details><summary>{len(claim.numbers)} numbers</summary><ul>{numbers}</ul></details>"
    certainties = ", ".join(dict.fromkeys(source.certainty for source in claim.sources))
    sources = "".join(f"<li>{escape(source.text)} <small>[{escape(source.certainty)}]</small></li>" for source in claim.sources)
    cited = f"<details><summary>sources: {escape(certainties)}</summary><ul>{sources}</ul></details>"
    return (
        f"<tr><th scope='row'><b>{escape(claim.key)}</b><br>{escape(claim.said)}</th><td class='v'>{verdict}</td>"
        f"<td>{escape(claim.reason)}{folded}</td><td>{escape(claim.found)}{cited}</td></tr>"
    )


def _number(number: Number) -> str:
    return f"{escape(number.text)} <small>[{escape(number.origin)}]</small>"


def memory_meters(
    length: int, *, offloaded: bool = True, names: Sequence[str] = METERED, storage: str = "released"
) -> go.Figure:
    """Three meters: KV bytes of one sequence on the device, weight bytes on the device, and bytes in host memory.

    ``offloaded`` moves Engram tables, and nothing else, from the second meter to the third. Axes are the same either way, so
    that one can see what moves. InputError for an unknown preset, one nobody released, or a bad length or storage.
    """
    chosen = [_released(name) for name in names]
    if not chosen:
        raise InputError("give at least one preset to meter")
    titles = [preset.title.removeprefix("DeepSeek-") for preset in chosen]
    kv = [cost.kv_bytes(preset, length, storage) for preset in chosen]
    places = ("KV cache on the device", "weights on the device", "host memory")
    fig = make_subplots(rows=1, cols=3, shared_yaxes=True, subplot_titles=places, horizontal_spacing=0.05)
    fig.update_annotations(font_size=13)
    for part in (p for p in PART_ORDER if any(held.get(p) for held in kv)):
        sizes, name = [held.get(part, 0) for held in kv], f"KV: {KV_NAMES.get(part, part)}"
        _add_bars(fig, 1, titles, sizes, name, PART_COLOURS[part], PART_PATTERNS.get(part, ""))
    totals = [[float(held["total"]) for held in kv], [0.0] * len(chosen), [0.0] * len(chosen)]
    for part in WEIGHT_PARTS:
        weights = [_weight_bytes(preset)[part] for preset in chosen]
        column = 3 if part == "Engram tables" and offloaded else 2
        _add_bars(fig, column, titles, weights, part, WEIGHT_COLOURS[part], WEIGHT_PATTERNS.get(part, ""))
        totals[column - 1] = [have + more for have, more in zip(totals[column - 1], weights, strict=True)]
    heaviest = max(sum(_weight_bytes(preset).values()) for preset in chosen)
    tables = max(_weight_bytes(preset)["Engram tables"] for preset in chosen)
    for column, (sums, most) in enumerate(zip(totals, (max(totals[0]), heaviest, tables or 1e9), strict=True), start=1):
        labels = [f" {with_unit(total, 'B')}" if total else " none" for total in sums]
        fig.add_scatter(
            x=[total / 1e9 for total in sums], y=titles, text=labels, mode="text", textposition="middle right",
            hoverinfo="skip", showlegend=False, name="total", row=1, col=column,
        )  # fmt: skip
        fig.update_xaxes(title="GB", range=[0, 1.45 * most / 1e9 or 1], nticks=5, row=1, col=column)
    where = "in host memory" if offloaded else "on the device"
    of = [(_origin(preset), preset_title) for preset, preset_title in zip(chosen, titles, strict=True)]
    origins = "; ".join(f"{origin} for {', '.join(t for o, t in of if o == origin)}" for origin in dict(of))
    title = f"One sequence of {length:,} tokens, cache stored as {storage}; Engram tables {where}"
    told = f"KV: modelled (formula)<br>weights: {chart_text(origins)}"
    styled(fig, f"{chart_text(title)}<br>{told}", height=190 + 44 * len(chosen))
    fig.update_yaxes(autorange="reversed", showgrid=False)
    below = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"}
    return fig.update_layout(barmode="stack", legend=below, margin={"t": 92, "b": 90})


def _add_bars(
    fig: go.Figure, column: int, titles: Sequence[str], sizes: Sequence[float], name: str, colour: str, pattern: str
) -> None:
    fig.add_bar(
        name=name, x=[size / 1e9 for size in sizes], y=list(titles), orientation="h", row=1, col=column,
        customdata=[with_unit(size, "B") for size in sizes], hovertemplate=f"%{{y}}, {name}: %{{customdata}}<extra></extra>",
        marker={"color": colour, "pattern": {"shape": pattern, "fillmode": "overlay", "fgcolor": "#ffffff", "solidity": 0.2}},
    )  # fmt: skip


def _released(name: str) -> Preset:
    preset = presets[name]
    if preset.weights is None:
        raise InputError(f"nobody released {preset.title!r}, so it has no weights to meter; choose one of {METERED}")
    return preset


def _weight_bytes(preset: Preset) -> dict[str, float]:
    weights = preset.weights
    assert weights is not None
    return dict(zip(WEIGHT_PARTS, (weights.always_bytes, weights.expert_bytes, weights.host_bytes), strict=True))


def _origin(preset: Preset) -> str:
    return "published" if preset.weights and preset.weights.origin == "published" else "modelled (formula)"


def freed_html(freed_bytes: float, name: str, storage: str = "released") -> str:
    """The calculator's line: bytes freed, divided by the KV bytes that a token of this model adds, are so many tokens.

    InputError for a number of bytes that is none, an unknown preset or storage.
    """
    if not 0 <= freed_bytes < float("inf"):
        raise InputError(f"the bytes freed must be a number from 0 on, got {freed_bytes}")
    per_token = kv_bytes_per_token(name, storage)["total"]
    tokens = freed_bytes / per_token
    model = presets[name]
    line = (
        f"{with_unit(freed_bytes, 'B')} / {per_token:,.0f} B per token of {model.title}, cache stored as {storage} "
        f"= room for {tokens:,.0f} more tokens"
    )
    context = model.config.max_position_embeddings
    contexts = f"{tokens / context:,.1f} contexts of {context:,}"
    return f"<p role='status' aria-live='polite'>{escape(line)}, or {contexts}. Modelled (formula).</p>"
