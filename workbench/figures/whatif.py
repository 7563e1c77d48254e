"""Where hiding ends: the share of fetching that compute covers, against tokens, for every way rows can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import plotly.graph_objects as go

from workbench.cost.fetch import Setting, modelled
from workbench.devices import Drive, Link
from workbench.errors import InputError
from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, PURPLE, SKY, VERMILLION
from workbench.figures.timeline import framed

COLOURS = (GREY, SKY, BLUE, GREEN, PURPLE, PINK, ORANGE, VERMILLION)
DASHES = ("dot", "longdash", "solid", "dashdot", "longdashdot", "dash", "solid", "dash")
HEIGHT_IN_LANES = 5


def hidden_chart(setting: Setting, ways: Sequence[Link | Drive], tokens: Sequence[int]) -> go.Figure:
    """Hidden fraction against tokens, one modelled line a link or drive; the cross is ``setting`` itself."""
    fig = go.Figure()
    for way, colour, dash in zip(ways, COLOURS, DASHES, strict=False):
        hidden = [_hidden(replace(_by(setting, way), tokens=n)) for n in tokens]
        fig.add_scatter(
            name=way.title, x=list(tokens), y=hidden, mode="lines", line={"color": colour, "dash": dash, "width": 2},
            hovertemplate=f"{way.title}: %{{y:.0%}} at %{{x:,}}<extra></extra>",
        )  # fmt: skip
    try:
        here = [_hidden(setting)]
    except InputError:  # its own link is not known
        here = []
    fig.add_scatter(
        name="this setting", x=[setting.tokens] * len(here), y=here, mode="markers", hoverinfo="skip",
        marker={"symbol": "x", "size": 11, "color": GREY, "line": {"width": 2, "color": GREY}},
    )  # fmt: skip
    fig.update_xaxes(type="log", title="tokens in the chunk" if setting.phase == "prefill" else "sequences decoded together")
    fig.update_yaxes(title="hidden", range=[-0.05, 1.05], tickformat=".0%")
    layers = ("layers " if len(setting.engram_layers) > 1 else "layer ") + " and ".join(map(str, setting.engram_layers))
    note = f"modelled, virtual clock; {setting.model.title} on {setting.device.title}, Engram {layers}"
    framed(fig, "Share of fetching that compute hides, by link or drive", note, HEIGHT_IN_LANES)
    legend = {"orientation": "h", "x": 0, "y": -0.34, "yanchor": "top", "font": {"size": 11}}
    return fig.update_layout(legend=legend, margin={"b": 136}, height=fig.layout.height + 88)


def _by(setting: Setting, way: Link | Drive) -> Setting:
    """The same by another link, or from a drive over its own; a drive is read by the host, whoever fetches otherwise."""
    if isinstance(way, Link):
        return replace(setting, link=way, drive=None)
    return replace(setting, drive=way, path="staged" if setting.path == "uva" else setting.path)


def _hidden(setting: Setting) -> float:
    """0 to 1: a stall longer than the fetch, by waiting for the ids too, hides nothing rather than less."""
    return max(0.0, modelled(setting).hidden_fraction)
