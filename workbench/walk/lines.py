"""Watching lines of code run: a statement is found in a function's source by a piece of it, and its variables are read after.

Nothing here knows about models. A statement that is no longer there is an error, so a walk never shows a line that the project
does not have.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from workbench.errors import WorkbenchError
from workbench.walk import SourceLine

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Statement:
    """The one simple statement of ``function`` that contains ``piece``, white space aside.

    ``owner``, a path from the layer such as "attn.indexer", says whose method it must be where several modules run the code.
    """

    function: Callable[..., Any]
    piece: str
    owner: str = ""


@cache
def find(statement: Statement) -> SourceLine:
    """Where the statement stands now. Raises WorkbenchError unless there is exactly one."""
    function = statement.function
    lines, first = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    wanted = "".join(statement.piece.split())
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            text = ast.get_source_segment(source, node) or ""
            if wanted in "".join(text.split()):
                whole = lines[node.lineno - 1 : node.end_lineno]  # its comments too: they tell shapes
                found.append((node.lineno, textwrap.dedent("".join(whole)).rstrip()))
    if len(found) != 1:
        raise WorkbenchError(
            f"{function.__module__}.{function.__qualname__} has {len(found)} statements with {statement.piece!r}, expected "
            f"one; the code has changed, so say in workbench/walk which line does this now"
        )
    path = Path(inspect.getsourcefile(function) or "").resolve()
    place = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return SourceLine(place.as_posix(), first + found[0][0] - 1, found[0][1], function.__qualname__)


class Watcher:
    """Calls ``seen(statement, variables)`` after each run of a watched statement in this thread, from ``start`` to ``stop``.

    ``variables`` are the function's locals after it, with a returned value as "return". Another tracer, a debugger's for
    instance, is put aside meanwhile and comes back.
    """

    def __init__(
        self,
        statements: Iterable[Statement],
        owner_of: Callable[[str], Any],
        seen: Callable[[Statement, dict[str, Any]], None],
    ) -> None:
        self._seen = seen
        self._watched: dict[CodeType, list[tuple[range, Statement, Any]]] = {}
        for statement in dict.fromkeys(statements):
            place = find(statement)
            lines = range(place.line, place.line + place.text.count("\n") + 1)
            owner = owner_of(statement.owner) if statement.owner else None
            code = inspect.unwrap(statement.function).__code__
            self._watched.setdefault(code, []).append((lines, statement, owner))
        self._before: Any = None
        self._on = False

    def start(self) -> None:
        self._before, self._on = sys.gettrace(), True
        sys.settrace(self._call)

    def stop(self) -> None:
        """Twice is once."""
        if self._on:
            self._on = False
            sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        watched = self._watched.get(frame.f_code)
        if watched is None:
            return None
        itself = frame.f_locals.get("self")
        mine = [(lines, statement) for lines, statement, owner in watched if owner is None or owner is itself]
        return self._follow(mine) if mine else None

    def _follow(self, mine: list[tuple[range, Statement]]) -> Any:
        """A tracer of one call: a statement has run when another line begins or the function returns."""
        running: list[tuple[range, Statement]] = []

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal running
            done = [m for m in running if event == "return" or (event == "line" and frame.f_lineno not in m[0])]
            for _, statement in done:
                self._seen(statement, {**frame.f_locals, "return": arg} if event == "return" else dict(frame.f_locals))
            if event == "line":
                running = [m for m in mine if frame.f_lineno in m[0]]
            return trace

        return trace
