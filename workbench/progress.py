"""How far a long piece of work is: drawn on a terminal, told to a callback, silent in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BAR_WIDTH = 24
Report = Callable[[float], None]  # is told the share done, 0 to 1


class Progress:
    """One line on a terminal, redrawn in place; nothing in a pipe."""

    def __init__(self) -> None:
        self.on = sys.stderr.isatty()

    def show(self, part: float, text: str) -> None:
        if self.on:
            full = round(BAR_WIDTH * min(1.0, max(0.0, part)))
            bar = "#" * full + "." * (BAR_WIDTH - full)
            print(f"\r\x1b[K[{bar}] {part:4.0%} {text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.on:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def reporting(progress: Report | None, text: str) -> Iterator[Report]:
    """Where progress is told: the given callback, else a bar named ``text`` on a terminal."""
    if progress is not None:
        yield progress
        return
    bar = Progress()
    try:
        yield lambda share: bar.show(share, text)
    finally:
        bar.clear()
