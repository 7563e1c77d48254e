"""An agent session that was made up, to watch a long context grow: turns with roles, tool calls and token counts.

No such session was recorded: who speaks, which tool is called and how long the answers are is drawn from a seed. Only the shape
is meant to be life-like: short calls, long tool results, a context that only grows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from workbench.errors import InputError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
MADE_UP = "made-up agent session, drawn from a seed"
MILLION = 2**20
FEWEST_TOKENS, MOST_TOKENS = 1024, 2**24
# Tool -> tokens of its answers, from and to. Chosen by us.
TOOLS = {
    "list_files": (200, 1_500),
    "read_file": (1_000, 14_000),
    "search_code": (500, 5_000),
    "edit_file": (80, 400),
    "run_tests": (800, 10_000),
    "read_web_page": (3_000, 24_000),
}
SYSTEM_TOKENS, USER_TOKENS, CALL_TOKENS, ANSWER_TOKENS = (3_000, 6_000), (40, 600), (60, 900), (200, 1_500)
CALLS = (6, 24)  # between two messages of the user


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: ``what`` it is, the ``tokens`` it adds, and the ``context``, all tokens up to its end."""

    number: int
    role: Role
    what: str
    tokens: int
    context: int


def agent_session(tokens: int = MILLION, seed: int = 0) -> tuple[Turn, ...]:
    """Turns of a made-up session whose context ends at exactly ``tokens``; the last message is cut to fit.

    Raises InputError for fewer than 1,024 tokens or more than 16,777,216, and for a seed that is no whole number.
    """
    for name, value, low, high in (("tokens", tokens, FEWEST_TOKENS, MOST_TOKENS), ("seed", seed, 0, 2**31 - 1)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(f"{name} of an agent session must be a whole number from {low} to {high}, got {value!r}")
    turns: list[Turn] = []
    context = 0
    for role, what, count in _messages(random.Random(seed)):
        count = min(count, tokens - context)
        context += count
        turns.append(Turn(len(turns), role, what, count, context))
        if context == tokens:
            return tuple(turns)
    raise AssertionError("messages never end")


def _messages(draw: random.Random) -> Iterator[tuple[Role, str, int]]:
    """Without end: role, what it is, tokens."""

    def size(limits: tuple[int, int]) -> int:
        low, high = limits
        return round(low * (high / low) ** draw.random())  # as many below the geometric middle as above

    yield "system", "instructions and tool descriptions", size(SYSTEM_TOKENS)
    while True:
        yield "user", "a task", size(USER_TOKENS)
        for _ in range(draw.randint(*CALLS)):
            tool = draw.choice(sorted(TOOLS))
            yield "assistant", f"thinks, then calls {tool}", size(CALL_TOKENS)
            yield "tool", f"result of {tool}", size(TOOLS[tool])
        yield "assistant", "answers", size(ANSWER_TOKENS)
