"""Break the overlap: move layer, tokens, link and the rest, and watch a modelled forward pass begin to stall."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import ipywidgets as ipw

from workbench.cost.fetch import PATHS, Setting, engram_models, masked_tokens, modelled, required_bandwidth
from workbench.devices import Drive, Link, devices, drives, links
from workbench.errors import InputError
from workbench.figures.timeline import overlap_timeline
from workbench.figures.whatif import hidden_chart
from workbench.schedule import POLICIES, Schedule
from workbench.widgets.render import as_output

WAYS: dict[str, Link | Drive] = {**{x.title: x for x in links.values()}, **{x.title: x for x in drives.values()}}
OWN_LINK = "the device's own link"
TOKENS = tuple(2**i for i in range(18))
CURVE_TOKENS = tuple(2**i for i in range(0, 21))
LAYERS = 14
# Name -> what it shows, and all that it sets.
_HIDDEN = {
    "layer": 14,
    "tokens": 8192,
    "way": OWN_LINK,
    "phase": "prefill",
    "threads": 8,
    "cards": 1,
    "hit_rate": 0,
    "path": "staged",
}
SCENARIOS: dict[str, tuple[str, dict[str, Any]]] = {
    "It hides": ("a chunk of 8,192 tokens, Engram in layer 14", _HIDDEN),
    "Layer 1": ("one block before the rows are needed, and one thread to gather them", _HIDDEN | {"layer": 1, "threads": 1}),
    "Small batch": (
        "one token on 8 cards: fixed costs exceed the window",
        _HIDDEN | {"layer": 1, "tokens": 1, "phase": "decode", "cards": 8},
    ),
    "Huge chunk": (
        "131,072 tokens: window and rows grow alike, so with too few threads the stall does, too",
        _HIDDEN | {"layer": 1, "tokens": 2**17, "threads": 2},
    ),
    "NVMe": ("a whole 4 KiB page is read for each row", _HIDDEN | {"way": drives["nvme-gen4"].title}),
}
NARROW = ipw.Layout(width="min(100%, 330px)")
LABELS = {"description_width": "110px"}


class OverlapWhatIf(ipw.VBox):
    """Controls of a `Setting`; ``schedule`` is the modelled pass on show, ``figure`` and ``curve`` its charts.

    Nothing is measured: every chart and number says it is modelled. A combination that cannot be is one line of ``status``,
    and the charts stay as they were.
    """

    def __init__(self) -> None:
        def slider(kind: Any, description: str, tooltip: str, **settings: Any) -> Any:
            common = {"continuous_update": False, "layout": NARROW, "style": LABELS}
            return kind(description=description, tooltip=tooltip, **common, **settings)

        def menu(description: str, tooltip: str, options: Any) -> ipw.Dropdown:
            return ipw.Dropdown(description=description, tooltip=tooltip, options=options, layout=NARROW, style=LABELS)

        self.model = menu("Model", "Blocks, active weights, rows and bytes", {m.title: m.name for m in engram_models.values()})
        self.device = menu("Device", "Peak rates and the link to the host", {d.title: d.name for d in devices.values()})
        self.way = menu("Rows come by", "A link from host memory, or an SSD and the device's own link", [OWN_LINK, *WAYS])
        self.path = menu("Who fetches", "How rows get to the device", {text: name for name, text in PATHS.items()})
        self.phase = menu("Pass", "What the tokens are", {"prefill: a chunk": "prefill", "decode: a batch": "decode"})
        self.layer = slider(ipw.IntSlider, "Engram layer", "First Engram layer; it needs the rows", min=1, max=LAYERS)
        self.tokens = slider(ipw.SelectionSlider, "Tokens", "In the chunk, or sequences decoded together", options=TOKENS)
        self.hit_rate = slider(ipw.IntSlider, "Hit rate, %", "Rows that a fast tier on the device holds", min=0, max=99)
        self.threads = slider(ipw.IntSlider, "Gather threads", "CPU threads that gather rows", min=1, max=32)
        self.cards = slider(ipw.SelectionSlider, "Cards", "Tensor parallel: they share each block", options=(1, 2, 4, 8, 16))
        self.controls = {
            name: getattr(self, name)
            for name in ("model", "device", "way", "path", "phase", "layer", "tokens", "hit_rate", "threads", "cards")
        }
        self.buttons = {
            name: ipw.Button(description=name, tooltip=tip, layout=ipw.Layout(width="auto"))
            for name, (tip, _) in SCENARIOS.items()
        }
        for name, button in self.buttons.items():
            button.on_click(lambda _, name=name: self.choose(name))
        self.status, self.view, self.numbers, self.curve_view = ipw.HTML(), ipw.Output(), ipw.HTML(), ipw.Output()
        self.figure: Any = None
        self.curve: Any = None
        self.schedule: Schedule | None = None
        self._choosing = False
        wrap = ipw.Layout(flex_flow="row wrap")
        about = ipw.HTML("<b>Break the overlap</b> (modelled: a virtual clock, nothing is measured)")
        super().__init__(
            [
                about,
                ipw.HBox([*self.buttons.values()], layout=wrap),
                ipw.HBox([*self.controls.values()], layout=wrap),
                self.status, self.view, self.numbers, self.curve_view,
            ]
        )  # fmt: skip
        self.device.value = "h100"
        for control in self.controls.values():
            control.observe(self._redraw, names="value")
        self.choose("It hides")

    def choose(self, scenario: str) -> None:
        """Set the controls that a scenario names and draw once."""
        self._choosing = True
        try:
            for name, value in SCENARIOS[scenario][1].items():
                self.controls[name].value = value
        finally:
            self._choosing = False
        self._redraw()

    @property
    def setting(self) -> Setting:
        """What the controls say. The model's later Engram layers stay where they are, behind the first."""
        model, way = engram_models[self.model.value], WAYS.get(self.way.value)
        later = tuple(layer for layer in model.engram_layers[1:] if layer > self.layer.value)
        return Setting(
            model=model,
            device=devices[self.device.value],
            tokens=self.tokens.value,
            phase=self.phase.value,
            link=way if isinstance(way, Link) else None,
            drive=way if isinstance(way, Drive) else None,
            path=self.path.value,
            layers=(self.layer.value, *later),
            hit_rate=self.hit_rate.value / 100,
            threads=self.threads.value,
            cards=self.cards.value,
        )

    def _redraw(self, change: Any = None) -> None:
        if self._choosing:
            return
        try:
            setting = self.setting
            self.schedule = modelled(setting)
            self.figure = overlap_timeline(self.schedule.timeline, 0, "What if")
            self.curve = hidden_chart(setting, tuple(WAYS.values()), CURVE_TOKENS)
        except InputError as error:
            self._say(f"{error}. The charts still show the setting before.")
            return
        self._say(f"Modelled: {max(0.0, self.schedule.hidden_fraction):.0%} of the fetching is hidden.")
        self.view.outputs = (as_output(self.figure),)
        self.curve_view.outputs = (as_output(self.curve),)
        self.numbers.value = _numbers(setting)

    def _say(self, text: str) -> None:
        self.status.value = f"<div role='status' aria-live='polite'>{escape(text)}</div>"


def _numbers(setting: Setting) -> str:
    """Totals of the three policies, and for each Engram layer what it would take to hide it."""
    lines = []
    for policy in POLICIES:
        made = modelled(setting, policy)
        stall = f", {1e3 * made.stall_s:,.3f} ms of it stall" if policy != "resident" else ", rows on the device"
        lines.append(f"{policy}: {1e3 * made.total_s:,.3f} ms{stall}")
    text = f"<p>{escape('Whole pass, modelled: ' + '; '.join(lines) + '.')}</p><ul>"
    for outcome in modelled(setting).layers:
        needed = required_bandwidth(setting, outcome.layer)
        ranges = masked_tokens(setting, outcome.layer)
        hides = ", ".join(f"{a:,} to {b:,}" for a, b in ranges) or "no number of"
        text += "<li>" + escape(
            f"layer {outcome.layer}: fetch {1e3 * outcome.fetch.total_s:,.3f} ms, stall {1e3 * outcome.stall_s:,.3f} ms; "
            f"the copy alone needs {needed / 1e9:,.2f} GB/s; alone on the queue it hides for {hides} tokens"
            if math.isfinite(needed)
            else f"layer {outcome.layer}: nothing computes before it"
        ) + "</li>"  # fmt: skip
    return f"<div style='line-height:1.4'>{text}</ul></div>"
