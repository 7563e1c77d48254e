"""Engram on one text: tokens coloured by its gates, the n-grams of a token with the table rows they read, and on beside off.

HTML is safe whatever the tokens hold, see ``workbench.figures.text``. Gates differ little from token to token, so colours run
from the lowest to the highest value of the text, and the legend says which those are (reference/tiny-model.md, section 6).
"""

from __future__ import annotations

from html import escape
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.engram import EngramEffect, Ngram, Ngrams, RowUse
from workbench.errors import InputError
from workbench.figures.style import BLUE, GREY, PURPLE, VERMILLION, chart_text, styled, visible_text
from workbench.figures.text import escaped
from workbench.trace import Trace

Stream = int | str  # a stream's number, or "mean" over all of them
NEAR_TOKENS = 600  # shown on either side of the chosen token
TEXT_BYTES = 150_000  # of a view's 250 KB
STRONGEST = 65  # percent; text stays readable on it, in both themes
NAMED_OTHERS = 3  # places told one by one

_CSS = f"""<style>
.wb-engram {{color: var(--jp-content-font-color1, inherit); line-height: 1.5; direction: ltr; text-align: left}}
.wb-engram p {{margin: 0; padding: 0 0 6px; font-family: var(--jp-ui-font-family, sans-serif); font-size: 12px}}
.wb-engram .legend {{position: sticky; top: 0; background: var(--jp-layout-color0, Canvas)}}
.wb-engram .text {{font-family: var(--jp-code-font-family, monospace); font-size: 13px; line-height: 1.85;
  overflow-wrap: anywhere}}
.wb-engram .text bdi {{white-space: pre-wrap; padding: 1px 0; border-radius: 2px; cursor: pointer}}
.wb-engram .text bdi:hover {{outline: 1px solid var(--jp-border-color1, grey)}}
.wb-engram .g {{background: color-mix(in srgb, {PURPLE} calc(var(--a) * 1%), transparent)}}
.wb-engram .x {{border-bottom: 2px dotted {VERMILLION}}}
.wb-engram .q {{outline: 2px solid var(--jp-content-font-color1, currentColor)}}
.wb-engram i {{font-style: normal; opacity: 0.72}}
.wb-engram .bar {{display: inline-block; width: 120px; height: 10px; vertical-align: middle; border: 1px solid #8886;
  background: linear-gradient(90deg, transparent, color-mix(in srgb, {PURPLE} {STRONGEST}%, transparent))}}
.wb-engram .tables {{overflow-x: auto}}
.wb-engram table {{border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0 0 8px; font-size: 12px}}
.wb-engram caption {{text-align: left; white-space: nowrap; font-weight: bold; padding: 4px 0}}
.wb-engram th, .wb-engram td {{padding: 2px 8px; text-align: left; vertical-align: top; border-bottom: 1px solid #8886}}
.wb-engram .n {{text-align: right}}
.wb-engram td.clash {{box-shadow: inset 0 0 0 2px {VERMILLION}}}
.wb-engram td small {{display: block; white-space: normal; min-width: 9em}}
</style>"""


class Paint(NamedTuple):
    """A value for each token [L], what to call it, and whether colour is its square root, for values that are mostly small."""

    values: np.ndarray
    name: str
    root: bool = False

    @property
    def range(self) -> tuple[float, float]:
        return float(self.values.min()), float(self.values.max())

    @property
    def middle(self) -> float:
        """The value that gets half of the strongest colour."""
        low, high = self.range
        return low + (high - low) * (0.25 if self.root else 0.5)

    def strength(self, token: int) -> int:
        """Percent of colour: 0 at the lowest value, ``STRONGEST`` at the highest."""
        low, high = self.range
        share = (float(self.values[token]) - low) / (high - low) if high > low else 0.0
        return round(STRONGEST * (share**0.5 if self.root else share))


def gate_paint(trace: Trace, layer: int, stream: Stream = "mean") -> Paint:
    """Gates of one layer: of one stream, or their mean. InputError for a layer or stream the trace does not have."""
    gates = next((memory.gates for memory in trace.engram if memory.layer == layer), None)
    if gates is None:
        raise InputError(f"the trace has Engram layers {[memory.layer for memory in trace.engram]}, got {layer}")
    if stream == "mean":
        return Paint(gates.astype(np.float32).mean(axis=1), f"gate of layer {layer}, mean of {gates.shape[1]} streams")
    if not isinstance(stream, int) or not 0 <= stream < gates.shape[1]:
        raise InputError(f"stream must be 'mean' or 0..{gates.shape[1] - 1}, got {stream!r}")
    return Paint(gates[:, stream].astype(np.float32), f"gate of layer {layer}, stream {stream}")


def effect_paint(effect: EngramEffect) -> Paint:
    return Paint(effect.kl, "KL(with || without Engram) of the next token, in nats", root=True)


def engram_text(trace: Trace, ngrams: Ngrams, layer: int, token: int, paint: Paint) -> str:
    """HTML of the text around ``token``, coloured by ``paint``; tokens whose rows in ``layer`` collide are dotted below.

    Tokens carry ``data-token``; of a long text 600 on either side are shown, and each gap says how much it leaves out.
    """
    if not 0 <= token < trace.length or len(paint.values) != trace.length:
        raise InputError(f"the trace has tokens 0..{trace.length - 1}, got {token} and {len(paint.values)} values to paint")
    collided, rows = ngrams.collided(layer), ngrams.layers[layer].rows.shape[1]
    near = NEAR_TOKENS
    while True:
        start, stop = max(0, token - near), min(trace.length, token + near + 1)
        shown = range(start, stop)
        body = "".join(_token(trace.token_texts[t], t, token, paint, int(collided[t]), rows) for t in shown)
        if len(body.encode()) <= TEXT_BYTES or near < 2:
            break
        near //= 2
    before, after = (f"<i>… {n:,} tokens left out … </i>" if n else "" for n in (start, trace.length - stop))
    low, high = paint.range
    legend = (
        f"{escape(paint.name)}: {low:.2f} <span class='bar'></span> {high:.2f} (half of the colour at {paint.middle:.2f}). "
        f"<bdi class='x'>Dotted</bdi>: one of its {rows} rows in layer {layer} is also read by a different n-gram of this text."
    )
    return f"{_CSS}<div class='wb-engram'><p class='legend'>{legend}</p><div class='text'>{before}{body}{after}</div></div>"


def _token(text: str, t: int, chosen: int, paint: Paint, collided: int, rows: int) -> str:
    classes = "g" + (" x" if collided else "") + (" q" if t == chosen else "")
    shared = f"; {collided} of {rows} rows shared" if collided else ""
    told = f"token {t}: {paint.values[t]:.3f}{shared}"
    return f'<bdi class="{classes}" data-token="{t}" style="--a:{paint.strength(t)}" title="{told}">{escaped(text)}</bdi>'


def ngrams_html(trace: Trace, ngrams: Ngrams, layer: int, token: int) -> str:
    """Tables of one token: its n-grams with the row each head reads in ``layer``, and its gate in every layer and stream."""
    found = ngrams.of(layer, token)
    counts = ngrams.counts(layer)
    collided = sum(bool(use.shared_with) for ngram in found for use in ngram.uses)
    status = (
        f"Token {token} {_quoted(trace.token_texts[token])} reads {len(found) * len(found[0].uses)} rows in layer {layer}, "
        f"{collided} of them shared with a different n-gram of this text."
    )
    whole = (
        f"Whole text, layer {layer}: {counts.reads:,} reads of {counts.rows:,} different rows, of which {counts.shared:,} are "
        f"shared by different n-grams (collisions); all other repeats are the same n-gram again."
    )
    heads = "".join(f"<th scope='col' class='n'>head {use.head}</th>" for use in found[0].uses)
    body = "".join(_ngram_row(trace, ngram) for ngram in found)
    return (
        f"{_CSS}<div class='wb-engram'><p role='status' aria-live='polite'>{status}</p><div class='tables'>"
        f"<table><caption>n-grams that end here, and their rows in layer {layer}</caption><thead><tr><th scope='col'>order</th>"
        f"<th scope='col'>n-gram</th><th scope='col'>same n-gram at</th>{heads}</tr></thead><tbody>{body}</tbody></table>"
        f"{_gates_table(trace, token)}</div><p>{whole}</p></div>"
    )


def _ngram_row(trace: Trace, ngram: Ngram) -> str:
    parts = [f"<bdi>{escaped(trace.token_texts[t])}</bdi>" if t >= 0 else "<i>start</i>" for t in ngram.tokens]
    plural = "s" if len(ngram.repeats) > 1 else ""
    again = f"token{plural} {_listed(ngram.repeats)}" if ngram.repeats else "nowhere else"
    cells = "".join(_row_cell(trace, ngram, use) for use in ngram.uses)
    return f"<tr><th scope='row'>{ngram.order}</th><td>{'<i>|</i>'.join(parts)}</td><td>{again}</td>{cells}</tr>"


def _row_cell(trace: Trace, ngram: Ngram, use: RowUse) -> str:
    if not use.shared_with:
        return f"<td class='n'>{use.row:,}</td>"
    first = use.shared_with[0]
    other = "".join(trace.token_texts[t] for t in range(max(0, first - ngram.order + 1), first + 1))
    more = f" and {len(use.shared_with) - 1} more" if len(use.shared_with) > 1 else ""
    return f"<td class='n clash'>{use.row:,}<small>≠ collides with {_quoted(other)} at token {first}{more}</small></td>"


def _gates_table(trace: Trace, token: int) -> str:
    """One row a layer, one column a stream, each cell coloured within the range that its gate has in the text."""
    streams = trace.engram[0].gates.shape[1]
    names: list[Stream] = [*range(streams), "mean"]
    head = "".join(f"<th scope='col' class='n'>{n if isinstance(n, str) else f'stream {n}'}</th>" for n in names)
    rows = ""
    for memory in trace.engram:
        cells = ""
        for name in names:
            paint = gate_paint(trace, memory.layer, name)
            low, high = paint.range
            told = f"{low:.2f} to {high:.2f} in this text"
            cells += f"<td class='n g' style='--a:{paint.strength(token)}' title='{told}'>{paint.values[token]:.3f}</td>"
        rows += f"<tr><th scope='row'>layer {memory.layer}</th>{cells}</tr>"
    caption = "gates here (0 closed, 1 open; colour within each one's own range)"
    return f"<table><caption>{caption}</caption><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _quoted(text: str) -> str:
    return f"“<bdi>{escape(visible_text(text, 40))}</bdi>”"


def _listed(places: tuple[int, ...]) -> str:
    more = f" and {len(places) - NAMED_OTHERS} more" if len(places) > NAMED_OTHERS else ""
    return ", ".join(map(str, places[:NAMED_OTHERS])) + more


def engram_effect_chart(effect: EngramEffect, token: int) -> go.Figure:
    """The likeliest next tokens after ``token``, with Engram and with it switched off, beside each other.

    Each side has its own ranking; a tick across a bar marks the same token's probability on the other side. The title has KL
    in nats and the token that followed. InputError for a token that was not read.
    """
    if not 0 <= token < effect.length:
        raise InputError(f"the effect was measured after tokens 0..{effect.length - 1}, got {token}")
    sides = (
        ("with Engram", effect.on_ids, effect.on_probs, effect.on_probs_off, BLUE, ""),
        ("Engram switched off", effect.off_ids, effect.off_probs, effect.off_probs_on, GREY, "/"),
    )
    fig = make_subplots(rows=1, cols=2, subplot_titles=[name for name, *_ in sides], horizontal_spacing=0.2)
    fig.update_annotations(font_size=13)
    ranks = effect.on_ids.shape[1]
    highest = max(float(effect.on_probs[token].max()), float(effect.off_probs[token].max()))
    for column, (name, ids, probs, other, colour, pattern) in enumerate(sides, start=1):
        rank = list(range(ranks))
        texts = [chart_text(visible_text(effect.texts[i], 18)) for i in ids[token].tolist()]
        mine, there = probs[token].tolist(), other[token].tolist()
        stripes = {"shape": pattern, "fillmode": "overlay", "fgcolor": "#ffffff", "solidity": 0.2}
        labels = [f"{t}  <b>{p:.1%}</b>" for t, p in zip(texts, mine, strict=True)]
        told = [f"{t}: {p:.2%}, other side {q:.2%}" for t, p, q in zip(texts, mine, there, strict=True)]
        fig.add_bar(
            name=name, x=mine, y=rank, orientation="h", hovertext=told, hoverinfo="text", row=1, col=column,
            marker={"color": colour, "pattern": stripes},
        )  # fmt: skip
        fig.add_scatter(
            name="on the other side", x=there, y=rank, mode="markers", hoverinfo="skip", row=1, col=column,
            marker={"symbol": "line-ns", "size": 16, "line": {"width": 3, "color": VERMILLION}},
        )  # fmt: skip
        fig.update_yaxes(tickvals=rank, ticktext=labels, range=[ranks - 0.5, -0.5], showgrid=False, row=1, col=column)
    fig.update_xaxes(title="probability of the next token", tickformat=".0%", range=[0, 1.04 * highest])
    here = f"After token {token} “{chart_text(visible_text(effect.texts[int(effect.token_ids[token])], 24))}”"
    title = f"{here}: KL(with || without) = {effect.kl[token]:.3f} nats"
    if token + 1 < effect.length:
        followed = chart_text(visible_text(effect.texts[int(effect.token_ids[token + 1])], 24))
        on, off = np.exp(-effect.on_loss[token]), np.exp(-effect.off_loss[token])
        title += f"<br>“{followed}” followed: {on:.1%} with Engram, {off:.1%} without"
    note = f"{chart_text(effect.label)}<br>a vertical tick is the same token's probability on the other side"
    styled(fig, f"{title}<br>{note}", height=160 + 24 * ranks)
    return fig.update_layout(showlegend=False, margin={"t": 112, "b": 48})
