"""A slider over the steps of a session, the same in every widget that has one."""

from __future__ import annotations

import threading
from typing import Any

import ipywidgets as ipw

from workbench.widgets.session import Session


class StepSlider(ipw.IntSlider):
    """Shows the session's step and changes it; a live run makes it longer as it goes."""

    _following = False

    def __init__(self, session: Session) -> None:
        super().__init__(
            description="Step",
            max=0,
            continuous_update=False,  # each stop redraws a chart
            tooltip="Step: one call of the model, a chunk of the prompt or one decoded token; the last one follows a live run",
            layout=ipw.Layout(width="min(100%, 420px)"),
        )
        self._session = session
        self._moving: int | None = None  # the thread that moves the handle itself, which is no choice of a person
        self.observe(self._chosen, names="value")
        session.observe(self._follow, names=["trace", "step"])
        self._following = True
        self._follow()

    def unfollow(self) -> None:
        """Follow the session no longer."""
        if self._following:
            self._session.unobserve(self._follow, names=["trace", "step"])
            self._following = False

    def close(self) -> None:
        self.unfollow()
        super().close()

    def _chosen(self, change: Any) -> None:
        if self._moving != threading.get_ident():
            self._session.choose_step(change["new"])

    def _follow(self, change: Any = None) -> None:
        with self._session.lock:
            trace = self._session.trace
            self._moving = threading.get_ident()
            try:
                self.max = max(0, trace.steps - 1)
                self.value = min(self._session.step, self.max)
                self.disabled = trace.steps < 2
            finally:
                self._moving = None
