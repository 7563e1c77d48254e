"""The frontier with a place for a point of one's own: choose a variant, train it in the background, see where it lands."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from html import escape
from typing import Any

import ipywidgets as ipw

from workbench.config.parts import STORAGES
from workbench.errors import WorkbenchError
from workbench.figures.frontier import frontier_chart
from workbench.frontier import SCORED_LENGTH, SHARES, STEPS, Point, Variant, frontier_points
from workbench.widgets.render import as_output

RATIOS, TOPKS, LENGTHS = (2, 4, 8, 16, 32), (1, 2, 4, 8, 16), tuple(256 * 4**power for power in range(7))
SHORT_STEPS = (20, 100, 200, STEPS, 600)
_SHARE_NAMES = {0.0: "none", 0.5: "one of two layers", 1.0: "both layers"}


class TrainYourOwn(ipw.VBox):
    """Pictures of points, and controls that train another one in this kernel, with progress and Stop.

    ``points`` are those that ship unless given; ``own`` holds the reader's, newest last; ``figure`` is the chart last drawn.
    A point that is trained again takes the place of the one before.
    """

    def __init__(self, points: Sequence[Point] | None = None) -> None:
        self.points = list(frontier_points() if points is None else points)
        self.own: list[Point] = []
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.length = _slider("Symbols held", LENGTHS, SCORED_LENGTH, "For which length bytes are counted, by formula")
        self.storage = _menu("Stored", "How the cache keeps its rows", [(name, name) for name in STORAGES], "bf16")
        self.quality = _menu("Quality", "What the height is", [("recall", "recall"), ("loss on filler", "text")], "recall")
        self.ratio = _menu("Symbols an entry", "Compression ratio of CSA layers", [(str(r), r) for r in RATIOS], 4)
        self.topk = _menu("Top-k", "Entries that a CSA query keeps", [(str(k), k) for k in TOPKS], 4)
        self.share = _menu("HCA in", "Which of the layers are HCA", [(_SHARE_NAMES[s], s) for s in SHARES], 0.5)
        self.engram = ipw.Checkbox(False, description="Engram", indent=False, layout=ipw.Layout(width="auto"))
        self.seed = ipw.BoundedIntText(
            3, 0, 9999, description="Seed", layout=ipw.Layout(width="150px"), style={"description_width": "initial"}
        )
        lengths = [(f"{n:,}" if n >= STEPS else f"{n:,} (too short to learn much)", n) for n in SHORT_STEPS]
        self.steps = _menu("Steps", "Optimiser steps; the points that ship took the full number", lengths, STEPS)
        self.train = ipw.Button(description="Train this point", button_style="primary", layout=ipw.Layout(width="auto"))
        self.stop = ipw.Button(description="Stop training", disabled=True, layout=ipw.Layout(width="auto"))
        self.bar = ipw.FloatProgress(value=0.0, min=0.0, max=1.0, layout=ipw.Layout(width="200px"))
        self.status, self.view = ipw.HTML(), ipw.Output()
        self.figure: Any = None
        wrap = ipw.Layout(flex_flow="row wrap", align_items="center")
        settings = [self.ratio, self.topk, self.share, self.engram, self.seed, self.steps]
        super().__init__(
            [
                ipw.HBox([self.quality, self.storage, self.length], layout=wrap),
                self.view,
                ipw.HTML("<b>Add a point of your own</b>"),
                ipw.HBox(settings, layout=wrap),
                ipw.HBox([self.train, self.stop, self.bar], layout=wrap),
                self.status,
            ]
        )
        for control in (self.length, self.storage, self.quality):
            control.observe(self._redraw, names="value")
        self.share.observe(self._share_chosen, names="value")
        self.train.on_click(lambda _: self.start())
        self.stop.on_click(lambda _: self.end())
        self._say("Choose a variant and press “Train this point”. It takes a minute or two of one core.")
        self._redraw()

    @property
    def variant(self) -> Variant:
        """What the controls say."""
        idle = {} if self.share.value == 1.0 else {"ratio": self.ratio.value, "topk": self.topk.value}
        return Variant(
            **idle, hca_share=self.share.value, engram=self.engram.value, seed=self.seed.value, steps=self.steps.value
        )

    def start(self) -> None:
        """What the button does. While one point trains, a second press changes nothing."""
        with self._lock:
            if self._thread is not None:
                return
            self._stop.clear()
            self._thread = threading.Thread(target=self._work, args=(self.variant,), daemon=True, name="train a point")
        self.train.disabled, self.stop.disabled, self.bar.value = True, False, 0.0
        self._say("Starting.")
        self._thread.start()

    def end(self) -> None:
        """Stop after the step under way; nothing is kept of the point."""
        self._stop.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether no training goes on any more after at most so many seconds."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return self._thread is None

    def _work(self, variant: Variant) -> None:
        try:
            from workbench.runtime import threads_for_run, use_threads
            from workbench.training.sweep import train_point

            use_threads(threads_for_run())
            point, _ = train_point(variant, progress=self._progress, stop=self._stop.is_set)
            with self._lock:
                self.own = [old for old in self.own if old.variant.name != variant.name] + [point]
            spent = point.trained_with["cpu_seconds"]
            self._say(
                f"{variant.label}, seed {variant.seed}, {variant.steps:,} steps: recalled {point.scores['recall']:.1%} (chance "
                f"{point.scores['chance']:.1%}), loss on filler {point.scores['text_loss']:.3f}, after {spent:.0f} CPU-seconds."
            )
            self._redraw()
        except Exception as error:  # whatever it was, the reader should see it and the button should work again
            said = str(error) if isinstance(error, WorkbenchError) else f"That failed: {type(error).__name__}: {error}"
            self._say(said)
        finally:
            self._thread = None
            self.train.disabled, self.stop.disabled = False, True

    def _progress(self, text: str, share: float) -> None:
        self.bar.value = share
        self._say(f"Training: {text}.")

    def _share_chosen(self, change: Any) -> None:
        self.ratio.disabled = self.topk.disabled = change["new"] == 1.0  # HCA layers have a ratio of their own and keep all

    def _redraw(self, change: Any = None) -> None:
        with self._lock:
            mine = {point.variant.name for point in self.own}
            shown = [point for point in self.points if point.variant.name not in mine] + self.own
            try:
                self.figure = frontier_chart(shown, self.quality.value, self.length.value, self.storage.value, mine)
            except WorkbenchError as error:
                self._say(str(error))
                return
            self.view.outputs = (as_output(self.figure),)

    def _say(self, text: str) -> None:
        self.status.value = f"<div role='status' aria-live='polite'>{escape(text)}</div>"


def _menu(name: str, tip: str, options: list[tuple[str, Any]], value: Any) -> ipw.Dropdown:
    return ipw.Dropdown(
        options=options, value=value, description=name, tooltip=tip, style={"description_width": "initial"},
        layout=ipw.Layout(width="auto", max_width="100%"),
    )  # fmt: skip


def _slider(name: str, values: tuple[int, ...], value: int, tip: str) -> ipw.SelectionSlider:
    return ipw.SelectionSlider(
        options=[(f"{n:,}", n) for n in sorted({*values, value})], value=value, description=name, tooltip=tip,
        continuous_update=False, style={"description_width": "initial"}, layout=ipw.Layout(width="min(100%, 380px)"),
    )  # fmt: skip
