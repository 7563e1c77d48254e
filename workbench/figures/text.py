"""The prompt coloured by where one query looks, as HTML that is safe to show whatever the tokens hold.

Every token's text is escaped, and characters that change the writing direction are replaced. Words of other directions stand
as people read them: a line runs the way its first letter does, and its tokens are one text to the page, so that letters join.
Colours of text and page come from JupyterLab's theme, the highlights are translucent: light and dark themes both work.
"""

from __future__ import annotations

import html
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from workbench.decoded import Decoded, Tokens, decoded
from workbench.errors import InputError, whole_number
from workbench.figures import style
from workbench.figures.attention import Head, check_head, describe_head, describe_layer, layer_of, window_columns
from workbench.figures.query import source_probs, top_sources
from workbench.trace import LayerTrace, Trace

NEAR_TOKENS = 600  # shown on either side of the query
PASSAGE_TOKENS = 24  # shown on either side of a top source farther away
TOP_PASSAGES = 6
TEXT_BYTES = 100_000  # of a view's 250 KB
FAINT = 2e-3  # less mass than this is not painted: it could not be seen
MAX_TOKEN_CHARACTERS = 80

_CSS = (
    """
.wb-text {font-family: var(--jp-code-font-family, monospace); font-size: 13px; line-height: 1.75; overflow-wrap: anywhere;
  color: var(--jp-content-font-color1, inherit); unicode-bidi: plaintext; text-align: start}
.wb-text bdi[data-token] {unicode-bidi: normal}
.wb-text p {direction: ltr; margin: 0; padding: 2px 0 6px; position: sticky; top: 0; z-index: 1;
  background: var(--jp-layout-color0, Canvas);
  font-family: var(--jp-ui-font-family, sans-serif); font-size: 12px}
.wb-text bdi {white-space: pre-wrap; padding: 1px 0; border-radius: 2px; cursor: pointer}
.wb-text bdi:hover {outline: 1px solid var(--jp-border-color1, grey)}
.wb-text .w {background: color-mix(in srgb, WINDOW calc(var(--a) * 1%), transparent)}
.wb-text .e {background: color-mix(in srgb, ENTRY calc(var(--a) * 1%), transparent); border-bottom: 2px solid ENTRY}
.wb-text .q {outline: 2px solid var(--jp-content-font-color1, currentColor)}
.wb-text .f {opacity: 0.72}
.wb-text .f i {opacity: 1}
.wb-text .m {outline: 1px dashed MATCH; outline-offset: -1px}
.wb-text .at {outline: 2px solid MATCH; background: MATCH; color: #000; opacity: 1}
.wb-text i {font-style: normal; opacity: 0.72}
.wb-text .role {display: block; width: fit-content; margin: 8px 0 2px; padding: 0 7px; border-radius: 9px; font-weight: 600;
  font-family: var(--jp-ui-font-family, sans-serif); font-size: 11px; line-height: 1.6;
  border: 1px solid var(--jp-border-color1, grey); border-left-width: 5px}
.wb-text .gap {display: block; margin: 4px 0; opacity: 0.7; font-family: var(--jp-ui-font-family, sans-serif); font-size: 12px}
""".replace("WINDOW", style.WINDOW_COLOUR)
    .replace("ENTRY", style.ENTRY_COLOUR)
    .replace("MATCH", style.ORANGE)
)


def text_view(
    trace: Trace,
    layer: int,
    head: Head,
    token: int,
    matches: Sequence[Tokens] = (),
    at: int = -1,
    *,
    show_match: bool = False,
) -> str:
    """HTML of the text around query ``token`` in which a token is coloured by how much the query looks at it.

    A token's mass is what the window gives it plus the probability of every entry it is a source of, which is painted over
    all of an entry's tokens, not divided. The larger share picks the colour (entries are also underlined), the
    square root of the mass its strength. Tokens carry ``data-token``. In a long text only the 600 tokens on either side and
    the passages of the strongest sources are shown, and each gap says how much it leaves out. Of a transcript each message has
    its role above it. Tokens that spell characters together are shown as one, which carries the number of the last.

    ``matches`` are first and last tokens of places to mark, in order; the passage around number ``at`` of them is shown too,
    and ``show_match`` has the page scroll there, not to the query. Raises InputError for a layer, head or token the trace does
    not have.
    """
    record = layer_of(trace, layer)
    check_head(record, head)
    if not 0 <= whole_number("a token", token) < record.length:
        raise InputError(f"the trace has tokens 0..{record.length - 1}, got {token}")
    window, entries = painted_mass(record, head, token)
    text = decoded(trace)
    found = matches[at] if 0 <= at < len(matches) else None
    near = NEAR_TOKENS
    while True:
        ranges = _shown(trace, text, layer, head, token, near, found)
        marks = _Marks(token, record.selection_only, matches, found, show_match)
        body = "".join(_passages(trace, text, window, entries, ranges, marks))
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


class _Marks:
    """What tokens are marked for beside how much they get; asked in reading order."""

    def __init__(
        self, query: int, selection_only: bool, matches: Sequence[Tokens], found: Tokens | None, show_match: bool
    ) -> None:
        self.query, self.selection_only, self.found, self.show_match = query, selection_only, found, show_match
        self._matches, self._ends = matches, [last for _, last in matches]

    def of(self, first: int, last: int) -> tuple[list[str], str]:
        """Classes and attributes of the unit of these tokens."""
        classes, attributes = [], ""
        if first <= self.query <= last:
            classes.append("q")
        elif first > self.query:
            classes.append("f")
        place = bisect_left(self._ends, first)
        if place < len(self._matches) and self._matches[place][0] <= last:
            classes.append("m")
            if self.found is not None and self.found[0] <= last and first <= self.found[1]:
                classes.append("at")
                if self.show_match and first == self.found[0]:
                    attributes = " data-show"
        return classes, attributes


def _shown(
    trace: Trace, text: Decoded, layer: int, head: Head, token: int, near: int, found: Tokens | None
) -> list[tuple[int, int]]:
    """Disjoint (start, stop) ranges in reading order: around the query, and its strongest sources and the match if far."""
    wanted = [(token - near, token + near)]
    for source in top_sources(trace, layer, head, token, TOP_PASSAGES):
        wanted.append((source["sources"][0] - PASSAGE_TOKENS, source["sources"][-1] + PASSAGE_TOKENS))
    if found is not None:
        first, last = found
        wanted.append((first - PASSAGE_TOKENS, min(last, first + near) + PASSAGE_TOKENS))
    merged: list[tuple[int, int]] = []
    for first, last in sorted(wanted):
        start, stop = text.unit(max(0, first))[0], text.unit(min(trace.length - 1, last))[1] + 1
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def _passages(
    trace: Trace, text: Decoded, window: np.ndarray, entries: np.ndarray, ranges: list[tuple[int, int]], marks: _Marks
) -> Iterator[str]:
    end, roles = 0, roles_of(trace)
    for start, stop in ranges:
        yield _gap(end, start)
        t = start
        while t < stop:
            first, last = text.unit(t)
            role = next((roles[r] for r in range(first, last + 1) if r in roles), None)
            if role is not None:
                yield _role(role)
            elif t == start and (before := [r for r in roles if r < t]):
                yield _role(f"{roles[max(before)]}, continued")
            strongest = first
            if first < last:
                strongest += int((window[first : last + 1] + entries[first : last + 1]).argmax())
            yield _token(text.text(first), first, last, float(window[strongest]), float(entries[strongest]), marks)
            t = last + 1
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


def _token(text: str, first: int, last: int, window: float, entries: float, marks: _Marks) -> str:
    classes, attributes = [], f' data-token="{last}"'
    name = f"token {last}" if first == last else f"tokens {first}–{last}, which spell this together"
    told = ""
    if window + entries >= FAINT:
        classes.append("e" if entries > window else "w")
        strength = (
            40 if marks.selection_only else round(65 * min(1.0, window + entries) ** 0.5)
        )  # percent; text stays readable on the strongest
        told = ": selected" if marks.selection_only else f": window {window:.3g}, entries {entries:.3g}"
        attributes += f' style="--a:{strength}"'
    if told or first < last:
        attributes += f' title="{name}{told}"'
    more, shown = marks.of(first, last)
    classes += more
    named = f' class="{" ".join(classes)}"' if classes else ""
    return f"<bdi{named}{attributes}{shown}>{escaped(text)}</bdi>"


@lru_cache(maxsize=2**13)  # a live run draws the same tokens several times a second
def escaped(text: str) -> str:
    """A token's text, escaped; line ends, control characters and white space with nothing around it are drawn, faintly."""
    blank = not text.strip()
    shown = html.escape(style.visible_text(text, MAX_TOKEN_CHARACTERS, "·" if blank else " "), quote=True)
    return f"<i>{shown.replace('⏎', '⏎<br>')}</i>" if blank else shown.replace("⏎", "<i>⏎</i><br>")
