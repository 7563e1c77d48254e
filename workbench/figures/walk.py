"""One step of a walk as HTML: the list of steps, the equation, the values as numbers or colours, the line of code.

Colours carry the sign in their hue and the size in their opacity, so zero is the page itself in both themes. The HTML is safe
whatever the tokens hold.
"""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from workbench.errors import InputError
from workbench.figures.style import BLUE, GREY, VERMILLION
from workbench.figures.text import escaped
from workbench.walk import TOPICS, Step, Value, Walk

MAX_SIDE = 128  # places along one side of a strip; longer ones are pooled
MAX_NUMBERS, MAX_COLUMNS = 96, 16  # up to here a value is a table of numbers
LABELLED_ROWS = 16
STRONGEST = 70  # percent of colour behind a number; text stays readable on it, in both themes

_CSS = f"""<style>
.wb-walk {{color: var(--jp-content-font-color1, inherit); font-family: var(--jp-ui-font-family, sans-serif); font-size: 13px;
  line-height: 1.45; display: grid; grid-template-columns: minmax(180px, 270px) minmax(0, 1fr); gap: 4px 20px;
  direction: ltr; text-align: left}}
.wb-walk .head {{grid-column: 1 / -1; margin: 0}} .wb-walk p {{margin: 4px 0}}
.wb-walk ol {{margin: 0; padding-left: 2.2em; font-size: 12px; line-height: 1.6}}
.wb-walk li {{cursor: pointer; padding: 0 4px; border-radius: 3px}} .wb-walk li:hover {{outline: 1px solid #8888}}
.wb-walk li.q {{background: color-mix(in srgb, {BLUE} 25%, transparent); font-weight: bold}}
.wb-walk li.idle {{opacity: 0.72}}
.wb-walk h4 {{margin: 0 0 4px; font-size: 15px}}
.wb-walk .equation {{font-family: var(--jp-code-font-family, monospace); font-size: 15px; padding: 4px 0 6px; overflow-x: auto}}
.wb-walk figure {{margin: 6px 0 10px; overflow-x: auto}} .wb-walk figcaption {{font-size: 12px; padding-bottom: 2px}}
.wb-walk .shape, .wb-walk .range, .wb-walk .place {{opacity: 0.75; font-size: 11px}}
.wb-walk table {{border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 11px}}
.wb-walk td, .wb-walk th {{padding: 1px 5px; text-align: right; font-weight: normal; white-space: nowrap}}
.wb-walk .wide td, .wb-walk .wide th {{padding: 1px 3px; font-size: 10px}}
.wb-walk thead th {{writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: 4px 1px; opacity: 0.8}}
.wb-walk tbody th {{opacity: 0.8; text-align: left}}
.wb-walk .p {{background: color-mix(in srgb, {VERMILLION} calc(var(--a) * 1%), transparent)}}
.wb-walk .n {{background: color-mix(in srgb, {BLUE} calc(var(--a) * 1%), transparent)}}
.wb-walk .strip {{display: flex; gap: 6px}}
.wb-walk .strip img {{image-rendering: pixelated; width: min(100%, 512px); box-shadow: 0 0 0 1px #8886}}
.wb-walk .labels {{display: flex; flex-direction: column; justify-content: space-around; font-size: 10px; line-height: 1;
  white-space: nowrap; opacity: 0.8}}
.wb-walk pre {{font-family: var(--jp-code-font-family, monospace); font-size: 12px; padding: 6px 8px; margin: 0;
  overflow-x: auto; background: var(--jp-layout-color2, #8882); color: inherit; border-left: 3px solid {BLUE}}}
@media (max-width: 640px) {{.wb-walk {{grid-template-columns: minmax(0, 1fr)}}}}
</style>"""


def walk_html(walk: Walk, number: int, token_text: str) -> str:
    """Step ``number`` (from 0) of a walk, beside the list of all; list items carry ``data-token``, their number.

    Raises InputError for a step the walk does not have.
    """
    if not 0 <= number < len(walk.steps):
        raise InputError(f"the walk has steps 0..{len(walk.steps) - 1}, got {number}")
    step = walk.steps[number]
    head = f"{escape(TOPICS[walk.topic])}, layer {walk.layer}, token {walk.token} “<bdi>{escaped(token_text)}</bdi>”"
    items = "".join(_item(i, one, i == number) for i, one in enumerate(walk.steps))
    note = f"<p>{escape(step.note)}</p>" if step.note else ""
    missing = "" if step.ran else "<p><b>This line did not run for this token, so there is nothing to show.</b></p>"
    values = "".join(value_html(value) for value in step.values)
    return (
        f"{_CSS}<div class='wb-walk'><p class='head'><b>{head}</b> · {escape(walk.label)}</p><ol>{items}</ol>"
        f"<div class='step'><h4 role='status' aria-live='polite'>{number + 1} of {len(walk.steps)}: {escape(step.title)}</h4>"
        f"<div class='equation'>{escape(step.equation)}</div>{missing}{values}{_source(step)}{note}</div></div>"
    )


def _item(i: int, step: Step, chosen: bool) -> str:
    named = " ".join(name for name, on in (("q", chosen), ("idle", not step.ran)) if on)
    current = " aria-current='step'" if chosen else ""
    return f'<li class="{named}" data-token="{i}"{current}>{escape(step.title)}</li>'


def _source(step: Step) -> str:
    place = step.source
    return (
        f"<div class='place'>{escape(place.file)}, line {place.line}, in {escape(place.function)}</div>"
        f"<pre>{escape(place.text)}</pre>"
    )


def value_html(value: Value) -> str:
    """A value as a figure: its name and shape, then numbers where there are few, and coloured places where there are many."""
    array = value.array
    caption = f"<figcaption><b>{escape(value.name)}</b> <span class='shape'>{escape(value.shape.split(': ', 1)[1])}</span>"
    if array.size == 0:
        return f"<figure>{caption}: nothing yet</figcaption></figure>"
    columns = array.shape[-1] if array.ndim else 1
    few = array.size <= MAX_NUMBERS and columns <= MAX_COLUMNS
    if array.ndim < 3 and (few or array.dtype.kind in "iu"):
        cut = f" (the first {MAX_NUMBERS} of them)" if columns > MAX_NUMBERS else ""
        return f"<figure>{caption}{cut}</figcaption>{_numbers(value)}</figure>"
    return f"<figure>{caption}{_strip(value)}</figure>"


def _numbers(value: Value) -> str:
    whole = value.array.dtype.kind in "iu"
    rows = np.atleast_2d(value.array)[:, :MAX_NUMBERS]
    finite = np.abs(rows[np.isfinite(rows)])
    largest = float(finite.max()) if finite.size else 0.0
    head = "".join(f"<th scope='col'>{escape(label)}</th>" for label in value.column_labels[:MAX_NUMBERS])
    corner = "<td></td>" if value.row_labels or rows.shape[0] > 1 else ""
    body, digits = "", 3 if rows.shape[1] <= MAX_COLUMNS // 2 else 2
    for i, row in enumerate(rows[:MAX_NUMBERS]):
        axis = value.axes[0].removesuffix("s") if value.axes else ""
        label = value.row_labels[i] if value.row_labels else f"{axis} {i}"
        first = f"<th scope='row'>{escape(label)}</th>" if corner else ""
        body += f"<tr>{first}{''.join(_cell(x, largest, whole, digits) for x in row)}</tr>"
    wide = " class='wide'" if rows.shape[1] > MAX_COLUMNS // 2 else ""
    return f"<table{wide}>{f'<thead><tr>{corner}{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def _cell(x: float, largest: float, whole: bool, digits: int) -> str:
    if whole:
        return f"<td>{int(x)}</td>"
    if not np.isfinite(x):
        return f"<td>{'-∞' if x < 0 else '∞' if x > 0 else '?'}</td>"
    strength = round(STRONGEST * abs(float(x)) / largest) if largest else 0
    return f"<td class='{'n' if x < 0 else 'p'}' style='--a:{strength}'>{x:.{digits}g}</td>"


def _strip(value: Value) -> str:
    rows = np.atleast_2d(value.array.reshape(-1, value.array.shape[-1])).astype(np.float64)
    shown, factors = _pooled(rows)
    finite = rows[np.isfinite(rows)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    pooled = f", the largest of {factors[0]} × {factors[1]} places each" if factors != (1, 1) else ""
    colours = "orange above zero, blue below" if low < 0 else "the stronger the larger"
    legend = f" <span class='range'>{low:.3g} … {high:.3g} ({colours}{pooled})</span></figcaption>"
    labels = ""
    if value.row_labels and len(value.row_labels) == len(shown):
        named = value.row_labels if len(shown) <= LABELLED_ROWS else (value.row_labels[0], "⋮", value.row_labels[-1])
        labels = f"<div class='labels'>{''.join(f'<span>{escape(label)}</span>' for label in named)}</div>"
    data = base64.b64encode(strip_png(shown, max(abs(low), abs(high)))).decode()
    pixels = min(len(shown) * 14, 320) if len(shown) > 1 else 18
    described = escape(f"{value.shape}, from {low:.3g} to {high:.3g}")
    return (
        f"{legend}<div class='strip'>{labels}<img style='height:{pixels}px' alt='{described}' "
        f"src='data:image/png;base64,{data}'></div>"
    )


def _pooled(rows: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """At most MAX_SIDE rows and columns: of each cell the value that is largest whatever its sign."""
    factors = tuple(-(-side // MAX_SIDE) for side in rows.shape)
    if factors == (1, 1):
        return rows, (1, 1)
    rows = np.where(np.isfinite(rows), rows, 0.0)
    padded = np.pad(rows, [(0, -side % factor) for side, factor in zip(rows.shape, factors, strict=True)])
    blocks = padded.reshape(padded.shape[0] // factors[0], factors[0], -1, factors[1]).swapaxes(1, 2)
    cells = blocks.reshape(*blocks.shape[:2], -1)
    most = np.abs(cells).argmax(-1, keepdims=True)
    return np.take_along_axis(cells, most, axis=-1)[..., 0], (factors[0], factors[1])


def strip_png(rows: np.ndarray, largest: float) -> bytes:
    """[rows, columns] as a PNG of one pixel each: orange above zero, blue below, clear at zero, grey where infinite."""
    level = np.round(np.clip(np.nan_to_num(rows, posinf=0.0, neginf=0.0) / (largest or 1.0), -1, 1) * 127).astype(int) + 127
    level[~np.isfinite(rows)] = 255
    palette, alpha = bytearray(), bytearray()
    for i in range(255):
        palette += bytes.fromhex((VERMILLION if i > 127 else BLUE)[1:])
        alpha.append(round(255 * abs(i - 127) / 127))
    palette += bytes.fromhex(GREY[1:])
    alpha.append(90)
    image = Image.fromarray(level.astype(np.uint8), "P")
    image.putpalette(bytes(palette))
    out = io.BytesIO()
    image.save(out, "PNG", transparency=bytes(alpha), optimize=True)
    return out.getvalue()
