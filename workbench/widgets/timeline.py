"""What hides behind what: lanes of a run or any other timeline, imported traces, and a modelled overlap to break."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import numpy as np
import plotly.graph_objects as go

from workbench import chrome_trace
from workbench.errors import InputError, WorkbenchError
from workbench.figures.style import CHART_CSS
from workbench.figures.timeline import overlap_chart, overlap_comparison, overlap_numbers
from workbench.profile import Profile
from workbench.trace import Timeline, Trace
from workbench.widgets.files import TraceFiles
from workbench.widgets.profile import ProfileView
from workbench.widgets.render import as_output
from workbench.widgets.session import Session, session_of
from workbench.widgets.steps import StepSlider

if TYPE_CHECKING:
    from workbench.widgets.whatif import OverlapWhatIf

COMPARED_TOKENS, COMPARED_TABLE_BYTES = 4096, 256 * 2**20
NO_ENGRAM = "This model has no Engram, so there is nothing to look up: choose tiny-v4-engram."
EXCHANGE = "Import or export a trace"
WHAT_IF = "Break the overlap (modelled)"
AHEAD = ("prefetched", "prefetch")  # what an experiment may call its runs with rows fetched ahead

# It calls progress(fraction) as it goes on, asks should_stop(), and raises WorkbenchError or returns None when stopped.
Compare = Callable[..., tuple[Timeline, Timeline] | None]


HINT = "Click a step, or a bar of this one, to choose its last token in all views; the Step slider does it by key."


class TimelineView(ipw.VBox):
    """One step of a session's timeline, all its steps to choose from, by slider or by a click, and the totals of the run."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.step = StepSlider(session)
        self.view, self.numbers = ipw.Output(), ipw.HTML()
        self.chart: dict[str, Any] = {}
        self._drawn: tuple[Any, ...] = ()
        super().__init__([self.step, self.view, session.clicks, self.numbers])
        session.observe(self._redraw, names=["trace", "step", "token", "charts"])
        self._redraw()

    @property
    def figure(self) -> go.Figure:
        return go.Figure(self.chart)

    @property
    def to_save(self) -> Timeline | Trace:
        trace = self.session.trace
        return trace if trace.cache_bytes else trace.timeline

    def _redraw(self, change: Any = None) -> None:
        with self.session.lock:
            trace, step, token = self.session.trace, self.session.step, self.session.token
            if (trace, step, token) == self._drawn or self.session.charts_wait:
                return
            self._drawn = (trace, step, token)
            chosen = f"step {step}: token {token:,}" if any(trace.token_texts) else f"step {step}"
            self.chart = overlap_chart(trace.timeline, step, chosen=chosen)
            self.view.outputs = (as_output(self.chart, self.session.click(HINT) if trace.steps > 1 else None),)
            self.numbers.value = f"<style>{CHART_CSS}</style><p>{escape(_run_numbers(trace))}</p>"


class ComparisonView(ipw.VBox):
    """A serial and a prefetched run on one axis, and what an experiment says of them."""

    def __init__(self, serial: Timeline, prefetched: Timeline, numbers: str = "") -> None:
        self.figure = overlap_comparison(serial, prefetched)
        self.view, self.numbers = ipw.Output(), ipw.HTML(f"<p>{escape(numbers)}</p>" if numbers else "")
        self.view.outputs = (as_output(self.figure),)
        super().__init__([self.view, self.numbers])


class OverlapTimeline(ipw.VBox):
    """Timelines of any source, one at a time; buttons to compare, import, export, and to break a modelled overlap.

    ``source``: a LiveRun, Trace or Session; a Timeline or what has one, such as a Schedule; several by name, or what has them
    in ``timelines`` as an overlap experiment's result does; an imported Profile; or the path of a Chrome trace. Imported files
    join the menu ``shown``. ``compare(progress=..., should_stop=...)`` returns the serial and the prefetched Timeline; by
    default the model of the run is measured. ``figure`` and ``comparison`` are the charts last drawn.
    """

    def __init__(self, source: Any, compare: Compare | None = None) -> None:
        self.session: Session | None = None
        self.views: dict[str, Any] = {}
        for name, of in _sources(source).items():
            self.views[name] = self._view_of(of)
        self.shown = ipw.Dropdown(
            options=list(self.views),
            description="Show",
            tooltip="What is drawn",
            layout=ipw.Layout(width="min(100%, 420px)"),
        )
        self.body = ipw.VBox()
        self.start = ipw.Button(
            description="Compare serial / prefetched",
            tooltip="Measure one prefill twice: rows looked up when needed, and ahead of need",
            layout=ipw.Layout(width="auto"),
        )
        self.stop = ipw.Button(description="Stop comparing", tooltip="Stop the comparison", disabled=True)
        self.progress = ipw.FloatProgress(max=1.0, description="Progress", layout=ipw.Layout(visibility="hidden"))
        self.status, self.comparison_view = ipw.HTML(), ipw.Output()
        self.comparison: Any = None
        self.exchange = ipw.ToggleButton(
            description=EXCHANGE,
            tooltip="Chrome-trace JSON, of this workbench or of torch.profiler",
            layout=ipw.Layout(width="auto"),
        )
        self.files_place = ipw.VBox()
        self._files: TraceFiles | None = None
        self.break_it = ipw.ToggleButton(
            description=WHAT_IF,
            tooltip="Controls of a modelled forward pass: layer, tokens, link",
            layout=ipw.Layout(width="auto"),
        )
        self.what_if: OverlapWhatIf | None = None
        self.what_if_place = ipw.VBox()
        self._comparer = compare
        self._stop = threading.Event()
        wrap = ipw.Layout(flex_flow="row wrap", align_items="center")
        measures: list[Any] = [self.start, self.stop, self.progress] if self.session is not None else []
        super().__init__(
            [
                self.shown,
                self.body,
                ipw.HBox(measures, layout=wrap),
                self.status,
                self.comparison_view,
                ipw.HBox([self.exchange, self.files_place, self.break_it], layout=wrap),
                self.what_if_place,
            ]
        )
        self.start.on_click(self._begin)
        self.stop.on_click(lambda _: self._stop.set())
        self.exchange.observe(self._open_files, names="value")
        self.break_it.observe(self._open_what_if, names="value")
        self.shown.observe(self._show, names="value")
        self._show()

    # -- what is on show ------------------------------------------------------------------------------------------------

    @property
    def on_show(self) -> Any:
        """The view chosen in ``shown``."""
        return self.views[self.shown.value]

    @property
    def figure(self) -> Any:
        return self.on_show.figure

    @property
    def step(self) -> StepSlider:
        return self._steps.step

    @property
    def numbers(self) -> ipw.HTML:
        return self._steps.numbers

    @property
    def timeline(self) -> Timeline:
        return self._steps.session.trace.timeline

    @property
    def _steps(self) -> TimelineView:
        """The view with steps that is on show, or the first there is."""
        views = [self.on_show, *self.views.values()]
        found = next((view for view in views if isinstance(view, TimelineView)), None)
        if found is None:
            raise InputError("only an imported profiler trace is shown, and that has no steps")
        return found

    def _view_of(self, of: Any) -> Any:
        if isinstance(of, Profile):
            return ProfileView(of)
        if isinstance(of, tuple):
            return ComparisonView(*of)
        if isinstance(of, Timeline):
            return TimelineView(Session(_trace_of(of)))
        session = session_of(of)
        self.session = session
        return TimelineView(session)

    def _show(self, change: Any = None) -> None:
        self.shown.layout.display = "" if len(self.views) > 1 else "none"
        self.body.children = (self.on_show,)
        if self._files is not None:
            self._files.can_save = isinstance(self.on_show, TimelineView)

    def _open_what_if(self, change: Any) -> None:
        if self.what_if is None:
            from workbench.widgets.whatif import OverlapWhatIf

            self.what_if = OverlapWhatIf()
        self.what_if_place.children = (self.what_if,) if change["new"] else ()

    # -- files ------------------------------------------------------------------------------------------------------------

    @property
    def files(self) -> TraceFiles:
        """The two buttons, made when first asked for: a page that is busy starting gives up on small widgets too easily."""
        if self._files is None:
            self._files = TraceFiles(self._received, self._say, self._to_save)
            self._show()
        return self._files

    def _open_files(self, change: Any) -> None:
        if not change["new"] and self._files is not None and not self._files.busy:
            self._files.close()  # so that opening again makes new ones, should these not have started
            self._files = None
        self.files_place.children = (self.files,) if change["new"] else ()

    def _to_save(self) -> tuple[str, bytes]:
        return "timeline.json", chrome_trace.dumps(self._steps.to_save)

    def _received(self, name: str, data: bytes) -> None:
        self.files.busy = True
        self._say(f"Reading {name}…")
        threading.Thread(target=self._read, args=(name, data), name="workbench-import", daemon=True).start()

    def _read(self, name: str, data: bytes) -> None:
        try:
            view = self._view_of(chrome_trace.loads(data, name))
            title, number = name, 1
            while title in self.views:
                number += 1
                title = f"{name} ({number})"
            self.views[title] = view
            self.shown.options = list(self.views)  # which puts the first on show
            self.shown.value = title
            self._say(f"Imported {name}.")
        except WorkbenchError as error:
            self._say(f"{error}.")
        except Exception as error:  # the button must come back, and the reader must see why
            self._say(f"{name} could not be read ({type(error).__name__}: {error})")
        finally:
            self.files.busy = False

    # -- the comparison -----------------------------------------------------------------------------------------------------

    def _begin(self, _: ipw.Button) -> None:
        assert self.session is not None  # the button is there only with a session
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
            self._say(f"Compared. {_own_lookup(self.session.trace) if self.session else ''}")
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


def _sources(source: Any) -> dict[str, Any]:
    """Name -> what a view is made of: a session's source, a Timeline, a Profile, or (serial, prefetched, numbers)."""
    if isinstance(source, str | Path):
        return {Path(source).name: chrome_trace.load(source)}
    if isinstance(source, Profile):
        return {source.name: source}
    if isinstance(source, Timeline):
        return {"timeline": source}
    if isinstance(source, Mapping) or hasattr(source, "timelines"):
        named = dict(_named(source if isinstance(source, Mapping) else source.timelines))
        if not named or not all(isinstance(timeline, Timeline) for timeline in named.values()):
            raise InputError(f"timelines must hold Timelines, {type(source).__name__} has {named!r:.80}")
        ahead = next((named[name] for name in AHEAD if name in named), None)
        if "serial" in named and ahead is not None:
            return {"serial against prefetched": (named["serial"], ahead, _fractions(source)), **named}
        return named
    if not isinstance(source, Trace) and isinstance(getattr(source, "timeline", None), Timeline):
        return {"timeline": source.timeline}
    return {"this run": source}


def _named(timelines: Any) -> Iterable[tuple[str, Any]]:
    """Timelines by name; those in a plain sequence, or one alone, by number."""
    if isinstance(timelines, Mapping):
        return ((str(name), timeline) for name, timeline in timelines.items())
    several = [timelines] if isinstance(timelines, Timeline) else list(timelines)
    return ((f"{i}, {getattr(timeline, 'origin', '')}", timeline) for i, timeline in enumerate(several, start=1))


def _fractions(result: Any) -> str:
    parts = {
        "hidden, 1 - stall / lookup": "hidden_fraction",
        "saved, of the shorter of compute and lookup run alone": "saved_fraction",
    }
    found = {text: getattr(result, name, None) for text, name in parts.items()}
    return "; ".join(
        f"{text}: {value:.0%}" for text, value in found.items() if isinstance(value, int | float) and value == value
    )


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
    if not trace.timeline.fetch_s:
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
