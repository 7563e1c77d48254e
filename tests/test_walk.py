"""Walks of one token: the last step is what the model computes, steps follow from one another, lines are the project's own."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.slow_reference import CONFIG, random_model
from workbench.checkpoint import load
from workbench.errors import InputError, WorkbenchError
from workbench.model.indexer import Indexer
from workbench.model.moe import Gate
from workbench.training.recipes import _shared_stream
from workbench.walk import TOPICS, Walk, walk_token, walkable
from workbench.walk.lines import Statement, Watcher, find

ROOT = Path(__file__).parents[1]
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}  # another length is computed in other pieces; a wrong row gives 1e-1
TOKEN, LENGTH = 141, 150  # one HCA entry of 128 is complete, and tokens follow that must not matter


@pytest.fixture(scope="module")
def models():
    shipped = {name: load(name, device="cpu") for name in ("tiny-v4", "tiny-v4-engram")}
    return shipped | {"v41": random_model(_shared_stream(53, 29))}


def ids_for(model, length=LENGTH):
    return [int(i) for i in np.random.default_rng(7).integers(0, model.config.vocab_size, length)]


def forward_values(model, ids, layer):
    """What the model's own forward pass over all of ``ids`` gives in a layer, caught by hooks: topic -> [T, ...]."""
    block, seen = model.blocks[layer], {}

    def note(name, read):
        return lambda _module, _inputs, out: seen.__setitem__(name, read(out))

    def first(out):
        return (out[0] if isinstance(out, tuple) else out)[0]

    hooks = [
        block.attn.register_forward_hook(note("attention", first)),
        block.attn.attention_tap.register_forward_hook(note("selection", lambda record: record.selection)),
        block.ffn.register_forward_hook(note("moe", first)),
        block.register_forward_hook(note("mhc", first)),
    ]
    if hasattr(block, "engram"):
        hooks.append(block.engram.register_forward_hook(note("engram", first)))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


CASES = [
    *(("tiny-v4", topic, layer) for topic in ("csa", "indexer") for layer in (1, 3)),
    ("tiny-v4", "hca", 2),
    *(("tiny-v4", "mhc", layer) for layer in range(4)),
    *(("tiny-v4", "moe", layer) for layer in (0, 1)),  # hash-routed and score-routed
    ("tiny-v4-engram", "engram", 1),
    *(("v41", "csa2", layer) for layer in (1, 2, 3, 4)),  # Full at ratio 2 and 1, Reindex, Reuse
    ("v41", "mhc", 2),
    ("v41", "moe", 0),
    ("v41", "engram", 1),
]


@pytest.mark.parametrize(("name", "topic", "layer"), CASES)
def test_the_last_step_is_what_the_models_own_forward_gives(models, name, topic, layer):
    model = models[name]
    ids = ids_for(model)
    walk = walk_token(model, ids, topic, layer=layer, token=TOKEN)
    assert (walk.topic, walk.layer, walk.token, walk.kind) == (topic, layer, TOKEN, model.config.layer_kinds[layer])
    assert all(step.ran and step.values for step in walk.steps), [step.title for step in walk.steps if not step.ran]
    expected = forward_values(model, ids, layer)
    final = walk.steps[-1]
    if topic == "indexer":
        kept = min(model.config.index_topk, final.value("kept").size)
        assert final.value("kept").tolist() == expected["selection"].entries[0, TOKEN, :kept].tolist()
        np.testing.assert_allclose(final.value("scores"), expected["selection"].scores[0, TOKEN, :kept], **ROUNDING)
    else:
        wanted = expected["attention" if topic in ("csa", "hca", "csa2") else topic][TOKEN]
        assert final.values[-1].array.shape == wanted.shape and wanted.abs().max() > 0.1
        np.testing.assert_allclose(final.values[-1].array, wanted, **ROUNDING)


@pytest.mark.parametrize(("name", "topic", "layer"), CASES)
def test_every_line_shown_stands_in_the_project_where_it_says(models, name, topic, layer):
    for step in walk_token(models[name], ids_for(models[name], 9), topic, layer=layer).steps:
        lines = (ROOT / step.source.file).read_text(encoding="utf-8").splitlines()
        shown = step.source.text.splitlines()
        there = lines[step.source.line - 1 : step.source.line - 1 + len(shown)]
        assert [line.strip() for line in there] == [line.strip() for line in shown]
        assert step.source.file.startswith("workbench/model/")


def test_a_line_that_no_longer_exists_or_is_ambiguous_is_an_error():
    assert find(Statement(Indexer.forward, "q=rotate( self.wq_b(")).text.startswith("q = rotate(")  # white space aside
    with pytest.raises(WorkbenchError, match="Indexer.forward has 0 statements with 'q = twist"):
        find(Statement(Indexer.forward, "q = twist("))
    with pytest.raises(WorkbenchError, match="Gate.forward has 3 statements"):
        find(Statement(Gate.forward, "scores"[:5]))


def by_title(walk: Walk, part: str):
    return next(step for step in walk.steps if part in step.title)


@pytest.fixture(scope="module")
def csa(models):
    return walk_token(models["tiny-v4"], ids_for(models["tiny-v4"]), "csa", token=TOKEN)


def test_csa_values_follow_the_equations_shown(models, csa):
    attn = models["tiny-v4"].blocks[csa.layer].attn
    rows, gated = by_title(csa, "rows that the newest"), by_title(csa, "Gated into one")
    weights = gated.value("gate weights")
    np.testing.assert_allclose(weights.sum(0), 1.0, atol=1e-6)
    pooled = (weights * rows.value("K rows")).sum(0)
    pooled = pooled / np.sqrt((pooled**2).mean() + attn.eps) * attn.compressor.norm.weight.detach().numpy()
    np.testing.assert_allclose(gated.value("C_j before RoPE"), pooled, **ROUNDING)
    softmax, kept = by_title(csa, "One softmax"), by_title(csa, "kept entries are read").value("entries")
    window = by_title(csa, "Window keys").value("kv")
    total = softmax.value("p window").sum(1) + softmax.value("p entries").sum(1) + softmax.value("p sink")
    np.testing.assert_allclose(total, 1.0, atol=1e-5)
    summed = softmax.value("p window") @ window + softmax.value("p entries") @ kept
    np.testing.assert_allclose(by_title(csa, "weighted sum").value("o"), summed, **ROUNDING)
    entries = by_title(csa, "Turned by the position of its first").value("all C")
    chosen = by_title(csa, "K best").value("kept")
    np.testing.assert_array_equal(kept, entries[chosen])
    q = by_title(csa, "Normed, and turned").value("q")
    logits = np.concatenate([q @ window.T, q @ kept.T], axis=1) / np.sqrt(attn.head_dim)
    logits = np.concatenate([logits, attn.attn_sink.detach().numpy()[:, None]], axis=1)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(softmax.value("p window"), probs[:, : len(window)], atol=1e-5)


def test_labels_name_the_tokens_and_entries_a_place_stands_for(csa):
    window = by_title(csa, "Window keys").values[0]
    assert window.row_labels == tuple(f"token {t}" for t in range(TOKEN - 15, TOKEN + 1))
    rows = by_title(csa, "rows that the newest").values[0]
    assert rows.row_labels == tuple(f"token {t}" for t in range(132, 140))  # blocks 33 and 34; 140 and 141 are in an open one
    softmax, chosen = by_title(csa, "One softmax"), by_title(csa, "K best").value("kept")
    expected = tuple(f"entry {j}: tokens {4 * j}–{4 * j + 3}" for j in chosen)
    assert next(v for v in softmax.values if v.name == "p entries").column_labels == expected


def test_indexer_scores_are_the_weighed_products_and_the_best_are_kept(models):
    walk = walk_token(models["tiny-v4"], ids_for(models["tiny-v4"]), "indexer", token=TOKEN)
    w, products = by_title(walk, "How much each").value("w"), by_title(walk, "Products").value("products")
    scores = by_title(walk, "One score").value("I")
    assert products.min() >= 0 and scores.shape == ((TOKEN + 1) // 4,)
    np.testing.assert_allclose(scores, w @ products, **ROUNDING)
    best = np.argsort(-scores, kind="stable")[: models["tiny-v4"].config.index_topk]
    assert walk.steps[-1].value("kept").tolist() == best.tolist()
    np.testing.assert_allclose(
        products,
        np.maximum(0, by_title(walk, "Index queries").value("q^I") @ by_title(walk, "Turned by").value("all K^I").T),
        **ROUNDING,
    )


@pytest.mark.parametrize("name", ["tiny-v4", "v41"])
@pytest.mark.parametrize("token", [2, TOKEN])  # few matrices are balanced by another function
def test_mhc_streams_are_read_mixed_and_written_with_the_weights_shown(models, name, token):
    walk = walk_token(models[name], ids_for(models[name]), "mhc", layer=2, token=token)
    x, read, final = by_title(walk, "The streams, as one"), by_title(walk, "One vector is read"), walk.steps[-1]
    a, weights = by_title(walk, "Sinkhorn"), by_title(walk, "Weights to read")
    np.testing.assert_allclose(a.value("column sums − 1"), 0.0, atol=1e-5)
    np.testing.assert_allclose(a.value("row sums − 1"), a.value("A").sum(1) - 1, atol=1e-6)
    assert np.abs(by_title(walk, "begins as a row").value("column sums − 1")).max() > 1e-3  # not balanced yet
    np.testing.assert_allclose(read.value("x"), read.value("pre used") @ x.value("X"), **ROUNDING)
    assert np.allclose(read.value("pre used"), weights.value("pre")) == (name == "tiny-v4")
    y = by_title(walk, "does its work").value("y")
    written = weights.value("post")[:, None] * y + a.value("A").T @ x.value("X")
    np.testing.assert_allclose(final.value("X'"), written, **ROUNDING)


@pytest.mark.parametrize(("layer", "token"), [(0, TOKEN), (1, TOKEN), (1, 2)])
def test_moe_adds_the_weighed_experts_and_the_shared_one(models, layer, token):
    model = models["tiny-v4"]
    ids = ids_for(model)
    walk = walk_token(model, ids, "moe", layer=layer, token=token)
    scores, choice, weighed = (by_title(walk, t) for t in ("A score for", "experts are chosen", "Weights that sum"))
    chosen = choice.value("chosen")
    if model.blocks[layer].ffn.gate.hashed:
        assert choice.value("token id") == ids[token]
        assert chosen.tolist() == model.blocks[layer].ffn.gate.tid2eid[ids[token]].tolist()
    else:
        assert set(chosen) == set(np.argsort(-(scores.value("s") + choice.value("b")))[: len(chosen)])
    expected = scores.value("s")[chosen] / scores.value("s")[chosen].sum() * model.config.routed_scaling_factor
    np.testing.assert_allclose(weighed.value("w"), expected, **ROUNDING)
    if token > 3:  # fewer tokens go to their experts one by one, weighed on the way
        routed = weighed.value("w") @ by_title(walk, "chosen experts work").value("f")
        np.testing.assert_allclose(by_title(walk, "weighed and added").value("routed"), routed, **ROUNDING)
    total = by_title(walk, "weighed and added").value("routed") + by_title(walk, "shared expert, which").value("shared")
    np.testing.assert_allclose(walk.steps[-1].value("y"), total, **ROUNDING)


def test_engram_gates_scale_one_value_for_every_stream(models):
    model = models["tiny-v4-engram"]
    ids = ids_for(model)
    walk = walk_token(model, ids, "engram", token=TOKEN)
    module = model.blocks[walk.layer].engram
    canonical = model.engram_canonical_ids[torch.tensor(ids)]
    assert walk.steps[0].value("ids").tolist() == canonical[TOKEN - module.hash.orders + 1 : TOKEN + 1].tolist()
    rows, kv = by_title(walk, "Rows of the table").value("rows"), by_title(walk, "A key for each")
    np.testing.assert_array_equal(kv.value("e"), module.table.weight.detach()[torch.tensor(rows)])
    s, gate = by_title(walk, "Does the memory").value("s"), by_title(walk, "A gate for").value("gate")
    np.testing.assert_allclose(gate, 1 / (1 + np.exp(-np.sign(s) * np.sqrt(np.maximum(np.abs(s), 1e-6)))), **ROUNDING)
    value = by_title(walk, "let through").value("V")
    np.testing.assert_allclose(value, gate[:, None] * kv.value("k and v")[-1], **ROUNDING)


def test_before_the_first_block_is_complete_the_walk_says_that_lines_did_not_run(models):
    walk = walk_token(models["tiny-v4"], ids_for(models["tiny-v4"]), "hca", token=100)
    pooled = by_title(walk, "Gated into one")
    assert not pooled.ran and pooled.values == () and pooled.source.text
    assert by_title(walk, "One softmax").value("p entries").shape == (4, 0)
    first = walk_token(models["tiny-v4"], ids_for(models["tiny-v4"]), "csa", token=0)
    assert by_title(first, "One softmax").value("p window").shape == (4, 1) and first.steps[-1].ran


def test_a_model_says_what_can_be_walked(models):
    assert list(walkable(models["tiny-v4"])) == ["csa", "hca", "indexer", "mhc", "moe"]
    assert walkable(models["v41"]) == {"csa2": (1, 2, 3, 4), "mhc": (0, 1, 2, 3, 4), "moe": (0, 1, 2, 3, 4), "engram": (1,)}
    assert set(TOPICS) == {topic for model in models.values() for topic in walkable(model)}


def test_what_cannot_be_walked_is_one_clear_error(models):
    model = models["tiny-v4"]
    for settings, message in (
        ({"topic": "engram"}, "can be walked through .*'csa'.*, got 'engram'"),
        ({"topic": "csa", "layer": 2}, r"CSA attention is in layers \[1, 3\] of tiny-v4, got 2"),
        ({"topic": "csa", "token": 5}, r"token must be one of 0\.\.4, got 5"),
        ({"topic": "csa", "token": -1}, r"token must be one of 0\.\.4, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            walk_token(model, [1, 2, 3, 4, 5], **settings)
    with pytest.raises(InputError, match=r"0\.\.-1"):
        walk_token(model, [], "csa")


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_tracing_and_hooks_end_with_the_walk_also_after_an_error_and_another_tracer_comes_back():
    model = random_model(replace(CONFIG))

    def other(frame, event, arg):
        return None

    before = sys.gettrace()
    sys.settrace(other)
    try:
        walk_token(model, [1, 2, 3, 4, 5, 6, 7], "mhc", layer=1)
        after_walk = sys.gettrace()
        block = model.blocks[1]
        block.ffn.gate.weight = torch.nn.Parameter(torch.zeros(1, 1))
        with pytest.raises(RuntimeError):
            walk_token(model, [1, 2, 3], "mhc", layer=1)
        after_error = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after_walk is other and after_error is other and hooks_of(model) == 0


def doubled(values):
    out = []
    for value in values:
        out.append(
            value
            * 2
        )  # fmt: skip
    return out


def test_a_watcher_reads_variables_after_each_run_of_a_statement_even_over_several_lines():
    seen = []
    append, end = Statement(doubled, "out.append("), Statement(doubled, "return out")
    watcher = Watcher([append, end], lambda path: None, lambda s, v: seen.append((s is append, v["value"], list(v["out"]))))
    watcher.start()
    doubled([3, 4])
    watcher.stop()
    watcher.stop()
    doubled([5])  # nobody watches any more
    assert seen == [(True, 3, [6]), (True, 4, [6, 8]), (False, 4, [6, 8])]
