"""The made-up agent session: one seed, one session; it ends where asked and says what it is."""

from __future__ import annotations

import pytest

from workbench.agent import MADE_UP, ROLES, TOOLS, agent_session
from workbench.errors import InputError


@pytest.mark.parametrize("tokens", [1024, 1025, 20_011, 2**20])
def test_contexts_add_up_and_end_where_asked(tokens):
    turns = agent_session(tokens, seed=3)
    total = 0
    for number, turn in enumerate(turns):
        total += turn.tokens
        assert turn.number == number and turn.context == total and turn.tokens > 0
    assert total == tokens


def test_one_seed_is_one_session_and_another_seed_another():
    assert agent_session(50_000, 1) == agent_session(50_000, 1) != agent_session(50_000, 2)
    assert agent_session(50_000, 1)[:-1] == agent_session(90_000, 1)[: len(agent_session(50_000, 1)) - 1], (
        "the same, only longer"
    )


def test_every_call_is_answered_by_its_tool_and_results_are_most_of_the_text():
    turns = agent_session()
    assert [turn.role for turn in turns[:2]] == ["system", "user"] and {turn.role for turn in turns} == set(ROLES)
    for call, result in zip(turns, turns[1:], strict=False):
        if "calls" in call.what:
            assert result.role == "tool" and result.what.split()[-1] == call.what.split()[-1]
    results = [turn for turn in turns if turn.role == "tool"]
    assert sum(turn.tokens for turn in results) > 0.8 * turns[-1].context
    assert {turn.what.split()[-1] for turn in results} == set(TOOLS)
    for turn in results[:-1]:
        low, high = TOOLS[turn.what.split()[-1]]
        assert low <= turn.tokens <= high


def test_it_is_called_made_up():
    assert "made-up" in MADE_UP


@pytest.mark.parametrize(("tokens", "seed"), [(10, 0), (2**25, 0), (True, 0), (1e5, 0), (5000, -1), (5000, "a")])
def test_a_session_that_cannot_be_is_one_clear_error(tokens, seed):
    with pytest.raises(InputError, match="whole number from .*got"):
        agent_session(tokens, seed)
