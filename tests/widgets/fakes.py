"""A LiveRun without a model: the test says what happens, and when."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from workbench.errors import WorkbenchError
from workbench.trace import Trace


class FakeRun:
    def __init__(self, trace: Trace, *, state: str = "running", model: Any = None) -> None:
        self.state, self.trace, self.model = state, trace, model or SimpleNamespace(config=SimpleNamespace(index_topk=5))
        self.progress, self.text, self.error = 0.0, "", None
        self.calls: list[str] = []
        self._callbacks: list[Any] = []

    def on_event(self, callback: Any) -> None:
        self._callbacks.append(callback)

    def becomes(self, *, kind: str = "state", **changes: Any) -> None:
        """Change some attributes and tell whoever listens."""
        for name, value in changes.items():
            setattr(self, name, value)
        for callback in self._callbacks:
            callback(SimpleNamespace(kind=kind))

    def pause(self) -> None:
        self._act("pause", "paused")

    def resume(self) -> None:
        self._act("resume", "running")

    def stop(self) -> None:
        self._act("stop", "stopped")

    def step(self) -> None:
        if self.state != "paused":
            raise WorkbenchError(f"a single step needs a paused run, this one is {self.state}")
        self._act("step", "paused")

    def _act(self, call: str, state: str) -> None:
        self.calls.append(call)
        self.becomes(state=state)


def eventually(condition: Any, what: str, timeout_s: float = 30.0) -> None:
    """Wait for another thread; fails with ``what`` when it does not happen."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"did not happen: {what}"
        time.sleep(0.01)
