"""Training at a size that takes seconds: who learns from what, that it learns, and that an interrupted run ends alike."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.slow_reference import CONFIG, ENGRAM, random_ids, random_model
from workbench.checkpoint import load
from workbench.errors import InputError, WorkbenchError
from workbench.model.attention.hybrid import Attention
from workbench.model.engram import canonical_ids
from workbench.model.indexer import Selection
from workbench.recorder import selecting_attention
from workbench.training import tally, tasks, train
from workbench.training.optimiser import Muon, optimisers, orthogonalise
from workbench.training.recipes import RECIPES, Phase, recipe_named

STEPS = 10
PREPARE = train.prepare  # the real one; most tests here go without its text
RECIPE = replace(
    RECIPES["tiny-v4-engram"],
    name="smoke",
    phases=(Phase(steps=6, length=67, batch=4), Phase(steps=4, length=131, batch=4)),
    warmup_steps=2,
)


@pytest.fixture(scope="module")
def data() -> train.Data:
    text = tasks.heldout_sample(100_000)
    tokenizer = tasks.train_tokenizer([text], RECIPE.vocab_size)
    ids = np.asarray(tokenizer.encode(text).ids, np.int32)
    return train.Data(tokenizer, ids[:-9000], ids[-9000:], canonical_ids(tokenizer))


@pytest.fixture(scope="module")
def quickly(data) -> Iterator[None]:
    """Small text and hardly any scoring, so that ten steps take seconds; the training itself is the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "prepare", lambda recipe: data)
        patch.setattr(train, "EVALUATE_EVERY", 4)
        patch.setattr(train, "quick_scores", lambda model, data: {"hit_at_topk": {"1": 1.0}})
        patch.setattr(train, "score_model", lambda model, ids: {"text_loss": text_loss(model, ids)})
        yield


@pytest.fixture(scope="module")
def straight(quickly, tmp_path_factory) -> tuple[Path, dict[str, Any], list[float]]:
    """An uninterrupted run: its folder, the scores it returned and the progress it reported."""
    folder, said = tmp_path_factory.mktemp("straight"), []
    return folder, train.train(RECIPE, folder, progress=lambda text, share: said.append(share)), said


def text_loss(model: Any, ids: np.ndarray) -> float:
    block = torch.from_numpy(ids[:1025].astype(np.int64)).unsqueeze(0)
    with torch.inference_mode():
        return float(F.cross_entropy(model(block[:, :-1])[0], block[0, 1:]))


def test_ten_steps_learn_something_and_leave_a_complete_folder(straight, data):
    folder, scores, said = straight
    untrained = text_loss(train.build(RECIPE, data).eval(), data.heldout_ids)
    assert scores["text_loss"] < untrained - 0.2
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "recipe.json", "curve.json", "scores.json"}
    assert {path.name for path in folder.iterdir()} == wanted  # and nothing of the state to resume from
    stored = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("recipe", "curve", "scores")}
    assert stored["scores"] == scores and stored["recipe"]["trained_with"]["torch"] == torch.__version__
    assert [point["step"] for point in stored["curve"]] == [4, 8, 10]
    assert said == sorted(said) and said[0] == 0.0 and said[-1] == 1.0
    model = load(folder)
    assert text_loss(model, data.heldout_ids) == pytest.approx(scores["text_loss"], abs=1e-6)
    assert torch.equal(model.engram_canonical_ids, torch.from_numpy(data.canonical))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_at", [[3], [5], [4, 6, 9]])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(straight, tmp_path, stop_at):
    for step in stop_at:

        def interrupt(text: str, share: float, step: int = step) -> None:
            if text.startswith(f"step {step}/"):
                raise Interrupted

        with pytest.raises(Interrupted):
            train.train(RECIPE, tmp_path / "pieces", progress=interrupt)
    seen: list[str] = []
    train.train(RECIPE, tmp_path / "pieces", progress=lambda text, share: seen.append(text))
    first = next(text for text in seen if text.startswith("step"))
    assert first.startswith(f"step {max(s - 1 for s in stop_at) // 4 * 4 + 1}/")  # it went on from the last saved step
    folders = (straight[0], tmp_path / "pieces")
    one, other = (load(folder).state_dict() for folder in folders)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    curves = [json.loads((folder / "curve.json").read_text()) for folder in folders]
    assert [p | {"cpu_s": 0} for p in curves[0]] == [p | {"cpu_s": 0} for p in curves[1]]


def test_starting_fresh_forgets_the_interrupted_run_and_another_recipe_is_refused(quickly, tmp_path):
    def interrupt(text: str, share: float) -> None:
        if text.startswith("step 5/"):
            raise Interrupted

    with pytest.raises(Interrupted):
        train.train(RECIPE, tmp_path, progress=interrupt)
    with pytest.raises(InputError, match="unfinished run of another recipe; choose another folder or start fresh"):
        train.train(replace(RECIPE, seed=2), tmp_path)
    seen: list[str] = []

    def first_step(text: str, share: float) -> None:
        seen.append(text)
        if text.startswith("step"):
            raise Interrupted

    with pytest.raises(Interrupted):
        train.train(replace(RECIPE, seed=2), tmp_path, fresh=True, progress=first_step)
    assert seen[-1].startswith("step 1/")


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="'tiny-v5' is unknown; choose one of .*'tiny-v4'"):
        recipe_named("tiny-v5")


def test_a_loss_that_is_not_finite_stops_training_with_one_line(data):
    model = train.build(RECIPE, data)
    with torch.no_grad():
        model.head.weight[0] = torch.nan
    batch = train.make_batch(RECIPE, data, train.make_streams(RECIPE, data), RECIPE.phases[0], 0)
    with pytest.raises(WorkbenchError, match="training diverged"):
        train.train_step(model, optimisers(model, RECIPE), RECIPE, batch, dense=True)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_phase_of_a_shipped_recipe_makes_its_batches(data, name):
    """Also the last one, which a run reaches only after an hour."""
    recipe = RECIPES[name]
    repeated = replace(data, train_ids=np.tile(data.train_ids, 3))
    for phase in recipe.phases:
        batch = train.make_batch(recipe, repeated, train.make_streams(recipe, repeated), phase, 7)
        again = train.make_batch(recipe, repeated, train.make_streams(recipe, repeated), phase, 7)
        other = train.make_batch(recipe, repeated, train.make_streams(recipe, repeated), phase, 8)
        assert batch.ids.shape == (phase.batch, phase.length) and batch.read_mask.any() and batch.text_mask.any()
        assert np.array_equal(batch.ids, again.ids) and not np.array_equal(batch.ids, other.ids)


def test_a_recipe_that_starts_from_a_checkpoint_has_its_weights_and_tokenizer():
    recipe = RECIPES["tiny-v4-tally"]
    started, model = load(recipe.start_from, device="cpu"), train.build(recipe, PREPARE(recipe))
    assert model.tokenizer.to_str() == started.tokenizer.to_str() and model.config == replace(started.config, index_topk=16)
    weights, before = model.state_dict(), started.state_dict()
    assert weights.keys() == before.keys() and all(torch.equal(weights[name], before[name]) for name in weights)


def test_a_tally_recipe_asks_for_the_most_frequent_value_in_its_share_of_the_sequences(data):
    recipe, text = RECIPES["tiny-v4-tally"], replace(data, train_ids=np.tile(data.train_ids, 3))
    asked = data.tokenizer.encode(tally.question("apple")).ids[:8]
    for phase in recipe.phases:
        ids = train.make_batch(recipe, text, train.make_streams(recipe, text), phase, 3).ids
        lines = [any(list(row[i : i + 8]) == asked for i in np.flatnonzero(row == asked[0])) for row in ids]
        assert sum(lines) == int(recipe.tally_share * phase.batch)


def test_the_curve_of_a_tally_recipe_counts_all_records_as_needles(quickly, data, tmp_path, monkeypatch):
    found = {"1": 0.25}
    monkeypatch.setattr(train, "quick_tally", lambda model, data: {"tally": 0.5, "hit_at_topk": found})
    monkeypatch.setattr(train, "tally_scores", lambda model, ids: {"questions": 3})
    recipe = replace(RECIPE, tally_share=0.5, phases=(Phase(steps=4, length=131, batch=4),))
    scores = train.train(recipe, tmp_path)
    (point,) = json.loads((tmp_path / "curve.json").read_text())
    assert point["hit_at_topk"] == found and point["tally"] == 0.5 and scores["tally"] == {"questions": 3}


def graded(loss: torch.Tensor, model: Any) -> dict[str, bool]:
    """Which parameters a loss gives a gradient that is not zero."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad is not None and bool(p.grad.abs().sum() > 0) for name, p in model.named_parameters()}


@pytest.mark.parametrize("topk", [None, 1000], ids=["sparse", "dense"])
def test_the_indexer_learns_from_its_own_loss_alone_and_the_model_never_from_it(topk):
    model, ids = random_model(replace(CONFIG, engram=ENGRAM)), random_ids(CONFIG, 2, 61)
    with selecting_attention(model) as records:
        logits = model(ids, topk=topk)
    by_index = graded(train.indexer_loss(records), model)
    with selecting_attention(model):
        logits = model(ids, topk=topk)
    by_text = graded(train.next_token_loss(logits, ids, torch.ones_like(ids, dtype=torch.bool)), model)
    indexer = {name for name in by_index if ".indexer." in name}
    assert len(indexer) == 2 * 6
    assert {name for name, has in by_index.items() if has} == indexer
    assert {name for name, has in by_text.items() if has} == by_text.keys() - indexer


def record(probs: list[float], scores: list[float], entries: list[int]) -> Attention:
    """One query with two heads that share these probabilities of the entries."""
    of_entries = torch.tensor([[[probs, probs]]])
    return Attention(
        0,
        torch.zeros(1, 1, 2, 3),
        torch.zeros(1, 1, 2),
        of_entries,
        Selection(torch.tensor([[scores]]), torch.tensor([[entries]])),
    )


def test_the_indexers_loss_is_the_divergence_from_the_attention_that_entries_got():
    """Target: head sum of the joint softmax, normalised over the entries; -1 counts for nothing."""
    scores = [1.0, 0.5, -torch.inf]
    target = torch.tensor([0.75, 0.25])  # of 0.3 and 0.1, the rest went to window and sink
    q = torch.softmax(torch.tensor(scores[:2]), -1)
    expected = (target * (target / q).log()).sum()
    loss = train.indexer_loss({1: [record([0.3, 0.1, 0.0], scores, [4, 2, -1])]})
    torch.testing.assert_close(loss, expected)
    log_target = [float(np.log(0.75)), float(np.log(0.25)), -torch.inf]
    assert train.indexer_loss({1: [record([0.3, 0.1, 0.0], log_target, [4, 2, -1])]}) == pytest.approx(0.0, abs=1e-6)


def test_a_query_counts_for_the_indexer_by_the_attention_it_gives_to_entries():
    far, near = record([0.4, 0.1], [0.0, 1.0], [0, 1]), record([0.004, 0.001], [0.0, 1.0], [0, 1])
    both = Attention(
        0,
        torch.zeros(1, 2, 2, 3),
        torch.zeros(1, 2, 2),
        torch.cat([far.entry_probs, torch.tensor([[[[0.001, 0.004]] * 2]])], 1),
        Selection(*(torch.cat(pair, 1) for pair in zip(far.selection, near.selection, strict=True))),
    )
    alone = train.indexer_loss({0: [far]})
    assert train.indexer_loss({0: [both]}) == pytest.approx(float(alone), rel=0.02)


def test_the_loss_of_the_next_token_counts_masked_positions_only():
    logits, ids = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 2, 3, 4, 5]])
    mask = torch.tensor([[False, True, False, True, True]])  # the last has no next token
    expected = -(logits[0, 1].log_softmax(-1)[3] + logits[0, 3].log_softmax(-1)[5]) / 2
    torch.testing.assert_close(train.next_token_loss(logits, ids, mask), expected)


def test_balancing_pushes_busy_experts_down_and_idle_ones_up():
    model = random_model()
    biases = {i: model.blocks[i].ffn.gate.bias.clone() for i in (1, 3)}
    train.balance_routers(model, {i: torch.tensor([9.0, 0, 3, 3, 0]) for i in range(4)}, 0.01)
    for layer, before in biases.items():
        torch.testing.assert_close(model.blocks[layer].ffn.gate.bias - before, torch.tensor([-0.01, 0.01, 0, 0, 0.01]))


def test_loads_count_every_tokens_experts_and_hooks_go():
    model = random_model()
    with train.routed(model) as loads:
        model(random_ids(CONFIG, 3, 17))
    assert {layer: float(load.sum()) for layer, load in loads.items()} == dict.fromkeys(range(4), 3 * 17 * 2)
    with pytest.raises(KeyboardInterrupt), selecting_attention(model), train.routed(model):
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in model.modules())


def test_the_learning_rate_warms_up_then_falls_to_its_last_share():
    rates = [train.learning_rate(RECIPES["tiny-v4"], step, 400) for step in range(400)]
    peak = RECIPES["tiny-v4"].warmup_steps
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == 1.0 and rates[0] > 0 and rates[-1] == pytest.approx(RECIPES["tiny-v4"].final_lr, abs=0.01)


def test_selection_turns_sparse_after_three_good_evaluations_in_a_row():
    def warmed(*hits: float) -> bool:
        curve = [{"hit_at_topk": {"1": hit, "3": hit / 2}} for hit in hits]
        return train.warmed_up(curve, Phase(steps=1, length=8, batch=1, hit_target=0.9))

    assert (
        not warmed() and not warmed(1, 1) and not warmed(1, 1, 0.8, 1, 1) and warmed(0.1, 0.9, 0.95, 1) and warmed(1, 1, 1, 0)
    )
    assert train.warmed_up([], Phase(steps=1, length=8, batch=1))


def test_selection_waits_for_answers_too_where_a_recipe_asks_for_them():
    phase = Phase(steps=1, length=8, batch=1, hit_target=0.9, recall_target=0.5)
    found = [{"hit_at_topk": {"1": 1.0}, "recall": recall} for recall in (0.2, 0.6, 0.4, 0.5, 0.7)]
    assert not train.warmed_up(found, phase) and train.warmed_up([*found, found[1]], phase)


@pytest.mark.parametrize("shape", [(5, 13), (13, 5), (3, 7, 7)])
def test_orthogonalise_brings_all_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(matrix, steps=5))
    assert values.min() > 0.5 and values.max() < 1.3  # what five steps with these coefficients are made for
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.einsum("...ij,...ij->...", orthogonalise(matrix), u @ v).min() > 0.8 * min(shape[-2:])


def test_every_parameter_has_exactly_one_optimiser_and_matrices_have_muon(data):
    model = train.build(RECIPE, data)
    muon, adam = optimisers(model, RECIPE)
    assert isinstance(muon, Muon) and isinstance(adam, torch.optim.AdamW)
    owned = [id(p) for part in (muon, adam) for group in part.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert {"layers.0.attn.wq_a.weight", "layers.2.ffn.experts.w13", "layers.1.engram.wkv.weight"} <= matrices
    spared = ("embed", "head", "norm", "hc_", "ape", "sink", "table", "q_weight", "k_weight", "engram.conv")
    assert not [name for name in matrices if any(part in name for part in spared)]
    tables = adam.param_groups[1]
    assert [names[id(p)] for p in tables["params"]] == ["layers.1.engram.table.weight"] and tables["weight_decay"] == 0.0


def test_building_a_recipe_twice_gives_the_same_weights_and_leaves_the_random_state_alone(data):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, other = (train.build(RECIPE, data).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one) and torch.equal(state, torch.get_rng_state())
    another = train.build(replace(RECIPE, seed=99), data).state_dict()
    assert not torch.equal(one["embed.weight"], another["embed.weight"])


def test_a_state_file_brings_back_model_and_optimisers_bit_for_bit(data, tmp_path: Path):
    model = train.build(RECIPE, data)
    parts, streams = optimisers(model, RECIPE), train.make_streams(RECIPE, data)
    for step in range(2):
        train.train_step(model, parts, RECIPE, train.make_batch(RECIPE, data, streams, RECIPE.phases[0], step), dense=True)
    train._save_state(tmp_path, RECIPE, model, parts, {"step": 2, "curve": [], "cpu_s": 1.0})
    again = train.build(RECIPE, data)
    new = optimisers(again, RECIPE)
    assert train._resume(tmp_path, RECIPE, again, new) == (2, [], 1.0)
    saved, loaded = train._tensors(model, parts), train._tensors(again, new)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
