"""The break-even table of a published model: which links and drives hide the lookup, for which layer and how many tokens."""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets as ipw

from workbench.cost.fetch import PATHS, Setting, engram_models
from workbench.devices import Drive, Link, devices, drives, links
from workbench.errors import InputError
from workbench.figures.hidden import break_even_html

WAYS: tuple[Link | Drive, ...] = (
    links["pcie3"],
    links["pcie4"],
    links["pcie5"],
    links["nvlink-c2c"],
    drives["nvme-gen4"],
    drives["nvme-gen5"],
)
CHUNKS, BATCHES = (512, 8192), (1, 64)


class BreakEven(ipw.VBox):
    """Choose model, device, cards, who fetches and how many threads gather; ``html`` holds the table. All is modelled.

    A combination that cannot be is one line of ``status``, and the table stays as it was. InputError for a name there is not.
    """

    def __init__(self, model: str = "v4.1-flash", device: str = "h100", ways: tuple[Link | Drive, ...] = WAYS) -> None:
        self.ways = ways
        layout, labels = ipw.Layout(width="min(100%, 330px)"), {"description_width": "110px"}
        common: dict[str, Any] = {"layout": layout, "style": labels}
        self.model = ipw.Dropdown(
            options={m.title: m.name for m in engram_models.values()},
            value=engram_models[model].name,
            description="Model",
            **common,
        )
        self.device = ipw.Dropdown(
            options={d.title: d.name for d in devices.values()}, value=devices[device].name, description="Device", **common
        )
        self.path = ipw.Dropdown(options={text: name for name, text in PATHS.items()}, description="Who fetches", **common)
        self.threads = ipw.IntSlider(
            8, 1, 32, description="Gather threads", tooltip="CPU threads that gather rows", continuous_update=False, **common
        )
        self.cards = ipw.SelectionSlider(
            options=(1, 2, 4, 8, 16),
            description="Cards",
            tooltip="Tensor parallel: they share each block",
            continuous_update=False,
            **common,
        )
        self.status, self.html = ipw.HTML(), ipw.HTML()
        self.controls = (self.model, self.device, self.cards, self.path, self.threads)
        super().__init__([ipw.HBox(self.controls, layout=ipw.Layout(flex_flow="row wrap")), self.status, self.html])
        for control in self.controls:
            control.observe(self._redraw, names="value")
        self._redraw()

    def _redraw(self, change: Any = None) -> None:
        try:
            prefill, decode = (
                Setting(
                    model=engram_models[self.model.value],
                    device=devices[self.device.value],
                    tokens=1,
                    phase=phase,
                    path=self.path.value,
                    cards=self.cards.value,
                    threads=self.threads.value,
                )
                for phase in ("prefill", "decode")
            )
            table = break_even_html(prefill, decode, self.ways, CHUNKS, BATCHES)
        except InputError as error:
            self.status.value = f"<div role='status'>{escape(str(error))}. The table still shows the setting before.</div>"
            return
        self.status.value, self.html.value = "", table
