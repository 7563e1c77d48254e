"""What hides behind what: one step's lanes, and the same prefill with the lookup serial and prefetched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import numpy as np

from workbench.errors import WorkbenchError
from workbench.figures.timeline import overlap_comparison, overlap_numbers, overlap_timeline
from workbench.trace import Timeline, Trace
from workbench.widgets.render import as_output
from workbench.widgets.session import Session, session_of
from workbench.widgets.steps import StepSlider

if TYPE_CHECKING:
    from workbench.live import LiveRun

COMPARED_TOKENS, COMPARED_TABLE_BYTES = 4096, 256 * 2**20
NO_ENGRAM = "This model has no Engram, so there is nothing to look up: choose tiny-v4-engram."

# It calls progress(fraction) as it goes on, asks should_stop(), and raises WorkbenchError or returns None when stopped.
Compare = Callable[..., tuple[Timeline, Timeline] | None]


class OverlapTimeline(ipw.VBox):
    """A step slider over one timeline, and a button that measures a prefill with and without looking up ahead.

    ``compare(progress=..., should_stop=...)`` returns the serial and the prefetched Timeline; by default the model of the run
    is measured. ``figure`` and ``comparison`` are the charts last drawn.
    """

    def __init__(self, source: LiveRun | Trace | Timeline | Session, compare: Compare | None = None) -> None:
        self.session = Session(_trace_of(source)) if isinstance(source, Timeline) else session_of(source)
        self.step = StepSlider(self.session)
        self.view, self.numbers = ipw.Output(), ipw.HTML()
        self.start = ipw.Button(
            description="Compare serial / prefetched",
            tooltip="Measure one prefill twice: rows looked up when needed, and ahead of need",
            layout=ipw.Layout(width="auto"),
        )
        self.stop = ipw.Button(description="Stop comparing", tooltip="Stop the comparison", disabled=True)
        self.progress = ipw.FloatProgress(max=1.0, description="Progress", layout=ipw.Layout(visibility="hidden"))
        self.status, self.comparison_view = ipw.HTML(), ipw.Output()
        self.comparison: Any = None
        self._comparer = compare
        self._stop = threading.Event()
        self._drawn: tuple[Any, ...] = ()
        buttons = ipw.HBox([self.start, self.stop, self.progress], layout=ipw.Layout(flex_flow="row wrap"))
        super().__init__([self.step, self.view, self.numbers, buttons, self.status, self.comparison_view])
        self.start.on_click(self._begin)
        self.stop.on_click(lambda _: self._stop.set())
        self.session.observe(self._redraw, names=["trace", "step"])
        self._redraw()

    @property
    def timeline(self) -> Timeline:
        return self.session.trace.timeline

    def _redraw(self, change: Any = None) -> None:
        with self.session.lock:
            trace, step = self.session.trace, self.session.step
            if (trace, step) == self._drawn:
                return
            self._drawn = (trace, step)
            self.figure = overlap_timeline(trace.timeline, step)
            self.view.outputs = (as_output(self.figure),)
            self.numbers.value = f"<p>{escape(_run_numbers(trace))}</p>"

    def _begin(self, _: ipw.Button) -> None:
        run, compare = self.session.run, self._comparer
        if compare is None:
            if run is None:
                self._say("There is no model to measure in a recording: start a run first, or give compare=.")
                return
            if run.state == "running":  # both would want the same cores, and the timing would show it
                self._say("A run is under way and would disturb the timing: pause or stop it first.")
                return
            compare = _compare_prefill(run.model)
        self._stop.clear()
        self.start.disabled, self.stop.disabled = True, False
        self.progress.value, self.progress.layout.visibility = 0.0, "visible"
        self._say("Comparing…")
        threading.Thread(target=self._work, args=(compare,), name="workbench-compare", daemon=True).start()

    def _work(self, compare: Compare) -> None:
        try:
            pair = compare(progress=self._on_progress, should_stop=self._stop.is_set)
            if pair is None:
                self._say("Stopped; nothing was compared.")
                return
            serial, prefetched = pair
            self.comparison = overlap_comparison(serial, prefetched)
            self.comparison_view.outputs = (as_output(self.comparison),)
            self._say(f"Compared. {_own_lookup(self.session.trace)}")
        except WorkbenchError as error:
            self._say(str(error))
        except Exception as error:  # the button must come back, and the reader must see why
            self._say(f"The comparison failed with {type(error).__name__}: {error}")
        finally:
            self.progress.layout.visibility = "hidden"
            self.start.disabled, self.stop.disabled = False, True

    def _on_progress(self, fraction: float) -> None:
        self.progress.value = fraction

    def _say(self, text: str) -> None:
        self.status.value = f"<div role='status' aria-live='polite'>{escape(text)}</div>"


def _compare_prefill(model: Any) -> Compare:
    def compare(**controls: Any) -> tuple[Timeline, Timeline] | None:
        from workbench.memory.compare import compare_prefill  # brings in torch

        tokens = min(COMPARED_TOKENS, model.config.max_position_embeddings)
        return compare_prefill(model, tokens=tokens, table_bytes=COMPARED_TABLE_BYTES, **controls)

    return compare


def _trace_of(timeline: Timeline) -> Trace:
    """A timeline alone as a trace without tokens' contents, so that one slider and one session serve both."""
    steps = max((span.step for span in timeline.spans), default=-1) + 1
    order = np.arange(steps, dtype=np.int32)
    return Trace(
        "timeline", "timeline alone", timeline.device, {}, order, ("",) * steps, 0, timeline=timeline, step_starts=order
    )


def _run_numbers(trace: Trace) -> str:
    if not trace.timeline.lookup_s:
        return NO_ENGRAM if trace.config and not trace.config.get("engram_layer_ids") else "Nothing was looked up."
    return f"Whole run, {trace.steps} steps: {overlap_numbers(trace.timeline)}."


def _own_lookup(trace: Trace) -> str:
    """How little of a toy's own run its lookup takes: why the comparison needs a table made for timing."""
    steps: dict[int, list[float]] = {}
    for span in trace.timeline.spans:
        steps.setdefault(span.step, []).extend((span.start_s, span.end_s))
    total = 1e3 * sum(max(times) - min(times) for times in steps.values())
    lookup = 1e3 * trace.timeline.lookup_s
    if not lookup:
        return ""
    return f"In the run above, the model's own lookup took {lookup:.2f} ms of {total:.2f} ms ({lookup / total:.1%})."
