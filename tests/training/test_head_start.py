"""Where training of the other families starts: heads that copy near words, and heads that find what was copied."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from workbench.model.families import model_class
from workbench.recorder import Recorder
from workbench.training.head_start import DISTANCES, give_head_start
from workbench.training.recipes import RECIPES

CONFIGS = {
    "gqa": RECIPES["tiny-gqa"].config(0),
    "mla": replace(RECIPES["tiny-mla-dsa"].config(0), index_topk=0),
    "v41": replace(RECIPES["tiny-v41"].config(64), engram=None),
}
CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def layers_of(config, ids: torch.Tensor, head_start: bool = True):
    """What the layers of a model that begins training did with ``ids``."""
    model = model_class(config).untrained(config, seed=3)
    if head_start:
        give_head_start(model)
    recorder, cache = Recorder(model), model.new_cache()
    with recorder, torch.inference_mode():
        model(ids, cache, topk=ids.shape[1] if config.index_topk else None)
        recorder.finish_step(ids.shape[1], cache)
    return recorder.snapshot("here")["layers"]


def back(layer, head: int, distance: int) -> float:
    """Mean attention of a head to the token so far back."""
    t = torch.arange(20, layer.length)
    if layer.window:
        return float(layer.window_probs[t, head, layer.window - 1 - distance].astype(float).mean())
    return float(layer.entry_probs[t, head, t - distance].astype(float).mean())


def on_token(layer, query: int, token: int) -> float:
    """Attention to the entry of one token, over all heads."""
    if layer.entry_probs is not None:
        return float(layer.entry_probs[query, :, token].astype(float).sum())
    return float(layer.selected_probs[query][:, layer.selected[query] == token].astype(float).sum())


@CONFIG
def test_heads_of_the_first_layer_look_one_and_two_tokens_back(config):
    ids = torch.randint(0, config.vocab_size, (1, 211), generator=torch.Generator().manual_seed(0))
    first = layers_of(config, ids)[0]
    for head in range(4):
        assert back(first, head, DISTANCES[head % 2]) > 0.5 > back(first, head, DISTANCES[1 - head % 2])
    assert back(layers_of(config, ids, head_start=False)[0], 0, 1) < 0.2


@CONFIG
def test_a_layer_above_finds_what_followed_an_earlier_occurrence(config):
    """A word is asked for again 100 tokens later; the two tokens after its first occurrence carry a copy of it."""
    seeking, found = 2 if config.layer_kinds[0] == "window" else 1, []
    for seed in range(12):
        ids = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(seed))[:149].unsqueeze(0)
        ids[0, 140] = ids[0, 40]
        layer = layers_of(config, ids)[seeking]
        elsewhere = sum(on_token(layer, 140, token) for token in range(50, 130)) / 80
        found.append((on_token(layer, 140, 41) + on_token(layer, 140, 42)) / 2 / elsewhere)
    assert sum(found) / len(found) > 20  # times as much as a token elsewhere gets


def test_indexers_look_back_and_seek_like_their_layers():
    config = RECIPES["tiny-mla-dsa"].config(0)
    ids = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(1))[:149].unsqueeze(0)
    ids[0, 140] = ids[0, 40]
    near, seeking = (layer.selected[140].tolist() for layer in layers_of(config, ids)[:2])
    assert {138, 139} <= set(near[:8]) and {41, 42} & set(seeking[:8])
