"""What one layer's cache holds at one moment, slot by slot: the ring of the window, the open block, the entries.

From the rules alone (reference/deepseek-v4.md, section 4): token t lies in slot t mod W, L mod m tokens wait in the open block,
and ⌊L/m⌋ entries are finished. Tests hold it against live caches.
"""

from __future__ import annotations

from html import escape

from workbench.errors import InputError
from workbench.figures.memory import PART_COLOURS
from workbench.figures.style import visible_text
from workbench.trace import LayerTrace, Trace

MOST_CELLS = 128  # of a ring or a block that are drawn one by one
LAST_ENTRIES = 12
TEXT_CELLS = 32  # a longer ring or block shows numbers only
_CSS = (
    "<style>.wb-slots{line-height:1.35;margin:4px 0}.wb-slots h4{margin:10px 0 2px;font-size:13px}"
    ".wb-slots .row{display:flex;flex-wrap:wrap;gap:3px;padding:2px}"
    ".wb-slots .c{border:1px solid #8888;border-bottom:4px solid var(--c);min-width:2.6em;padding:1px 4px;text-align:center;"
    "font-size:12px;font-variant-numeric:tabular-nums;white-space:pre}.wb-slots .c small{display:block;opacity:0.85}"
    ".wb-slots .new{outline:2px solid var(--c);font-weight:bold}.wb-slots .next{border-style:dashed dashed solid}"
    ".wb-slots .free{opacity:0.7;border-bottom-color:#8888}</style>"
)


def slots_of(layer: LayerTrace, length: int) -> dict[str, list[int]]:
    """What lies where once ``length`` tokens are in: "window" the token in each slot that is filled, "open" the tokens of the
    open block, "entries" the number of each finished entry.
    """
    window, ratio = layer.window, layer.ratio
    return {
        "window": [slot + window * ((length - 1 - slot) // window) for slot in range(min(length, window))],
        "open": list(range(length - length % ratio, length)) if ratio > 1 else [],
        "entries": list(range(length // ratio)) if ratio else [],
    }


def cache_slots_html(trace: Trace, number: int, length: int) -> str:
    """Layer ``number``'s cache after ``length`` tokens of the trace; the newest token's slot and entry stand out.

    All text is escaped. InputError for a layer or a length the trace does not have.
    """
    layer = trace.layer(number)
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= trace.length:
        raise InputError(f"the trace holds 1 to {trace.length} tokens, got {length!r}")
    slots, newest = slots_of(layer, length), length - 1
    parts = [f"<p>Layer {number} ({escape(layer.kind)}) after {length:,} tokens; the newest is token {newest:,}.</p>"]
    if layer.window:
        parts += _ring(trace, layer, slots["window"], newest)
    if layer.ratio > 1:
        parts += _open_block(trace, layer, slots["open"], newest)
    if layer.ratio:
        parts += _entries(trace, layer, len(slots["entries"]), length)
    return f"{_CSS}<div class='wb-slots'>{''.join(parts)}</div>"


def _ring(trace: Trace, layer: LayerTrace, held: list[int], newest: int) -> list[str]:
    window, full = layer.window, len(held) == layer.window
    after = (newest + 1) % window  # where the next token goes
    told = f"full; the next token overwrites slot {after}" if full else f"{len(held)} of {window} slots filled"
    cells = []
    for slot in range(min(window, MOST_CELLS)):
        if slot >= len(held):
            cells.append(_cell("–", "free", f"slot {slot}: free"))
            continue
        t = held[slot]
        mark = "new" if t == newest else "next" if full and slot == after else ""
        cells.append(_cell(f"{t}", mark, f"slot {slot}: token {t}", _text(trace, t, window)))
    return [_head(f"window, a ring of {window} slots: {told}", "window"), _row(cells, "window")]


def _open_block(trace: Trace, layer: LayerTrace, held: list[int], newest: int) -> list[str]:
    ratio = layer.ratio
    told = f"{len(held)} of {ratio} tokens" if held else "empty: its last token has just closed it"
    cells = []
    for place in range(min(ratio, MOST_CELLS)):
        if place >= len(held):
            cells.append(_cell("–", "free", f"place {place}: free"))
            continue
        t = held[place]
        cells.append(_cell(f"{t}", "new" if t == newest else "", f"place {place}: token {t}", _text(trace, t, ratio)))
    return [_head(f"tail, the open block: {told}", "tail"), _row(cells, "tail")]


def _entries(trace: Trace, layer: LayerTrace, count: int, length: int) -> list[str]:
    each = "for every token" if layer.ratio == 1 else f"for {layer.ratio} tokens"
    one = "a row for every token" if layer.of_tokens else f"entries, one {each}"
    keys = "; as many index keys beside them" if layer.indexes else ""
    earlier = max(0, count - LAST_ENTRIES)
    cells = [_cell("…", "free", f"{earlier} earlier", f"{earlier} more")] if earlier else []
    for entry in range(earlier, count):
        first, last = entry * layer.ratio, entry * layer.ratio + layer.ratio - 1
        fresh = length % layer.ratio == 0 and entry == count - 1
        reads = f", reads tokens {max(0, first - layer.look_back)} to {last}" if layer.look_back else ""
        span = f"{first}–{last}" if last > first else _text(trace, first, 1)
        cells.append(_cell(f"{entry}", "new" if fresh else "", f"entry {entry}{reads}", span))
    part = "kv" if layer.of_tokens else "compressed"
    return [_head(f"{one}: {count:,}{keys}", part), _row(cells, part)]


def _text(trace: Trace, t: int, cells: int) -> str:
    return visible_text(trace.token_texts[t], 6) if cells <= TEXT_CELLS else ""


def _head(text: str, part: str) -> str:
    return f"<h4><span style='border-left:6px solid {PART_COLOURS[part]};padding-left:6px'>{escape(text)}</span></h4>"


def _row(cells: list[str], part: str) -> str:
    return f"<div class='row' style='--c:{PART_COLOURS[part]}'>{''.join(cells) or '<small>none yet</small>'}</div>"


def _cell(number: str, mark: str, title: str, text: str = "") -> str:
    below = f"<small>{escape(text)}</small>" if text else ""
    return f"<span class='c {mark}' title='{escape(title)}'>{escape(number)}{below}</span>"
