"""What people see when something cannot be done: what was given, what was expected, what to do."""


class WorkbenchError(Exception):
    """A failure the workbench explains in one line; nothing that was there before is lost."""


class InputError(WorkbenchError, ValueError):
    """The caller gave something unusable; the message names it and says what to give instead."""
