"""Will it fit: a context that grows by turns, what it holds on a card, how many cards it takes, and what to do when full."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import plotly.graph_objects as go

from workbench import cost
from workbench.agent import MADE_UP, ROLES, Turn
from workbench.cost.capacity import Fit
from workbench.cost.filling import CARDS, Cards, Choice, Filling
from workbench.errors import InputError
from workbench.figures.caches import size
from workbench.figures.memory import PART_COLOURS, PART_ORDER, PART_PATTERNS
from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILLION, chart_text, styled
from workbench.trace import Trace

ROLE_LOOKS = {"system": (PINK, "x"), "user": (GREEN, "."), "assistant": (ORANGE, "/"), "tool": (BLUE, "")}
WEIGHTS_COLOUR = GREY
LINE_LOOKS = ((BLUE, "solid"), (VERMILLION, "dash"), (GREEN, "dot"), (ORANGE, "dashdot"), (PINK, "longdash"), (SKY, "solid"))
MOST_POINTS = 300


def session_context(turns: Sequence[Turn]) -> go.Figure:
    """Tokens in the context after each turn, by who wrote them. InputError without turns."""
    if not turns:
        raise InputError("a session needs turns, see wb.agent_session")
    fig = go.Figure()
    shown = _thinned(len(turns))
    for role in ROLES:
        total, grown = 0, []
        for turn in turns:
            total += turn.tokens if turn.role == role else 0
            grown.append(total)
        colour, shape = ROLE_LOOKS[role]
        fig.add_scatter(
            x=shown,
            y=[grown[i] for i in shown],
            name=role,
            mode="lines",
            line={"color": colour, "width": 0.5},
            stackgroup="context",
            fillcolor=colour,
            fillpattern={"shape": shape, "bgcolor": colour, "fgcolor": "#ffffff", "solidity": 0.2},
            hovertemplate="%{y:,} tokens",
        )
    title = f"The context of one session, turn by turn: {turns[-1].context:,} tokens at the end<br>{chart_text(MADE_UP)}"
    styled(fig, title, height=360)
    fig.update_xaxes(title="turn")
    fig.update_yaxes(title="tokens", exponentformat="SI")
    hover = {"bgcolor": "#ffffff", "font": {"color": "#222222"}}
    return fig.update_layout(hovermode="x unified", legend=_below(), margin={"b": 100}, hoverlabel=hover)


def filling_chart(fillings: Sequence[Filling], at: int | None = None) -> go.Figure:
    """Bytes of the caches on the fullest card against tokens, and the room that weights leave; a cross where it runs full.

    ``at``: tokens to mark. InputError for nothing to draw.
    """
    if not fillings:
        raise InputError("there is nothing to draw; see workbench.cost.filling")
    fig = go.Figure()
    rooms: dict[str, float] = {}
    for fill, (colour, dash) in zip(fillings, LINE_LOOKS, strict=False):
        shown = _thinned(len(fill.contexts))
        name = chart_text(f"{fill.lies.preset.title}, {_many(fill.batch, 'session')}")
        fig.add_scatter(
            x=[fill.contexts[i] for i in shown],
            y=[fill.kv_bytes[i] or None for i in shown],
            name=name,
            mode="lines",
            line={"color": colour, "dash": dash, "width": 2},
            customdata=[size(fill.kv_bytes[i]) for i in shown],
            hovertemplate="%{x:,} tokens: %{customdata}",
        )
        if (full := fill.full_at) is not None and fill.room_bytes > 0:
            fig.add_scatter(
                x=[fill.contexts[full]],
                y=[fill.kv_bytes[full]],
                name=f"full: {chart_text(fill.lies.preset.title)}",
                mode="markers",
                marker={"symbol": "x", "size": 12, "color": colour, "line": {"width": 1, "color": GREY}},
                hovertemplate="the first turn that does not fit: %{x:,} tokens<extra></extra>",
            )
        rooms[fill.lies.preset.title] = fill.room_bytes
    ends = [fillings[0].contexts[0], max(fill.contexts[-1] for fill in fillings)]
    for title, room in rooms.items():
        if room > 0:
            fig.add_scatter(
                x=ends,
                y=[room] * 2,
                name=f"room: {size(room)}" + (f" ({chart_text(title)})" if len(rooms) > 1 else ""),
                mode="lines",
                line={"color": GREY, "dash": "dash", "width": 1.5},
                hovertemplate=f"room: {size(room)}<extra></extra>",
            )
    if at is not None:
        fig.add_vline(x=at, line={"color": GREY, "width": 1.5})
    lies = fillings[0].lies
    cards = f"{_many(lies.cards, chart_text(lies.device.title))} in groups of {lies.tp}"
    title = f"Caches on a card of {cards}; room: what the weights leave<br>{_origins(fillings)}"
    styled(fig, title, height=400)
    fig.update_xaxes(title="tokens in each session")
    fig.update_yaxes(title="bytes (B)", exponentformat="SI", rangemode="tozero")
    return fig.update_layout(legend=_below(), margin={"b": 120})


def card_use(fit: Fit) -> go.Figure:
    """The fullest card as one bar: weights, each part of the caches, and what stays free; the line is its memory."""
    fig = go.Figure()
    parts = [(part, fit.kv_bytes.get(part, 0.0)) for part in PART_ORDER]
    pieces = [("weights", fit.weight_bytes or 0.0, WEIGHTS_COLOUR, "")]
    pieces += [(name, held, PART_COLOURS[name], PART_PATTERNS.get(name, "")) for name, held in parts if held]
    memory = fit.device.memory_bytes
    pieces.append(("free", max(0.0, memory - sum(held for _, held, _, _ in pieces)), "rgba(125, 125, 125, 0.15)", ""))
    for name, held, colour, shape in (piece for piece in pieces if piece[1]):
        fig.add_bar(
            y=["card"],
            x=[held],
            name=f"{name} {size(held)}",
            orientation="h",
            marker={"color": colour, "pattern": {"shape": shape, "bgcolor": colour, "fgcolor": "#ffffff", "solidity": 0.2}},
            hovertemplate=f"{name}: {size(held)}<extra></extra>",
        )
    fig.add_vline(x=memory, line={"color": VERMILLION, "width": 3})
    known = "" if fit.weight_bytes is not None else "; weights unknown, left out"
    verdict = "fits" if fit.fits else "DOES NOT FIT"
    title = f"{verdict}: the fullest of {_many(fit.cards, chart_text(fit.device.title))}, of {size(memory)} (line){known}"
    styled(fig, f"{title}<br>{cost.FORMULA}, caches stored {_stored(fit.storage)}", height=230)
    fig.update_xaxes(title="bytes (B)", exponentformat="SI")
    fig.update_yaxes(showticklabels=False)
    return fig.update_layout(barmode="stack", bargap=0.5, legend=_below(), margin={"t": 64, "b": 96, "l": 16})


def sessions_chart(fits: Sequence[Fit], names: Sequence[str]) -> go.Figure:
    """How many sessions fit together, a bar for each layout. InputError without any, or names of another number."""
    if not fits or len(fits) != len(names):
        raise InputError(f"give a name for each layout, got {len(names)} for {len(fits)}")
    counts = [fit.most_sequences or 0 for fit in fits]
    fig = go.Figure()
    fig.add_bar(
        y=[chart_text(name) for name in names],
        x=counts,
        orientation="h",
        name="sessions",
        marker={"color": BLUE},
        text=[f"{count:,}" for count in counts],
        textposition="auto",
        insidetextfont={"color": "#ffffff"},
        hovertemplate="%{y}: %{x:,} sessions<extra></extra>",
    )
    cards = " and ".join(dict.fromkeys(_many(fit.cards, chart_text(fit.device.title)) for fit in fits))
    styled(fig, f"Sessions whose caches fit beside the weights, on {cards}<br>{cost.FORMULA}", height=150 + 34 * len(fits))
    fig.update_xaxes(title="sessions at the same time", rangemode="tozero")
    fig.update_yaxes(autorange="reversed")
    return fig.update_layout(showlegend=False, bargap=0.25)


def pauses_chart(choices: Mapping[str, Sequence[Choice]]) -> go.Figure:
    """Seconds until a session can go on, by name, if its text is read again and if its cache was swapped; logarithmic.

    InputError without any.
    """
    if not choices:
        raise InputError("there is nothing to draw; see wb.when_full")
    fig = go.Figure()
    for what, colour, shape in (("recompute", ORANGE, ""), ("swap", BLUE, "/")):
        found = [next(choice for choice in each if choice.what == what).seconds for each in choices.values()]
        fig.add_bar(
            y=[chart_text(name) for name in choices],
            x=found,
            orientation="h",
            name=what,
            marker={"color": colour, "pattern": {"shape": shape, "bgcolor": colour, "fgcolor": "#ffffff", "solidity": 0.2}},
            text=[seconds_text(seconds) for seconds in found],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
    styled(fig, f"How long a session waits, at least, until it goes on<br>{cost.FORMULA}", height=170 + 60 * len(choices))
    known = [seconds for bar in fig.data for seconds in bar.x if seconds] or [1.0]
    ends = [math.log10(min(known)) - 1, math.log10(max(known)) + 0.5]  # so that the shortest bar has a length, too
    fig.update_xaxes(title="seconds", type="log", exponentformat="power", dtick=1, range=ends)
    fig.update_yaxes(autorange="reversed")
    return fig.update_layout(legend=_below(), margin={"b": 90, "r": 70})


def measured_and_modelled(trace: Trace, lengths: Sequence[int]) -> go.Figure:
    """What a filled layer's cache held, as points, and the formula of the same layer through ``lengths``, as a line.

    Both axes are logarithmic. InputError for a trace without bytes.
    """
    from workbench.config import read_config

    if not trace.steps or not trace.cache_bytes:
        raise InputError("nothing was filled yet; call layer.fill(4096) first")
    config = read_config(trace.config)
    tokens = [trace.step_end(s) for s in range(trace.steps)]
    held = [sum(int(of_part[s]) for of_part in trace.cache_bytes.values()) for s in range(trace.steps)]
    modelled = sorted({*lengths, *tokens})
    fig = go.Figure()
    fig.add_scatter(
        x=modelled,
        y=[cost.kv_bytes(config, n, trace.storage)["total"] for n in modelled],
        name=cost.FORMULA,
        mode="lines",
        line={"color": GREY, "dash": "dash", "width": 2},
        hovertemplate="%{x:,} tokens: %{y:,} B by formula<extra></extra>",
    )
    fig.add_scatter(
        x=tokens,
        y=held,
        name="measured: counted in the live cache",
        mode="markers",
        marker={"color": BLUE, "size": 10},
        hovertemplate="%{x:,} tokens: %{y:,} B held<extra></extra>",
    )
    fig.add_vline(x=tokens[-1], line={"color": GREY, "width": 1, "dash": "dot"})
    title = (
        f"{chart_text(trace.model)}, one layer, stored as {trace.storage}: measured to {tokens[-1]:,} tokens, modelled beyond"
    )
    styled(fig, f"{title}<br>{chart_text(trace.label)}", height=360)
    fig.update_xaxes(type="log", title="tokens in the cache", exponentformat="SI", dtick=1)
    fig.update_yaxes(type="log", title="bytes (B)", exponentformat="SI", dtick=1)
    return fig.update_layout(legend=_below(), margin={"b": 100})


def cards_table_html(found: Sequence[Cards], length: int, batch: int) -> str:
    """A row for each device, a column for each model, and how many cards it takes. InputError without any."""
    if not found:
        raise InputError("there is nothing to show; see workbench.cost.filling.all_cards_needed")
    models = {each.preset.name: each for each in found}
    head = "".join(
        f"<th scope='col'>{escape(each.preset.title)}{'' if each.weights_known else ' †'}</th>" for each in models.values()
    )
    rows: dict[str, list[str]] = {}
    titles = {}
    for each in found:
        titles[each.device.name] = each.device.title
        tip = f"groups of {each.tp}, caches stored {_stored(each.storage)}" if each.cards else "not with 64 cards"
        marks = ("*" if each.extrapolated else "") + ("°" if each.storage != _released(each) else "")
        text = f"{each.cards}" if each.cards else f"more than {CARDS[-1]}"
        rows.setdefault(each.device.name, []).append(f"<td title='{escape(tip)}'>{text}{marks}</td>")
    body = "".join(f"<tr><th scope='row'>{escape(titles[name])}</th>{''.join(cells)}</tr>" for name, cells in rows.items())
    caption = f"Cards it takes for {_many(batch, 'session')} of {length:,} tokens, of 1, 2, 4 … {CARDS[-1]}; {cost.FORMULA}"
    notes = (
        "† weights unknown: the caches alone. * longer than the model was made for: the formula goes on. "
        "° this device does not read the released format, so the cache is kept in BF16. "
        "V4.1's Engram tables stay in host memory, except where host and device share one."
    )
    return (
        "<div style='overflow-x:auto'><table class='wb-cards'>"
        f"<caption style='text-align:left;caption-side:top;color:inherit'>{escape(caption)}</caption>"
        f"<thead><tr><th scope='col'>device</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<p style='font-size:90%;line-height:1.4'>{escape(notes)}</p>"
    )


def choices_html(choices: Sequence[Choice], made: str) -> str:
    """What can be done when there is no room, a row each; ``made`` says for what, such as the model and the device."""
    head = ("", "frees on a card", "copies", "computes", "takes at least", "still sees", "")
    rows = []
    for choice in choices:
        numbers = (
            size(choice.freed_bytes) if choice.freed_bytes else "nothing",
            size(choice.moved_bytes) if choice.moved_bytes else "–",
            f"{choice.flops / 1e15:,.3g} PFLOP" if choice.flops else "–",
            seconds_text(choice.seconds),
            f"{choice.tokens:,} tokens",
        )
        cells = "".join(f"<td style='white-space:nowrap'>{escape(text)}</td>" for text in numbers)
        exact = "" if choice.exact else " (not the same as before)" if choice.what == "forget" else ""
        rows.append(
            f"<tr><th scope='row'>{choice.what}</th>{cells}<td style='text-align:left'>{escape(choice.note + exact)}</td></tr>"
        )
    heads = "".join(f"<th scope='col'>{text}</th>" for text in head)
    caption = f"When it is full: what can be done with one session. {made}; {cost.FORMULA}"
    return (
        "<div style='overflow-x:auto'><table class='wb-choices'>"
        f"<caption style='text-align:left;caption-side:top;color:inherit'>{escape(caption)}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def seconds_text(seconds: float | None) -> str:
    """ "nothing", "142 ms", "4.92 s", "2.1 min"; "unknown" for None."""
    if seconds is None:
        return "unknown"
    if not seconds:
        return "nothing"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:,.1f} min"


def _released(found: Cards) -> str:
    """The storage that is this model's own: of the BF16 baselines both are the same."""
    return found.storage if found.preset.kv_format == "bf16" else "released"


def _stored(storage: str) -> str:
    return "in BF16" if storage == "bf16" else "as released"


def _origins(fillings: Sequence[Filling]) -> str:
    stored = " and ".join(dict.fromkeys(_stored(fill.lies.storage) for fill in fillings))
    return f"{' and '.join(dict.fromkeys(fill.origin for fill in fillings))}; caches stored {stored}"


def _thinned(count: int) -> list[int]:
    """At most ``MOST_POINTS`` of 0 .. count - 1, both ends among them."""
    step = max(1, -(-count // MOST_POINTS))
    return sorted({*range(0, count, step), count - 1})


def _many(count: int, noun: str) -> str:
    return f"{count:,} × {noun}" if noun[:1].isupper() else f"{count:,} {noun}{'s' * (count != 1)}"


def _below() -> dict[str, object]:
    return {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"}
