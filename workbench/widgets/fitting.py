"""Will it fit? Model, device, cards, groups, batch and a session that is replayed turn by turn, all by formula."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import ipywidgets as ipw

from workbench.agent import MADE_UP, Turn, agent_session
from workbench.cost.capacity import FORMULA, Fit, fit
from workbench.cost.filling import CARDS, Cards, Choice, Filling, all_cards_needed, filling, when_full
from workbench.cost.sequence import length_limit
from workbench.devices import devices
from workbench.errors import InputError, WorkbenchError
from workbench.figures.fitting import card_use, cards_table_html, choices_html, filling_chart
from workbench.presets import presets
from workbench.widgets.render import as_output

NARROW = ipw.Layout(width="min(100%, 330px)")
LABELS = {"description_width": "90px"}
PLAY_MS = 300
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class WillItFit(ipw.VBox):
    """A session's context against a card's memory. ``turns`` are a made-up session unless given.

    ``fit``, ``filling`` and ``choices`` are what is shown, ``bar`` and ``figure`` the charts. A combination that cannot be is a
    line of ``status``, and the charts stay as they were. Raises InputError for an unknown preset or device, and for no turns.
    """

    def __init__(
        self,
        preset: str = "v4-flash",
        device: str = "h200",
        *,
        cards: int = 8,
        tp: int = 8,
        batch: int = 8,
        turns: Sequence[Turn] | None = None,
    ) -> None:
        self.turns = tuple(agent_session() if turns is None else turns)
        if not self.turns:
            raise InputError("a session needs turns, see wb.agent_session")

        def menu(description: str, options: Any, value: Any, tooltip: str) -> ipw.Dropdown:
            if value not in [o[1] if isinstance(o, tuple) else o for o in options]:
                raise InputError(f"{description.lower()} must be one of {[o[-1:] for o in options]}, got {value!r}")
            settings = {"layout": NARROW, "style": LABELS, "tooltip": tooltip}
            return ipw.Dropdown(description=description, options=options, value=value, **settings)

        models = [(p.title + (", extrapolated" if p.name == "v3.2" else ""), p.name) for p in presets.values()]
        self.preset = menu("Model", models, presets[preset].name, "Published sizes")
        kinds = [(d.title, d.name) for d in devices.values()]
        self.device = menu("Device", kinds, devices[device].name, "Memory, formats it reads, link to the host")
        counts = [(f"{n}", n) for n in CARDS]
        self.cards = menu("Cards", counts, cards, "Devices that share the model")
        self.tp = menu("Group of", counts, tp, "Tensor parallel: cards that work on the same sequences")
        batches = [(f"{n}", n) for n in BATCHES]
        self.batch = menu("Sessions", batches, batch, "Batch: sessions of this length, each with its own cache")
        options = [(f"{turn.context:,}", turn.context) for turn in self.turns]
        self.length = ipw.SelectionSlider(
            options=options,
            index=len(options) - 1,
            description="Tokens",
            continuous_update=False,
            style=LABELS,
            layout=ipw.Layout(width="min(100%, 520px)"),
        )
        last = len(options) - 1
        self.play = ipw.Play(
            min=0,
            max=last,
            value=last,
            step=max(1, last // 40),
            interval=PLAY_MS,
            show_repeat=False,
            tooltip="Replay the session",
        )
        self.message, self.status, self.view, self.grown, self.table = (
            ipw.HTML(), ipw.HTML(), ipw.Output(), ipw.Output(), ipw.HTML(),
        )  # fmt: skip
        self.fit: Fit | None = None
        self.filling: Filling | None = None
        self.choices: tuple[Choice, ...] = ()
        self.bar: Any = None
        self.figure: Any = None
        wrap = ipw.Layout(flex_flow="row wrap")
        controls = (self.preset, self.device, self.cards, self.tp, self.batch)
        about = ipw.HTML(f"<b>Will it fit?</b> {escape(FORMULA)}; the session is a {escape(MADE_UP)}")
        replay = ipw.HBox([self.length, ipw.HTML("<span style='padding:0 8px'>Replay</span>"), self.play], layout=wrap)
        super().__init__(
            [about, ipw.HBox(controls, layout=wrap), replay, self.message, self.status, self.view, self.grown, self.table]
        )
        self.play.observe(self._played, names="value")
        for control in (*controls, self.length):
            control.observe(self._redraw, names="value")
        self._redraw()

    @property
    def turn(self) -> Turn:
        return self.turns[self.length.index]

    def _played(self, change: Any) -> None:
        self.length.index = change["new"]

    def _redraw(self, change: Any = None) -> None:
        self.play.value = self.length.index  # first of all, so that a replay begins where the page says it is
        chosen = {"cards": self.cards.value, "tp": self.tp.value}
        name, device, length = self.preset.value, self.device.value, self.length.value
        limit = length_limit(presets[name].config)
        try:
            if length > limit:
                raise InputError(f"{presets[name].title} ends at {limit:,} tokens")
            self.fit = fit(name, length, device, batch=self.batch.value, **chosen)
            self.filling = filling(
                [turn.context for turn in self.turns], name, device, batch=self.batch.value, **chosen
            )  # fmt: skip
            self.choices = when_full(name, length, device, **chosen)
        except WorkbenchError as error:
            self.status.value = f"<p role='status'>{escape(str(error))}. The charts still show the setting before.</p>"
            return
        turn = self.turn
        said = f"Turn {turn.number}, {turn.role}: {turn.what}, {turn.tokens:,} tokens."
        self.message.value = f"<div style='line-height:1.4'>{escape(said)}</div>"
        self.status.value = f"<div role='status' aria-live='polite'>{_verdict(self.fit, self.filling, self.turns)}</div>"
        self.bar, self.figure = card_use(self.fit), filling_chart([self.filling], length)
        self.view.outputs = (as_output(self.bar),)
        self.grown.outputs = (as_output(self.figure),)
        device_title = devices[device].title
        made = f"{presets[name].title} at {length:,} tokens, a card of {self.cards.value} × {device_title}"
        self.table.value = choices_html(self.choices, made)


class CardsNeeded(ipw.VBox):
    """How many cards of each device hold each model, for a length and a batch of one's choice, by formula.

    ``found`` is what the table shows.
    """

    def __init__(self, length: int = 2**20, batch: int = 1) -> None:
        lengths = [(f"{n:,}", n) for n in sorted({*(2**power for power in range(12, 21)), length})]
        self.length = ipw.SelectionSlider(
            options=lengths, value=length, description="Tokens", continuous_update=False, style=LABELS, layout=NARROW
        )
        batches = [(f"{n}", n) for n in sorted({*BATCHES, batch})]
        self.batch = ipw.SelectionSlider(
            options=batches, value=batch, description="Sessions", continuous_update=False, style=LABELS, layout=NARROW
        )
        self.table, self.status = ipw.HTML(), ipw.HTML()
        self.found: tuple[Cards, ...] = ()
        row = ipw.HBox([self.length, self.batch], layout=ipw.Layout(flex_flow="row wrap"))
        super().__init__([row, self.status, self.table])
        for control in (self.length, self.batch):
            control.observe(self._redraw, names="value")
        self._redraw()

    def _redraw(self, change: Any = None) -> None:
        try:
            self.found = all_cards_needed(self.length.value, self.batch.value)
        except WorkbenchError as error:
            self.status.value = f"<p role='status'>{escape(str(error))}</p>"
            return
        self.status.value = ""
        self.table.value = cards_table_html(self.found, self.length.value, self.batch.value)


def _verdict(found: Fit, fill: Filling, turns: Sequence[Turn]) -> str:
    """Whether it fits, until when it does, and how many sessions would."""
    weights = found.weight_bytes
    if weights is not None and weights > found.device.memory_bytes:
        return "<b>Does not fit:</b> the weights alone are more than a card has. Take more cards, or larger groups."
    text = "<b>Fits.</b>" if found.fits else "<b>Does not fit.</b>"
    if fill.full_at is not None:
        turn = turns[fill.full_at]
        text += f" Full at turn {turn.number} ({escape(turn.role)}: {escape(turn.what)}), at {turn.context:,} tokens;"
    else:
        text += " The whole session fits;"
    most = "any number" if found.most_sequences is None else f"{found.most_sequences:,}"
    text += f" with {fill.batch:,} at a time each could have {found.longest_context:,} tokens"
    text += f", and of this length {most} would fit at a time." + (
        " Beyond what the model was made for." if found.extrapolated else ""
    )
    return text + (" Its weights are unknown and left out." if weights is None else "")
