"""Small pictures of layers and heads, as buttons for a ``Pointer``."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

from workbench.figures.attention import Head

_CSS = """<style>
.wb-thumbs {display: flex; flex-wrap: wrap; gap: 6px; align-items: end; font: 11px var(--jp-ui-font-family, sans-serif);
  color: var(--jp-ui-font-color1, inherit); padding: 3px}
.wb-thumbs button {font: inherit; color: inherit; background: none; border: 2px solid transparent; border-radius: 3px;
  padding: 2px; cursor: pointer}
.wb-thumbs button:hover {border-color: var(--jp-border-color1, grey)}
.wb-thumbs button[aria-pressed=true] {border-color: #d55e00; font-weight: bold}
.wb-thumbs img {display: block; width: 56px; height: 56px; image-rendering: pixelated; margin: 0 auto 2px;
  box-shadow: 0 0 0 1px var(--jp-border-color2, grey)}
.wb-thumbs hr {width: 1px; height: 60px; border: 0; margin: 0 6px; background: var(--jp-border-color1, grey)}
</style>"""


def thumbnail_buttons(layers: Iterable[tuple[int, bytes]], heads: Iterable[tuple[Head, bytes]], layer: int, head: Head) -> str:
    """HTML of a button for each picture (a PNG); those of ``layer`` and ``head`` are pressed."""
    of_layers = "".join(_button("layer", n, f"layer {n}", png, n == layer) for n, png in layers)
    of_heads = "".join(_button("head", h, f"head {h}" if isinstance(h, int) else f"{h}", png, h == head) for h, png in heads)
    return f"{_CSS}<div class='wb-thumbs'>{of_layers}{'<hr>' if of_heads else ''}{of_heads}</div>"


def _button(kind: str, value: Any, name: str, png: bytes, pressed: bool) -> str:
    picture = base64.b64encode(png).decode()
    return (
        f"<button data-token='{kind}:{value}' aria-pressed='{str(pressed).lower()}' title='show {name}'>"
        f"<img alt='' src='data:image/png;base64,{picture}'>{name}</button>"
    )
