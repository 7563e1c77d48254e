"""Hide a needle in a text of your own, ask for it, and see which entry the indexer picks."""

from __future__ import annotations

import threading
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw

from workbench.errors import WorkbenchError
from workbench.trace import Trace
from workbench.widgets.session import Session, session_of

if TYPE_CHECKING:
    from workbench.live import LiveRun

WIDE, NARROW, LABELS = ipw.Layout(width="100%"), ipw.Layout(width="min(100%, 320px)"), {"description_width": "110px"}
MAX_TOKENS, MAX_UPLOAD_BYTES = 4096, 1_000_000


class HideANeedle(ipw.VBox):
    """A text, a key, a value and a depth; "Hide and ask" runs the model on it and every widget of the session follows.

    ``model`` is the trained model. What it answered, whether each CSA layer kept the needle's entry, and the chance of finding
    it by luck stand in one table, beside an untrained model of the same shape when asked for.
    """

    def __init__(self, source: LiveRun | Trace | Session, model: Any) -> None:
        from workbench.needle import sample_text  # brings in torch, which the model has brought in already
        from workbench.training.tasks import KEYS

        self.session, self.trained = session_of(source), model
        self._untrained: Any = None
        self.text = ipw.Textarea(sample_text()[:60_000], description="Text", rows=6, layout=WIDE, style=LABELS)
        self.upload = ipw.FileUpload(accept=".txt,.md,.py,text/plain", description="Load a text file", layout=NARROW)
        self.tokens = ipw.IntSlider(
            512, 64, MAX_TOKENS, 64, description="Tokens", tooltip="The text is cut to this length", layout=NARROW, style=LABELS
        )
        self.depth = ipw.IntSlider(
            30, 0, 100, 1, description="Depth (%)", tooltip="0: start of the text, 100: its end", layout=NARROW, style=LABELS
        )
        self.key = ipw.Combobox(value=KEYS[0], options=KEYS, description="Key", layout=NARROW, style=LABELS)
        self.value = ipw.Text("37", description="Code", tooltip="Two digits", layout=NARROW, style=LABELS)
        most = model.config.index_topk
        self.topk = ipw.IntSlider(most, 1, most, description="Index top-k", layout=NARROW, style=LABELS)
        self.compare = ipw.Checkbox(False, description="also ask an untrained model", indent=False, layout=NARROW)
        self.ask = ipw.Button(description="Hide and ask", button_style="primary", tooltip="Hide the needle and run the model")
        self.result = ipw.HTML()
        rows = ipw.Layout(flex_flow="row wrap")
        settings = (self.tokens, self.depth, self.key, self.value, self.topk, self.compare)
        super().__init__(
            [self.text, ipw.HBox(settings, layout=rows), ipw.HBox((self.ask, self.upload), layout=rows), self.result]
        )
        self.upload.observe(self._uploaded, names="value")
        self.ask.on_click(self._ask)
        self._say("Choose where to hide the sentence, then press “Hide and ask”.")

    def _uploaded(self, change: Any) -> None:
        for file in change["new"]:
            if len(file["content"]) > MAX_UPLOAD_BYTES:
                self._say(f"{file['name']} has {len(file['content']):,} bytes; at most {MAX_UPLOAD_BYTES:,} are read.")
                return
            self.text.value = bytes(file["content"]).decode("utf-8", errors="replace")
            self._say(f"Loaded {file['name']}.")

    def _ask(self, _: ipw.Button) -> None:
        self.ask.disabled = True
        self._say("Running…")
        threading.Thread(target=self._work, name="workbench-needle", daemon=True).start()

    def _work(self) -> None:
        from workbench.live import run
        from workbench.needle import find_needle, hide_needle, untrained_twin

        try:
            depth = self.depth.value / 100
            needle = hide_needle(self.trained, self.text.value, self.key.value, self.value.value, depth, self.tokens.value)
            live = run(self.trained, needle.ids, max_new_tokens=1, topk=self.topk.value)
            self.session.attach(live)
            live.wait()
            if live.error:
                raise WorkbenchError(live.error)
            answers = [(live.trace, find_needle(live.trace, needle))]
            if self.compare.value:
                self._untrained = self._untrained or untrained_twin(self.trained)
                other = run(self._untrained, needle.ids, max_new_tokens=1, topk=self.topk.value)
                other.wait()
                answers.append((other.trace, find_needle(other.trace, needle)))
            self.result.value = needle_table(answers, needle.key, len(needle.ids), needle.position)
            self.session.choose_token(len(needle.ids) - 1)
        except WorkbenchError as error:
            self._say(str(error))
        except Exception as error:  # the button must come back, and the reader must see why
            self._say(f"The needle could not be asked for ({type(error).__name__}: {error})")
        finally:
            self.ask.disabled = False

    def _say(self, message: str) -> None:
        self.result.value = f"<div role='status' aria-live='polite'>{escape(message)}</div>"


def needle_table(answers: list[tuple[Trace, dict[str, Any]]], key: str, tokens: int, position: int) -> str:
    """HTML: per model its answer, and per CSA layer rank, kept or not, attention and the chance of luck; all text escaped."""
    rows = []
    for trace, found in answers:
        verdict = "right" if found["right"] else "wrong"
        answer = "stopped before it answered" if found["answer"] is None else f"{found['answer']!r} ({verdict})"
        lead = [trace.label, answer]
        for layer in found["layers"]:
            kept = f"{'kept' if layer['found'] else 'left out'}, rank {layer['rank']} of {layer['visible']}"
            share = f"{layer['best_head_probability']:.0%}" if layer["found"] else "–"
            luck = f"{layer['chance']:.1%}"
            rows.append([*lead, f"layer {layer['layer']}", kept, f"top {layer['kept']}", luck, share])
            lead = ["", ""]
    head = ("model", "answer", "CSA layer", "needle's entry", "kept in all", "chance of luck", "strongest head's attention")
    cells = "".join(f"<th style='text-align:left; padding:2px 8px'>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left; padding:2px 8px'>{escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    expected = answers[0][1]["expected"]
    title = f"Hidden: the code of {key} is {expected}, at token {position:,} of {tokens:,}."
    return (
        f"<div role='status' aria-live='polite'><p>{escape(title)}</p>"
        f"<table style='border-collapse:collapse'><tr>{cells}</tr>{body}</table></div>"
    )
