"""An imported profiler trace: a window over its streams and threads, and a table of what lay under compute."""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets as ipw

from workbench.figures.profile import profile_chart
from workbench.profile import Profile
from workbench.widgets.render import as_output

LEAST_WINDOW_MS = 1e-3
_CSS = (
    "<style>.wb-tracks{overflow-x:auto;line-height:1.4}.wb-tracks table{border-collapse:collapse;"
    "font-variant-numeric:tabular-nums}.wb-tracks th,.wb-tracks td{padding:2px 10px;text-align:right;white-space:nowrap;"
    "border-bottom:1px solid #8886}.wb-tracks th:first-child{text-align:left}</style>"
)


class ProfileView(ipw.VBox):
    """The chart between two times, and buttons that zoom and move it. The page only gets what it can show: the kernel counts
    a window's spans together into columns of pixels, so the size of the trace does not matter to it."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        whole = max(1e3 * profile.length_s, LEAST_WINDOW_MS)
        self.window = ipw.FloatRangeSlider(
            value=(0.0, whole), min=0.0, max=whole, step=whole / 10_000, description="Window, ms", readout_format=",.3f",
            continuous_update=False, tooltip="Part of the trace to draw", style={"description_width": "initial"},
            layout=ipw.Layout(width="min(100%, 560px)"),
        )  # fmt: skip
        acts = (
            ("Zoom in", "half as long, around the middle", 0.0, 0.5),
            ("Zoom out", "twice as long", 0.0, 2.0),
            ("Earlier", "half a window back", -0.5, 1.0),
            ("Later", "half a window on", 0.5, 1.0),
            ("Whole trace", "from beginning to end", 0.0, float("inf")),
        )
        self.buttons = {
            name: ipw.Button(description=name, tooltip=tip, layout=ipw.Layout(width="auto")) for name, tip, *_ in acts
        }
        for name, _, by, times in acts:
            self.buttons[name].on_click(lambda _, by=by, times=times: self._move(by, times))
        self.view, self.table = ipw.Output(), ipw.HTML(overlap_table(profile))
        controls = ipw.HBox([self.window, *self.buttons.values()], layout=ipw.Layout(flex_flow="row wrap"))
        super().__init__([controls, self.view, self.table])
        self.window.observe(self._redraw, names="value")
        self._redraw()

    def _move(self, by: float, times: float) -> None:
        low, high = self.window.value
        whole = self.window.max
        size = min(max((high - low) * times, LEAST_WINDOW_MS), whole)
        middle = (low + high) / 2 + by * (high - low)
        low = min(max(0.0, middle - size / 2), whole - size)
        self.window.value = (low, low + size)

    def _redraw(self, change: Any = None) -> None:
        low, high = self.window.value
        self.figure = profile_chart(self.profile, low / 1e3, max(high, low + LEAST_WINDOW_MS) / 1e3)
        self.view.outputs = (as_output(self.figure),)


def overlap_table(profile: Profile) -> str:
    """Every track's busy time, and how much of it lay under others, in numbers."""
    heads = ("stream or thread", "spans", "busy, ms", "under others, ms", "exposed, ms", "under others", "GB/s")
    rows = []
    for x in profile.overlaps:
        rate = f"{x.nbytes / x.busy_s / 1e9:.3g}" if x.nbytes and x.busy_s else "–"
        share = f"{x.hidden_fraction:.0%}" if x.busy_s else "–"
        cells = (f"{x.spans:,}", f"{1e3 * x.busy_s:,.3f}", f"{1e3 * x.hidden_s:,.3f}", f"{1e3 * x.exposed_s:,.3f}", share, rate)
        rows.append(f"<tr><th scope='row'>{escape(x.name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    left = ", ".join(f"{count:,} {what}" for what, count in sorted(profile.left_out.items()))
    notes = [
        "“Under others”: copies and memory sets under kernels of their device, kernels under kernels of other streams, and a "
        "thread’s work under that of other threads. A kernel that reads host memory itself is a kernel here, not a copy.",
        f"Clocks: {profile.alignment}." if profile.alignment else "",
        f"Not drawn: {left}." if left else "",
    ]
    head = "".join(f"<th scope='col'>{name}</th>" for name in heads)
    text = "".join(f"<p>{escape(note)}</p>" for note in notes if note)
    return (
        f"{_CSS}<div class='wb-tracks'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{text}</div>"
    )
