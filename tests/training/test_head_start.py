"""Where dense and MLA models start training: heads that copy near words, and heads that find what was copied."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from workbench.model.plain import PlainModel
from workbench.recorder import Recorder
from workbench.training.head_start import DISTANCES, give_head_start
from workbench.training.recipes import RECIPES

CONFIGS = {"gqa": RECIPES["tiny-gqa"].config(0), "mla": replace(RECIPES["tiny-mla-dsa"].config(0), index_topk=0)}


def attention(config, ids: torch.Tensor) -> list[torch.Tensor]:
    """Probabilities [T, H, T] of the first two layers of a model that begins training."""
    model = PlainModel.untrained(config, seed=3)
    give_head_start(model)
    recorder, cache = Recorder(model), model.new_cache()
    with recorder, torch.inference_mode():
        model(ids, cache)
        recorder.finish_step(ids.shape[1], cache)
    return [torch.from_numpy(layer.entry_probs).float() for layer in recorder.snapshot("here")["layers"][:2]]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_heads_of_the_first_layer_look_one_and_two_tokens_back(config):
    ids = torch.randint(0, config.vocab_size, (1, 211), generator=torch.Generator().manual_seed(0))
    first, t = attention(config, ids)[0], torch.arange(5, 211)
    for head in range(4):
        back = DISTANCES[head % 2]
        assert first[t, head, t - back].mean() > 0.6


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_second_layer_finds_what_followed_an_earlier_occurrence(config):
    """A word is asked for again 100 tokens later; the tokens after its first occurrence carry a copy of it."""
    length, found = 149, []
    for seed in range(12):
        ids = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(seed))[:length].unsqueeze(0)
        ids[0, 140] = ids[0, 40]
        row = attention(config, ids)[1][140].sum(0)  # over heads
        found.append(float((row[41] + row[42]) / row[50:130].mean() / 2))
    assert sum(found) / len(found) > 2  # times as much as a token elsewhere gets
