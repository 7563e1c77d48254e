"""A tiny random model of each family, run live: its trace is whole, saved and loaded equal, and every widget shows it."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import workbench as wb
from workbench.config import DenseConfig, EngramConfig, HybridConfig, LatentConfig, SharedStreamConfig, read_config
from workbench.live import run
from workbench.model.families import MODELS, model_class
from workbench.needle import find_needle, hide_needle, needle_rates, needle_trials, untrained_twin
from workbench.trace import SELECTING, Trace
from workbench.widgets.attention import AttentionExplorer
from workbench.widgets.controls import RunControls
from workbench.widgets.memory import KVCacheGrowth
from workbench.widgets.needle import NeedleAnswer, NeedleRates
from workbench.widgets.timeline import OverlapTimeline

COMMON = {"vocab_size": 53, "hidden_size": 24, "num_attention_heads": 4, "max_position_embeddings": 2**20}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
INDEX = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 5}
LATENT = {
    "num_hidden_layers": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 2,
}
DENSE = {"num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 16}
SHARED_KV = {
    "head_dim": 16,
    "qk_rope_head_dim": 4,
    "q_lora_rank": 8,
    "o_groups": 2,
    "o_lora_rank": 8,
    "sliding_window": 7,
    "hc_mult": 2,
}
ENGRAM = {"vocab_size": 59, "compressed_vocab_size": 53, "n_heads": 2, "head_dim": 4}
KINDS_V4 = ("window", "csa", "hca")
CONFIGS = {
    "v4": HybridConfig(
        **COMMON, **EXPERTS, **INDEX, **SHARED_KV, layer_kinds=KINDS_V4, mlp_kinds=("score",) * 3, csa_ratio=4, hca_ratio=16,
        engram=EngramConfig(layer_ids=(1,), **ENGRAM),
    ),
    "v4.1": SharedStreamConfig(
        **COMMON, **EXPERTS, **INDEX, **SHARED_KV, compress_ratios=(0, 2, 2, 2, 1, 1), kv_source_layer_ids=(1, 4),
        index_source_layer_ids=(1, 3, 4), engram=EngramConfig(layer_ids=(2,), max_ngram_size=4, conv_kernel_size=0, **ENGRAM),
    ),
    "v3.2": LatentConfig(**COMMON, **EXPERTS, **INDEX, **LATENT),
    "mla": LatentConfig(**COMMON, **EXPERTS, **LATENT, index_topk=0),
    "gqa": DenseConfig(**COMMON, **DENSE, num_key_value_heads=2),
    "mha": DenseConfig(**COMMON, **DENSE, num_key_value_heads=4),
}  # fmt: skip
NAMES = [name for name, config in CONFIGS.items() if type(config) in MODELS]
OF_TOKENS = ("v3.2", "mla", "gqa", "mha")
PROMPT = [int(i) for i in np.random.default_rng(3).integers(0, 53, 301)]  # more than one chunk of a prefill
BUDGET = 250_000  # bytes of a view


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def live(family):
    found = run(model_of(family), PROMPT, max_new_tokens=5)
    assert found.wait(120) and found.state == "done", found.error
    return found


def model_of(family):
    config = CONFIGS[family]
    model = model_class(config).untrained(config, seed=7)
    model.name = f"tiny {family}"
    return model


def test_every_family_there_is_is_run_here():
    assert {type(CONFIGS[name]) for name in NAMES} == set(MODELS)


def test_each_query_of_each_layer_gives_all_of_its_attention_away(live, family):
    trace = live.trace
    assert trace.length == 305 and [x.kind for x in trace.layers] == list(CONFIGS[family].layer_kinds)
    for layer in trace.layers:
        assert layer.window == (0 if family in OF_TOKENS else 7) and layer.has_sink == (family not in OF_TOKENS)
        assert layer.ratio == CONFIGS[family].compress_ratios[layer.layer] and layer.heads == 4
        total = layer.window_probs.sum(-1, dtype=np.float64) + layer.sink_probs
        for probs in (layer.selected_probs, layer.entry_probs):
            total += 0 if probs is None else probs.sum(-1, dtype=np.float64)
        np.testing.assert_allclose(total, 1.0, atol=5e-3)  # hundreds of float16 values


def test_what_was_selected_is_visible_and_what_the_scores_say(live):
    trace = live.trace
    for layer in (x for x in trace.layers if x.selects):
        chooser = trace.chooser(layer.layer)
        for t in (0, 1, 9, 255, 256, 304):
            scores, kept = chooser.index_scores(t), layer.selected[t][layer.selected[t] >= 0]
            assert len(scores) == layer.visible_entries(t) and len(kept) == min(5, len(scores))
            assert kept.tolist() == chooser.selected[t][: len(kept)].tolist() and (kept < len(scores)).all()
            left = np.delete(scores, kept)
            assert not len(left) or scores[kept].min() >= left.max() - 1e-5  # equal to rounding: order of sums
    assert (trace.notes["topk"] is None) == (not any(x.kind in SELECTING for x in trace.layers))


def test_a_trace_is_saved_and_loaded_equal(live, family, tmp_path):
    trace, again = live.trace, Trace.load(live.trace.save(tmp_path / "t"))
    assert read_config(again.config) == CONFIGS[family]
    assert (again.notes, again.token_texts, again.storage) == (trace.notes, trace.token_texts, trace.storage)
    for mine, theirs in zip((*trace.layers, *trace.engram), (*again.layers, *again.engram), strict=True):
        for name in mine.__slots__:
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), err_msg=name)
    assert {k: v.tolist() for k, v in again.cache_bytes.items()} == {k: v.tolist() for k, v in trace.cache_bytes.items()}


def test_every_widget_shows_the_run_and_follows_its_controls(live, family):
    controls, explorer, growth, timeline = (w(live) for w in (RunControls, AttentionExplorer, KVCacheGrowth, OverlapTimeline))
    assert controls.max_new_tokens.value == 5
    assert controls.topk.disabled == (family in ("mla", "gqa", "mha"))
    growth.step.value = 1
    assert timeline.step.value == 1 and explorer.token.value == live.trace.step_end(1) - 1
    held = {part for part, nbytes in live.trace.cache_bytes.items() if nbytes.any()}
    assert held <= {data.name for data in growth.figure.data} and ("kv" in held) == (family in OF_TOKENS)
    assert "L = 301 tokens" in growth.panel.value and timeline.figure.data
    assert growth.panel.value.count("= equal") >= len(held) + 1 and "NOT EQUAL" not in growth.panel.value
    assert "formula for this kind" not in growth.panel.value and any("modelled" in data.name for data in growth.figure.data)
    for record in live.trace.layers:
        explorer.layer.value = record.layer
        for head in ("max", 3):
            explorer.head.value = head
            for view in ("both", "entries", "composite"):
                explorer.view.value = view
                picture = Image.open(io.BytesIO(explorer.map.png)).convert("RGBA")
                assert picture.getextrema()[3][1] == 255 and len(picture.getcolors(1 << 20)) > 3  # something is seen
        explorer.token.value = 290
        assert explorer.view.disabled == (family in OF_TOKENS)
        assert "query token 290" in explorer.figure.layout.title.text.replace("<br>", " ")
        sent = len(explorer.map.png) + len(explorer.text.html.encode()) + len(explorer.thumbnails.html)
        assert sent + len(json.dumps(explorer.strip.outputs)) <= BUDGET
        explorer.map._handle_custom_msg({"type": "hover", "row": 40, "column": 3}, [])
        assert explorer.readout.value.startswith("Query ")


@pytest.fixture(scope="module")
def spoken(family):
    """A family's model with the tokenizer of a shipped one."""
    shipped = wb.load("tiny-v4", device="cpu")
    sizes = {"vocab_size": shipped.config.vocab_size}
    config = CONFIGS[family]
    if config.engram:
        sizes["engram"] = type(config.engram)(
            **{f: getattr(config.engram, f) for f in config.engram.__slots__} | {"compressed_vocab_size": sizes["vocab_size"]}
        )
    config = type(config)(**{f: getattr(config, f) for f in config.__slots__} | sizes)
    model = model_class(config).untrained(config, seed=7)
    model.tokenizer, model.name = shipped.tokenizer, f"tiny {family}"
    return model


def test_a_needle_is_asked_for_and_its_selection_told_where_there_is_one(spoken, family):
    text = "The quick brown fox jumps over the lazy dog. " * 20
    needle = hide_needle(spoken, text, "river", "52", 0.4, tokens=151)
    found_run = run(spoken, needle.ids, max_new_tokens=1)
    assert found_run.wait(60) and found_run.state == "done", found_run.error
    trace = found_run.trace
    found = find_needle(trace, needle)
    chosen = [x for x in trace.layers if x.selects]
    assert found["selects"] == bool(chosen) and [x["layer"] for x in found["layers"]] == [x.layer for x in chosen]
    assert found["answer"] is not None and not found["right"]  # random weights
    for look in found["layers"]:
        record = trace.layer(look["layer"])
        assert needle.position in range(
            record.entry_tokens(look["entries"][0])[0], record.entry_tokens(look["entries"][-1])[1] + 1
        )
        kept = set(record.selected[look["query"]].tolist())
        assert look["found"] == bool(kept & set(look["entries"])) and 1 <= look["rank"] <= look["visible"]
    answer = NeedleAnswer(trace, needle=needle).value
    assert ("sees every token" in answer) == (not chosen)


def test_rates_of_a_model_without_a_choice_are_recall_alone(spoken, family):
    twin = untrained_twin(spoken, seed=1)
    chooses = any(kind in SELECTING for kind in spoken.config.layer_kinds)
    for rates in (needle_rates(spoken, sequences=2), needle_trials(twin, trials=2, tokens=256)):
        assert rates["questions"] > 0 and 0 <= rates["recall"] <= 0.5
        assert bool(rates["hits"]) == chooses and (rates["hit_chance"] is not None) == chooses
        assert rates["topk"] == (5 if chooses else None)
        assert ("every token" in NeedleRates({"it": rates}).value) == (not chooses)
    if not chooses:
        with pytest.raises(wb.InputError, match="attends to every token, so there is no topk"):
            needle_rates(spoken, 2)
        with pytest.raises(wb.InputError, match="attends to every token, so there is no topk"):
            run(spoken, "Hello", topk=2)


def test_a_vocabulary_of_less_than_five_words_has_that_many_guesses(tmp_path):
    config = replace(CONFIGS["gqa"], vocab_size=3)
    found = run(model_class(config).untrained(config, seed=1), [0, 2, 1], max_new_tokens=4)
    assert found.wait(60) and found.state == "done", found.error
    again = Trace.load(found.trace.save(tmp_path / "t"))
    assert again.top_ids.shape == again.top_probs.shape == (4, 3) and again.notes["max_new_tokens"] == 4
    np.testing.assert_allclose(again.top_probs.sum(1), 1.0, rtol=1e-5)
