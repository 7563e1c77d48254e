"""Hide a needle in a text of your own, ask for it, and see which entry the indexer picks; tables of how often that works."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from workbench.errors import WorkbenchError
from workbench.trace import Trace
from workbench.widgets.controls import NO_TOPK_TOOLTIP, TOPK_TOOLTIP
from workbench.widgets.session import FINAL_STATES, Session, session_of

if TYPE_CHECKING:
    from workbench.live import LiveRun
    from workbench.needle import Needle

WIDE, NARROW, LABELS = ipw.Layout(width="100%"), ipw.Layout(width="min(100%, 320px)"), {"description_width": "110px"}
MAX_TOKENS, MAX_UPLOAD_BYTES = 4096, 1_000_000
SAMPLE_CHARACTERS = 24_000  # more than MAX_TOKENS of the sample text
_CSS = (
    "<style>.wb-needle{overflow-x:auto;line-height:1.4}.wb-needle table{border-collapse:collapse;"
    "font-variant-numeric:tabular-nums}.wb-needle th,.wb-needle td{padding:2px 10px;text-align:left;vertical-align:top;"
    "border-bottom:1px solid #8886}.wb-needle td+td{white-space:nowrap}</style>"
)


class HideANeedle(ipw.VBox):
    """A text, a key, a code and a depth; "Hide and ask" runs the model on it and every widget of the session follows.

    ``model`` is the trained model. What it answered, whether each layer that chooses kept the needle, and the chance of keeping
    it by luck stand in one table, beside an untrained model of the same shape when asked for. ``needle``, or a recording's
    own one, is what the source was asked for: its table is there at once.
    """

    def __init__(self, source: LiveRun | Trace | Session, model: Any, needle: Needle | None = None) -> None:
        from workbench.needle import find_needle, sample_text  # brings in torch, which the model has brought in already
        from workbench.training.tasks import KEYS

        self.session, self.trained = session_of(source), model
        self._untrained: Any = None
        self._asked: LiveRun | None = None  # the run under way, for Stop
        self.text = ipw.Textarea(
            sample_text()[:SAMPLE_CHARACTERS],
            description="Text",
            rows=6,
            tooltip="Write or paste here",
            layout=WIDE,
            style=LABELS,
        )
        self.upload = ipw.FileUpload(
            accept=".txt,.md,.py,text/plain", description="Load a text file", layout=ipw.Layout(width="auto")
        )
        self.tokens = ipw.IntSlider(
            512, 64, MAX_TOKENS, 64, description="Tokens", tooltip="The text is cut to this length", layout=NARROW, style=LABELS
        )
        self.depth = ipw.IntSlider(
            30, 0, 100, 1, description="Depth (%)", tooltip="0: start of the text, 100: its end", layout=NARROW, style=LABELS
        )
        self.key = ipw.Combobox(
            value=KEYS[0], options=KEYS, description="Key", tooltip="What to ask for", layout=NARROW, style=LABELS
        )
        self.value = ipw.Text(
            "37", description="Code", tooltip="The models were trained on two digits", layout=NARROW, style=LABELS
        )
        most = model.config.index_topk or 0  # 0: the model attends to every token
        self.topk = ipw.IntSlider(
            max(1, most), 1, max(1, most), description="Index top-k" if most else "No top-k", disabled=not most, layout=NARROW,
            style=LABELS, tooltip=TOPK_TOOLTIP if most else NO_TOPK_TOOLTIP,
        )  # fmt: skip
        self.compare = ipw.Checkbox(False, description="also ask an untrained model", indent=False, layout=NARROW)
        self.ask = ipw.Button(description="Hide and ask", button_style="primary", tooltip="Hide the needle and run the model")
        self.stop = ipw.Button(description="Stop asking", tooltip="End the run after its step", disabled=True)
        self.sentence, self.result = ipw.HTML(), ipw.HTML()
        rows = ipw.Layout(flex_flow="row wrap")
        settings = (self.tokens, self.depth, self.key, self.value, self.topk, self.compare)
        buttons = (self.ask, self.stop, self.upload)
        super().__init__(
            [self.text, ipw.HBox(settings, layout=rows), self.sentence, ipw.HBox(buttons, layout=rows), self.result]
        )
        self.upload.observe(self._uploaded, names="value")
        self.ask.on_click(self._ask)
        self.stop.on_click(self._stop)
        for field in (self.tokens, self.depth, self.key, self.value):
            field.observe(self._show_sentence, names="value")
        self._show_sentence()
        self._say("Choose where to hide the sentence, then press “Hide and ask”.")
        trace = self.session.trace
        if needle is not None:
            self.key.value, self.value.value, self.tokens.value = needle.key, needle.value, len(needle.ids)
            self.depth.value = round(100 * needle.depth)
        if needle is not None or "needle" in trace.notes:
            found = find_needle(trace, needle)
            self._show_answers([(trace, found)])
            self._look_at(trace, found)

    def _show_sentence(self, change: Any = None) -> None:
        from workbench.training.tasks import KEYS, VALUES, needle, question

        key, value = self.key.value.strip(), self.value.value.strip()
        strange = [word for word, known in ((key, KEYS), (value, VALUES)) if word not in known]
        note = f" The shipped models never saw {' or '.join(f'“{w}”' for w in strange)} in training." if strange else ""
        hidden, asked = needle(key, value).strip(), question(key).strip()
        self.sentence.value = (
            f"<p>Hides “<b>{escape(hidden)}</b>” {self.depth.value} % into at most {self.tokens.value:,} tokens of the text, "
            f"and ends with “{escape(asked)}”.{escape(note)}</p>"
        )

    def _uploaded(self, change: Any) -> None:
        for file in change["new"]:
            if len(file["content"]) > MAX_UPLOAD_BYTES:
                self._say(f"{file['name']} has {len(file['content']):,} bytes; at most {MAX_UPLOAD_BYTES:,} are read.")
                return
            self.text.value = bytes(file["content"]).decode("utf-8", errors="replace")
            self._say(f"Loaded {file['name']}.")

    def _ask(self, _: ipw.Button) -> None:
        self.ask.disabled, self.stop.disabled = True, False
        self._say("Reading the text…")
        threading.Thread(target=self._work, name="workbench-needle", daemon=True).start()

    def _stop(self, _: ipw.Button) -> None:
        self.stop.disabled = True
        if self._asked is not None:
            self._asked.stop()

    def _work(self) -> None:
        from workbench.needle import find_needle, hide_needle, untrained_twin

        try:
            depth = self.depth.value / 100
            needle = hide_needle(self.trained, self.text.value, self.key.value, self.value.value, depth, self.tokens.value)
            earlier = self.session.run
            if earlier is not None and earlier.state not in FINAL_STATES:
                earlier.stop()  # one run at a time: two would share the cores, and only one can be watched
            answers = [self._run(self.trained, needle, watch=True)]
            if self.compare.value and not self.stop.disabled:
                self._untrained = self._untrained or untrained_twin(self.trained)
                answers.append(self._run(self._untrained, needle))
            found = [(trace, find_needle(trace, needle)) for trace in answers]
            self._show_answers(found)
            self._look_at(*found[0])
        except WorkbenchError as error:
            self._say(str(error))
        except Exception as error:  # the button must come back, and the reader must see why
            self._say(f"The needle could not be asked for ({type(error).__name__}: {error})")
        finally:
            self._asked = None
            self.ask.disabled, self.stop.disabled = False, True

    def _run(self, model: Any, needle: Any, watch: bool = False) -> Trace:
        """Ask one model for the whole code; with ``watch`` every widget of the session follows."""
        from workbench.live import run

        topk = None if self.topk.disabled else self.topk.value
        live = self._asked = run(model, needle.ids, max_new_tokens=len(needle.value_ids), topk=topk)
        if watch:
            self.session.attach(live)
        live.wait()
        if live.error:
            raise WorkbenchError(live.error)
        return live.trace

    def _look_at(self, trace: Trace, found: dict[str, Any]) -> None:
        """Turn every view to the query and the layer that ranked the needle best."""
        with self.session.lock:
            current = self.session.trace if self.session.run is None else self.session.run.trace
            if found["best_layer"] is None or current is not trace:
                return  # stopped before the question, or another run was started meanwhile
            self.session.show(trace)
            self.session.layer = found["best_layer"]
            self.session.choose_token(found["best_query"])

    def _show_answers(self, answers: list[tuple[Trace, dict[str, Any]]]) -> None:
        self.result.value = f"<div role='status' aria-live='polite'>{needle_html(answers)}</div>"

    def _say(self, message: str) -> None:
        self.result.value = f"<div role='status' aria-live='polite'>{escape(message)}</div>"


class NeedleAnswer(ipw.HTML):
    """One table: what each trace answered, and what each layer's indexer made of the needle.

    ``needle`` is what all of them were asked for; recordings remember their own.
    """

    def __init__(self, *traces: Trace, needle: Needle | None = None) -> None:
        from workbench.needle import find_needle

        super().__init__(needle_html([(trace, find_needle(trace, needle)) for trace in traces]))


class NeedleRates(ipw.HTML):
    """One table: a row for each named result of ``wb.needle_rates`` or ``wb.needle_trials``, every rate beside its chance."""

    def __init__(self, rates: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(rates_html(rates))


def needle_html(answers: list[tuple[Trace, dict[str, Any]]]) -> str:
    """Per model its answer, and per layer that chooses rank, kept or not, chance of luck and attention; all text escaped."""
    rows = []
    for trace, found in answers:
        verdict = "right" if found["right"] else "wrong"
        answer = "stopped before it answered" if found["answer"] is None else f"“{found['answer']}”: {verdict}"
        lead = [trace.label, answer]
        for layer in found["layers"]:
            place = "still in the window" if layer["rank"] is None else f"rank {layer['rank']} of {layer['visible']}"
            kept = f"{'kept' if layer['found'] else 'left out'} (top {layer['kept']})"
            share = f"{layer['best_head_probability']:.0%}" if layer["found"] else "–"
            query = f"“{trace.token_texts[layer['query']].strip()}”"
            rows.append([*lead, str(layer["layer"]), query, place, kept, f"{layer['chance']:.1%}", share])
            lead = ["", ""]
        if not found["layers"]:
            rows.append([*lead, "–", "–", "–" if found["selects"] else "nothing is left out: it sees every token", *"–––"])
    head = ("model", "answer", "layer", "looked up at", "needle's entry, by index score", "kept?",
            "chance to keep it by luck", "most attention a head gives it")  # fmt: skip
    return _table(f"Hidden: the code “{answers[0][1]['expected']}”.", head, rows)


def rates_html(rates: Mapping[str, Mapping[str, Any]]) -> str:
    """Recall and the indexers' hit rates, layer by layer and query by query, with their chance; all text escaped."""
    looks = list(dict.fromkeys(look for result in rates.values() for look in result["hits"]))
    rows = []
    for name, result in rates.items():
        hits = [f"{result['hits'][look]:.0%}" if look in result["hits"] else "–" for look in looks]
        answered = [str(result["questions"]), f"{result['recall']:.0%}", f"{result['recall_chance']:.1%}"]
        kept, luck = result["topk"], result["hit_chance"]
        kept_by_luck = "–" if luck is None else f"{luck:.0%}"
        rows.append([name, "every token" if kept is None else f"top {kept}", *answered, *hits, kept_by_luck])
    head = (
        "",
        "kept entries",
        "questions",
        "answered right",
        "chance",
        *(f"layer {look.replace(' ', ' keeps it, at the ')}" for look in looks),
        "chance",
    )
    labels = "; ".join(dict.fromkeys(str(result["model"]) for result in rates.values()))
    return _table(labels, head, rows)


def _table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"{_CSS}<div class='wb-needle'><p>{escape(title)}</p>"
        f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )
