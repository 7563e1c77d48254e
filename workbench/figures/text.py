"""The prompt coloured by where one query looks, as HTML that is safe to show whatever the tokens hold.

Every token's text is escaped and isolated (``<bdi>``), so that neither markup nor writing direction leaks out of it. Colours
of text and page come from JupyterLab's theme, the highlights are translucent: light and dark themes both work.
"""

from __future__ import annotations

import html
from collections.abc import Iterator

import numpy as np

from workbench.errors import InputError
from workbench.figures import style
from workbench.figures.attention import Head, check_head, describe_head, describe_layer, window_columns
from workbench.figures.query import source_probs, top_sources
from workbench.trace import LayerTrace, Trace

NEAR_TOKENS = 600  # shown on either side of the query
PASSAGE_TOKENS = 24  # shown on either side of a top source farther away
TOP_PASSAGES = 6
TEXT_BYTES = 100_000  # of a view's 250 KB
FAINT = 2e-3  # less mass than this is not painted: it could not be seen
MAX_TOKEN_CHARACTERS = 80

_CSS = """
.wb-text {font-family: var(--jp-code-font-family, monospace); font-size: 13px; line-height: 1.75; overflow-wrap: anywhere;
  color: var(--jp-content-font-color1, inherit); direction: ltr; text-align: left}
.wb-text p {margin: 0; padding: 0 0 6px; position: sticky; top: 0; background: var(--jp-layout-color0, Canvas);
  font-family: var(--jp-ui-font-family, sans-serif); font-size: 12px}
.wb-text bdi {white-space: pre-wrap; padding: 1px 0; border-radius: 2px; cursor: pointer}
.wb-text bdi:hover {outline: 1px solid var(--jp-border-color1, grey)}
.wb-text .w {background: color-mix(in srgb, WINDOW calc(var(--a) * 1%), transparent)}
.wb-text .e {background: color-mix(in srgb, ENTRY calc(var(--a) * 1%), transparent); border-bottom: 2px solid ENTRY}
.wb-text .q {outline: 2px solid var(--jp-content-font-color1, currentColor)}
.wb-text .f {opacity: 0.72}
.wb-text .f i {opacity: 1}
.wb-text i {font-style: normal; opacity: 0.72}
.wb-text .role {display: block; width: fit-content; margin: 8px 0 2px; padding: 0 7px; border-radius: 9px; font-weight: 600;
  font-family: var(--jp-ui-font-family, sans-serif); font-size: 11px; line-height: 1.6;
  border: 1px solid var(--jp-border-color1, grey); border-left-width: 5px}
.wb-text .gap {display: block; margin: 4px 0; opacity: 0.7; font-family: var(--jp-ui-font-family, sans-serif); font-size: 12px}
""".replace("WINDOW", style.WINDOW_COLOUR).replace("ENTRY", style.ENTRY_COLOUR)


def text_view(trace: Trace, layer: int, head: Head, token: int) -> str:
    """HTML of the text around query ``token`` in which a token is coloured by how much the query looks at it.

    A token's mass is what the window gives it plus the probability of every entry it is a source of, which is painted over
    all of an entry's tokens, not divided. The larger share picks the colour (entries are also underlined), the
    square root of the mass its strength. Tokens carry ``data-token``. In a long text only the 600 tokens on either side and
    the passages of the strongest sources are shown, and each gap says how much it leaves out. Of a transcript each message has
    its role above it. Raises InputError for a layer,
    head or token the trace does not have.
    """
    record = trace.layer(layer)
    check_head(record, head)
    if not 0 <= token < record.length:
        raise InputError(f"the trace has tokens 0..{record.length - 1}, got {token}")
    window, entries = painted_mass(record, head, token)
    near = NEAR_TOKENS
    while True:
        ranges = _shown(trace, layer, head, token, near)
        body = "".join(_passages(trace, token, window, entries, ranges, record.selection_only))
        if len(body.encode()) <= TEXT_BYTES or near < 2:
            break
        near //= 2
    note = (
        f"Layer {layer} ({describe_layer(record)}), {describe_head(record, head)}: where token {token} looks. "
        f"{_legend(record)} <bdi class='q'> query </bdi>"
    )
    return f"<style>{_CSS}</style><div class='wb-text'><p>{note}</p>{body}</div>"


def _legend(record: LayerTrace) -> str:
    """The colours of the places that this layer's attention goes to."""
    shown = ["<bdi class='w' style='--a:50'> window </bdi>"] if record.window else []
    if record.of_tokens:
        shown.append(f"<bdi class='e' style='--a:50'> {'chosen' if record.selects else 'attended'} tokens </bdi>")
    elif record.ratio:
        shown.append("<bdi class='e' style='--a:50'> compressed entries </bdi>")
        if record.look_back or record.ratio > 1:
            shown.append("(an entry is painted over all of its source tokens)")
    if record.selection_only:
        shown.append(
            f"Far from the query, passages of {TOP_PASSAGES} of the selected are shown, the first in the server's order."
        )
    return " ".join(shown)


def painted_mass(record: LayerTrace, head: Head, token: int) -> tuple[np.ndarray, np.ndarray]:
    """Per token, [L] each: probability through the window, and of the entries made from it, summed where they overlap.

    Where only the selection is known, 1 for every source of a kept entry.
    """
    window, entries = np.zeros(record.length, np.float32), np.zeros(record.length + 1, np.float64)
    columns, probs, stands_for = source_probs(record, head, token)
    tokens = window_columns(record)
    for column, prob, count in zip(columns.tolist(), probs.tolist(), stands_for.tolist(), strict=True):
        if column < tokens:
            window[column] = prob
        else:
            first = record.entry_tokens(column - tokens)[0]
            last = record.entry_tokens(column - tokens + count - 1)[1]
            entries[first] += prob  # a difference array: the running sum below paints the whole range
            entries[last + 1] -= prob
    mass = np.maximum(np.cumsum(entries)[:-1], 0.0).astype(np.float32)
    return window, np.minimum(mass, 1.0) if record.selection_only else mass


def _shown(trace: Trace, layer: int, head: Head, token: int, near: int) -> list[tuple[int, int]]:
    """Disjoint (start, stop) ranges in reading order: around the query, and around its strongest sources if those are far."""
    wanted = [(max(0, token - near), min(trace.length, token + near + 1))]
    for source in top_sources(trace, layer, head, token, TOP_PASSAGES):
        first, last = source["sources"][0], source["sources"][-1]
        wanted.append((max(0, first - PASSAGE_TOKENS), min(trace.length, last + PASSAGE_TOKENS + 1)))
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(wanted):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def _passages(
    trace: Trace, token: int, window: np.ndarray, entries: np.ndarray, ranges: list[tuple[int, int]], marks: bool
) -> Iterator[str]:
    end, roles = 0, roles_of(trace)
    for start, stop in ranges:
        yield _gap(end, start)
        for t in range(start, stop):
            if t in roles:
                yield _role(roles[t])
            elif t == start and (before := [first for first in roles if first < t]):
                yield _role(f"{roles[max(before)]}, continued")
            yield _token(trace.token_texts[t], t, token, float(window[t]), float(entries[t]), marks)
        end = stop
    yield _gap(end, trace.length)


def roles_of(trace: Trace) -> dict[int, str]:
    """First token -> who speaks from there on, of a trace whose prompt was a transcript; after the prompt the model does."""
    noted = trace.notes.get("roles")
    roles = {}
    for line in noted if isinstance(noted, list) else []:
        if isinstance(line, list | tuple) and len(line) == 3 and isinstance(line[0], str) and isinstance(line[1], int):
            roles[line[1]] = line[0]
    if roles and trace.prompt_length < trace.length:
        roles[trace.prompt_length] = "generated by the model"
    return roles


def _role(name: str) -> str:
    """A mark of its own, which is no part of the text."""
    return f"<span class='role' dir='ltr'>{html.escape(style.visible_text(name, MAX_TOKEN_CHARACTERS, ' '))}</span>"


def _gap(start: int, stop: int) -> str:
    return f"<span class='gap'>… {stop - start:,} tokens left out ({start}–{stop - 1}) …</span>" if stop > start else ""


def _token(text: str, t: int, query: int, window: float, entries: float, mark: bool) -> str:
    classes, attributes = [], f' data-token="{t}"'
    if window + entries >= FAINT:
        classes.append("e" if entries > window else "w")
        strength = (
            40 if mark else round(65 * min(1.0, window + entries) ** 0.5)
        )  # percent; text stays readable on the strongest
        told = "selected" if mark else f"window {window:.3g}, entries {entries:.3g}"
        attributes += f' style="--a:{strength}" title="token {t}: {told}"'
    if t == query:
        classes.append("q")
    elif t > query:
        classes.append("f")
    named = f' class="{" ".join(classes)}"' if classes else ""
    return f"<bdi{named}{attributes}>{escaped(text)}</bdi>"


def escaped(text: str) -> str:
    """A token's text, escaped; line ends, control characters and white space with nothing around it are drawn, faintly."""
    blank = not text.strip()
    shown = html.escape(style.visible_text(text, MAX_TOKEN_CHARACTERS, "·" if blank else " "), quote=True)
    return f"<i>{shown.replace('⏎', '⏎<br>')}</i>" if blank else shown.replace("⏎", "<i>⏎</i><br>")
