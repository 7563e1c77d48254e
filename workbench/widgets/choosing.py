"""How many entries does an answer take? Choose a top-k, guess, and have a model asked."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import plotly.graph_objects as go

from workbench.figures.choosing import topk_curve
from workbench.widgets.render import as_output

if TYPE_CHECKING:
    from workbench.choosing import Majorities, Outcome

ALONE = "windows alone"
GUESS_FIRST = "Set a guess, lock it, and the model is asked with that many entries kept."


class TopkTrials(ipw.VBox):
    """Top-k and a guess go in, the share of questions answered right comes out; every try stays in the chart.

    ``quiz`` is a ``Majorities``. A guess is final once its top-k has been run. ``outcomes`` and ``guesses`` are by top-k, 0
    being the windows alone; ``figure`` is the chart last drawn. "Run the rest" runs a spread of others, without guesses.
    """

    def __init__(self, quiz: Majorities) -> None:
        self.quiz, self.most = quiz, int(quiz.model.config.index_topk)
        self.outcomes: dict[int, Outcome] = {}
        self.guesses: dict[int, float] = {}
        self.figure: go.Figure | None = None
        wide = {"description_width": "initial"}
        self.topk = ipw.SelectionSlider(
            options=[(ALONE, 0), *((str(k), k) for k in range(1, self.most + 1))],
            value=min(4, self.most),
            description="Entries kept (top-k)",
            continuous_update=False,
            style=wide,
            layout=ipw.Layout(width="min(100%, 420px)"),
        )
        self.guess = ipw.IntSlider(
            50, 0, 100, description="Guess: answered right (%)", style=wide, layout=ipw.Layout(width="min(100%, 420px)")
        )
        self.run = ipw.Button(description="Lock my guess and run", button_style="primary", layout=ipw.Layout(width="auto"))
        self.rest = ipw.Button(description="Run the rest", layout=ipw.Layout(width="auto"))
        self.status, self.view = ipw.HTML(), ipw.Output()
        wrap = ipw.Layout(flex_flow="row wrap", align_items="center")
        super().__init__([ipw.HBox([self.topk, self.guess], layout=wrap), ipw.HBox([self.run, self.rest], layout=wrap),
                          self.status, self.view])  # fmt: skip
        self.run.on_click(lambda _: self.try_one())
        self.rest.on_click(lambda _: self.try_rest())
        self.topk.observe(self._chosen, names="value")
        self._draw(GUESS_FIRST)

    def try_one(self) -> None:
        """What the first button does; a top-k that was run already is not asked again."""
        k = self.topk.value
        if k in self.outcomes:
            return
        guess = float(self.guess.value)
        if self._ask([k]):
            self.guesses[k] = guess
            share = 100 * self.outcomes[k].share_right
            self._draw(f"{_name(k)}: your guess {guess:.0f} %, answered right {share:.0f} %.")

    def try_rest(self) -> None:
        """What the second button does."""
        spread = [k for k in (0, 1, 2, 3, 4, 6, 8, 12, self.most) if k <= self.most and k not in self.outcomes]
        if self._ask(spread):
            self._draw("Run with every top-k that the chart shows.")

    def _ask(self, topks: list[int]) -> bool:
        self.run.disabled = self.rest.disabled = True
        try:
            for k in topks:
                self.status.value = _said(f"Asking with {_name(k)} …")
                self.outcomes[k] = self.quiz.outcome(k)
            return True
        except Exception as error:  # the reader must see why, and may try again
            self._draw(f"That failed: {' '.join(str(error).split())}. Try again.")
            return False
        finally:
            self._allow()

    def _chosen(self, change: Any) -> None:
        self._allow()
        k = self.topk.value
        self.status.value = _said(f"{_name(k)} has been run: see the chart." if k in self.outcomes else GUESS_FIRST)

    def _allow(self) -> None:
        done = self.topk.value in self.outcomes
        self.run.disabled = self.guess.disabled = done
        self.rest.disabled = False

    def _draw(self, said: str) -> None:
        self.status.value = _said(said)
        self.figure = topk_curve(self.outcomes, self.guesses, self.quiz.label, self.most)
        self.view.outputs = (as_output(self.figure),)


def _name(topk: int) -> str:
    return f"top-{topk}" if topk else ALONE


def _said(text: str) -> str:
    return f"<div role='status' aria-live='polite'>{escape(text)}</div>"
