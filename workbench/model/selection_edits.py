"""Change what layers attend to, for a while and in one thread: entries dropped, forced in or chosen some other way.

Used to ask what a choice is worth (``workbench.microscope``). Without edits nothing is different and nothing is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from workbench.model.indexer import Selection

# The position of the first query and the selection of T queries, [B, T, K] -> what they attend to instead, [B, T, any K], each
# entry once and complete at its query, -1 where there is none.
SelectionEdit = Callable[[int, Selection], Selection]

_edits: ContextVar[Mapping[nn.Module, SelectionEdit] | None] = ContextVar("selection edits", default=None)


@contextmanager
def edited_selections(edits: Mapping[nn.Module, SelectionEdit]) -> Iterator[None]:
    """Within the block, and for calls of this thread alone, each attention layer of ``edits`` attends to what its edit returns.

    In V4.1 a layer that chooses hands its edited choice on to the layers that reuse it, as it does its own.
    """
    before = _edits.set(edits)
    try:
        yield
    finally:
        _edits.reset(before)


def edit_of(attention: nn.Module) -> SelectionEdit | None:
    """The edit in force for a layer's attention."""
    edits = _edits.get()
    return None if edits is None else edits.get(attention)


def editing() -> bool:
    """Whether any layer's selection is edited in this thread."""
    return bool(_edits.get())
