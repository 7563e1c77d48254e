"""Colours and labels that all figures share, chosen to be told apart by everyone and on light and dark pages.

The qualitative colours begin from those of Okabe and Ito (2008, "Color Universal Design"); orange and sky blue are darker
here, because a line or a bar needs a contrast of 3:1 (WCAG 2.2, 1.4.11) on JupyterLab's white as well as on its dark
``#111111``. The colour map follows viridis (van der Walt and Smith, 2015), which is perceptually uniform. Charts have no
background of their own and do not know the theme of the page: no colour gives small text its 4.5:1 on both grounds, so
``CHART_CSS`` gives it the page's own ink, and GREY, alike on both (4.3:1), is left for pages without that style.
"""

from __future__ import annotations

import html
import unicodedata

import numpy as np
import plotly.graph_objects as go

BLUE, SKY, GREEN, ORANGE, VERMILLION, PINK = "#0072b2", "#3296fa", "#009e73", "#c2884e", "#d55e00", "#cc79a7"
PURPLE = "#7056a8"  # a ninth part, always hatched
GREY = "#797979"
# Titles, axes and legends of charts in the page's ink; a label inside a bar and a hover box keep the colour of their ground.
CHART_CSS = """
.js-plotly-plot :is(.infolayer, .cartesianlayer) text:not(.bartext-inside) {fill: var(--jp-ui-font-color1, #797979) !important}
"""
GRID = "rgba(125, 125, 125, 0.25)"
WINDOW_COLOUR, ENTRY_COLOUR, SINK_COLOUR = BLUE, VERMILLION, GREEN  # the three places attention goes, in every figure

_VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
_VISIBLE = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


def colour_map(levels: int) -> np.ndarray:
    """``levels`` colours from dark to bright, [levels, 3] uint8."""
    anchors = np.array([list(bytes.fromhex(colour)) for colour in _VIRIDIS], np.float64)
    at = np.linspace(0, len(anchors) - 1, levels)
    channels = [np.interp(at, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.round(np.stack(channels, axis=1)).astype(np.uint8)


def visible_text(text: str, limit: int = 24, space: str = "·") -> str:
    """A token's text on one line: white space and control characters drawn, at most ``limit`` characters. Not yet escaped."""
    shown = "".join(space if c == " " else _VISIBLE.get(c, "\ufffd" if _is_control(c) else c) for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _is_control(character: str) -> bool:
    """Characters that act instead of being seen, such as a change of writing direction, and halves of one, which no page can
    hold; joiners inside emoji are kept."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\u200c\u200d"


def chart_text(text: str) -> str:
    """Text for a title, label or hover of a chart, which would otherwise read ``<b>`` or ``&amp;`` as markup."""
    return html.escape(text, quote=False)


def styled(fig: go.Figure, title: str, height: int) -> go.Figure:
    """The same quiet frame for every chart; ``title`` may hold ``<br>``, ``height`` is in pixels."""
    fig.update_layout(
        title={
            "text": title,
            "font": {"size": 13},
            "x": 0,
            "xanchor": "left",
            "xref": "paper",
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 12},
        },
        height=height,
        autosize=True,
        template="none",
        font={"color": GREY, "size": 12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 64, "r": 16, "t": 72, "b": 48},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
        hoverlabel={"align": "left"},
    )
    fig.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=GREY, automargin=True)
    return fig.update_yaxes(gridcolor=GRID, zeroline=False, linecolor=GREY, automargin=True)
