"""What people see when something cannot be done: what was given, what was expected, what to do."""

import operator
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


class WorkbenchError(Exception):
    """A failure the workbench explains in one line; nothing that was there before is lost."""


class InputError(WorkbenchError, ValueError):
    """The caller gave something unusable; the message names it and says what to give instead."""


def whole_number(name: str, given: Any) -> int:
    """What was given, Python's or numpy's whole number, as Python's. InputError for anything else: nothing is cut off."""
    if not isinstance(given, bool):
        with suppress(TypeError):
            return operator.index(given)
    raise InputError(f"{name} must be a whole number, got {given!r:.60}")


def given_path(name: str, given: Any) -> Path:
    """A path that was given as text or a Path; InputError for anything else."""
    try:
        if os.fspath(given) and "\0" not in os.fspath(given):
            return Path(given)
    except TypeError:  # no path, or one of bytes
        pass
    raise InputError(f"{name} must be a path, got {given!r:.60}")
