"""What V4.1's layers share: the released schedule as the reference lists it, and choices counted the slow way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import workbench as wb
from workbench.errors import InputError
from workbench.presets import presets
from workbench.sharing import common_choices, replay_share, shared_layers

V41 = presets["v4.1-flash"].config


def test_the_released_schedule_is_that_of_the_reference():
    """reference/deepseek-v41.md, section 1.1."""
    layers = shared_layers(V41)
    kinds = [shared.kind for shared in layers]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert counts == {"window": 2, "csa2-full": 4, "csa2-reindex": 4, "csa2-reuse": 30}
    assert [layers[n].stream_of for n in (0, 2, 7, 8, 13, 19, 20, 31, 39)] == [None, 2, 2, 8, 8, 14, 20, 20, 20]
    assert [layers[n].choice_of for n in (1, 7, 19, 23, 24, 27, 31, 35, 39)] == [None, 2, 14, 20, 24, 24, 28, 32, 36]
    assert [shared.layer for shared in layers if shared.pool_of == 20] == [24, 28, 32, 36]
    assert all(shared.pool_of in (20, None) for shared in layers)


def test_models_whose_layers_share_nothing_are_one_clear_error():
    for call in (shared_layers, lambda config: replay_share(config, 10)):
        with pytest.raises(InputError, match="only V4.1"):
            call(presets["v4-flash"].config)


@pytest.mark.parametrize(("tokens", "share"), [(1, 1.0), (128, 1.0), (1024, 0.5625), (2**20, 0.50006)])
def test_replay_runs_half_of_the_layers_on_a_window_only(tokens, share):
    assert replay_share(V41, tokens) == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True])
def test_a_prompt_that_cannot_be_is_one_clear_error(tokens):
    with pytest.raises(InputError, match="from 1 up"):
        replay_share(V41, tokens)


@pytest.fixture(scope="module")
def trace():
    model = wb.load("tiny-v41")
    run = wb.run(model, [(7 * i) % 1000 for i in range(149)], max_new_tokens=0)
    run.wait()
    return run.trace


def test_reuse_agrees_entirely_and_reindex_as_often_as_sets_say(trace):
    reuse, reindex = common_choices(trace, 3, 4), common_choices(trace, 2, 3)
    assert reuse.common == reuse.kept == 16 and reuse.queries == reindex.queries
    pool = 24 * 4
    ours, theirs = trace.layers[2].selected, trace.layers[3].selected
    slow = [len(set(ours[t]) & set(theirs[t])) for t in range(pool, trace.length)]  # token t sees t + 1 entries
    assert reindex.common == pytest.approx(np.mean(slow)) and reindex.queries == len(slow)
    assert reindex.by_chance == pytest.approx(16 * 16 / pool)


def test_without_a_pool_chance_is_over_all_that_is_visible(trace):
    own = common_choices(trace, 2, 2)
    assert own.common == 16
    assert own.by_chance == pytest.approx(np.mean([256 / (t + 1) for t in range(16, trace.length)]))


def test_layers_that_cannot_be_compared_say_why(trace):
    with pytest.raises(InputError, match="streams of layers 1 and 2"):
        common_choices(trace, 1, 2)
    with pytest.raises(InputError, match="layer 0 chooses no entries"):
        common_choices(trace, 0, 2)
    with pytest.raises(InputError, match="layer 9 chooses no entries"):
        common_choices(trace, 2, 9)
    with pytest.raises(InputError, match="only V4.1"):
        common_choices(wb.Trace.load("needle"), 1, 3)
    layers = tuple(
        replace(layer, selected=None if layer.selected is None else np.full_like(layer.selected, -1)) for layer in trace.layers
    )
    with pytest.raises(InputError, match="left an entry out"):
        common_choices(replace(trace, layers=layers), 2, 3)
