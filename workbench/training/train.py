"""Training the checkpoints that ship: ``workbench train --recipe NAME`` writes weights, recipe, scores and curve together.

Loss = next-token loss on text + next-token loss on the values asked for + the indexer's KL loss. The indexer learns from its
KL loss alone and the model never from it. (reference/deepseek-v4.md, section 9; reference/tiny-model.md)
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench import checkpoint
from workbench.errors import InputError, WorkbenchError
from workbench.model.attention.hybrid import Attention
from workbench.model.engram import canonical_ids
from workbench.model.families import model_class
from workbench.model.language_model import LanguageModel
from workbench.model.moe import MoE
from workbench.model.plain import PlainModel
from workbench.model.single_pass import V41Model
from workbench.recorder import selecting_attention
from workbench.training import tally, tasks
from workbench.training.head_start import give_head_start
from workbench.training.optimiser import optimisers
from workbench.training.recipes import Phase, Recipe, recipe_named
from workbench.training.score import all_records, needle_hits, recall, score_model, tally_batches, tally_scores, text_loss

EVALUATE_EVERY = 50  # steps; the state is saved as often, so an interrupt costs less than that
STATE_FILE = "resume.safetensors"
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Data:
    tokenizer: Any
    train_ids: np.ndarray
    heldout_ids: np.ndarray
    canonical: np.ndarray


class Streams(NamedTuple):
    """What batches are made from: many questions per key, one question per key, and many records per key."""

    many: tasks.RecallStream
    once: tasks.RecallStream
    tally: tally.TallyStream


def prepare(recipe: Recipe) -> Data:
    """Corpus, tokenizer and canonical ids; the same for every recipe on one Python version.

    A recipe that starts from a checkpoint takes that one's tokenizer, which another Python version would not train alike.
    """
    train_text, _ = tasks.corpus()
    started = checkpoint.load(recipe.start_from, device="cpu").tokenizer if recipe.start_from else None
    tokenizer = started or tasks.train_tokenizer([train_text], recipe.vocab_size)
    encode = lambda text: np.asarray(tokenizer.encode(text).ids, np.int32)  # noqa: E731
    return Data(tokenizer, encode(train_text), encode(tasks.heldout_sample()), canonical_ids(tokenizer))


def build(recipe: Recipe, data: Data) -> LanguageModel:
    """The model that training starts with: untrained, from the recipe's seed, or with the weights of ``start_from``.

    Dense and MLA models get a head start, see training/head_start.py.
    """
    config = recipe.config(int(data.canonical.max()) + 1)
    model = model_class(config).untrained(config, recipe.seed)
    if isinstance(model, PlainModel | V41Model):
        give_head_start(model)
    if recipe.start_from:
        model.load_state_dict(checkpoint.load(recipe.start_from, device="cpu").state_dict())
    if model.config.engram:
        model.engram_canonical_ids.copy_(torch.from_numpy(data.canonical))
    model.tokenizer = data.tokenizer
    model.name = recipe.name
    return model


def indexer_loss(records: dict[int, list[Attention]]) -> Tensor:
    """KL(attention over compressed entries || softmax of index scores), the target summed over heads of the joint softmax.

    Weighted by the attention mass that went to compressed entries, so queries that look nowhere far teach nothing.
    """
    losses = []
    for layer in records.values():
        for record in layer:
            if record.selection is None:
                continue
            target = record.entry_probs.detach().sum(2)  # [B, T, K]
            mass = target.sum(-1, keepdim=True)
            target = target / mass.clamp(min=1e-9)
            there = record.selection.entries >= 0
            log_q = torch.log_softmax(record.selection.scores.masked_fill(~there, -1e9), dim=-1)
            kl = (target * (target.clamp(min=1e-9).log() - log_q)).masked_fill(~there, 0.0).sum(-1)
            losses.append((kl * mass.squeeze(-1)).sum() / mass.sum().clamp(min=1e-9))
    return torch.stack(losses).mean() if losses else torch.zeros(())


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean loss of predicting ids[t + 1] at the masked positions t."""
    where = mask[:, :-1]
    if not where.any():
        return logits.sum() * 0.0  # nothing was asked in this batch
    return F.cross_entropy(logits[:, :-1][where], ids[:, 1:][where])


def make_streams(recipe: Recipe, data: Data) -> Streams:
    """The streams of training text that a recipe mixes."""
    return Streams(
        tasks.RecallStream(data.tokenizer, data.train_ids, short_share=recipe.short_share),
        tasks.RecallStream.asked_once(data.tokenizer, data.train_ids),
        tally.TallyStream.to_learn_from(data.tokenizer, data.train_ids, recipe.short_share),
    )


def make_batch(recipe: Recipe, data: Data, streams: Streams, phase: Phase, step: int) -> tasks.RecallBatch:
    """The batch of a step depends on seed and step alone, so an interrupted run goes on with the same data."""
    rng = np.random.default_rng([recipe.seed, step])
    plain, once = int(recipe.plain_share * phase.batch), math.ceil(recipe.once_share * phase.batch)
    many_records = int(recipe.tally_share * phase.batch)
    counts = (phase.batch - plain - once - many_records, once, many_records)
    makers = (streams.many.batch, streams.once.batch, streams.tally.batch)
    parts = [make(rng, count, phase.length) for make, count in zip(makers, counts, strict=True) if count]
    if plain:
        parts.append(tasks.plain_batch(rng, data.train_ids, plain, phase.length))
    columns = ("ids", "text_mask", "read_mask", "needle_position")
    return tasks.RecallBatch(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in columns})


def learning_rate(recipe: Recipe, step: int, total: int) -> float:
    """Share of the peak: linear warm-up, then linear decay."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    left = 1 - (step - recipe.warmup_steps) / max(1, total - recipe.warmup_steps)
    return recipe.final_lr + (1 - recipe.final_lr) * max(0.0, left)


def best_hit(point: dict[str, Any]) -> float:
    """Needles found at the model's top-k by the layer that finds most, at one point of the curve."""
    return max(point["hit_at_topk"].values())


def warmed_up(curve: list[dict[str, Any]], phase: Phase) -> bool:
    """Whether selection may be sparse: once three evaluations in a row have met the phase's target."""
    if phase.hit_target is None:
        return True
    met = [best_hit(point) >= phase.hit_target and point.get("recall", 1.0) >= phase.recall_target for point in curve]
    return any(all(met[i : i + 3]) for i in range(len(met) - 2))


def balance_routers(model: LanguageModel, loads: dict[int, Tensor], step: float) -> None:
    """b_e += step * sign(mean load - load_e): aux-loss-free balancing of the score-routed layers."""
    for layer, load in loads.items():
        gate = model.blocks[layer].ffn.gate
        if not gate.hashed:
            gate.bias += step * torch.sign(load.mean() - load)


@contextmanager
def routed(model: LanguageModel) -> Iterator[dict[int, Tensor]]:
    """Tokens each expert got during the last forward pass, by layer."""
    loads: dict[int, Tensor] = {}

    def note(layer: int, experts: int):  # type: ignore[no-untyped-def]
        def hook(_module, _inputs, out):  # type: ignore[no-untyped-def]
            loads[layer] = torch.bincount(out[1].flatten(), minlength=experts).float()

        return hook

    mixtures = {i: block.ffn for i, block in enumerate(model.blocks) if isinstance(block.ffn, MoE)}
    hooks = [ffn.routing_tap.register_forward_hook(note(i, len(ffn.experts.w13))) for i, ffn in mixtures.items()]
    try:
        yield loads
    finally:
        for hook in hooks:
            hook.remove()


def train_step(
    model: LanguageModel, optimiser: list[torch.optim.Optimizer], recipe: Recipe, batch: tasks.RecallBatch, dense: bool
) -> dict[str, float]:
    """One optimiser step, layers that select attending to all visible entries if ``dense``; returns the parts of the loss."""
    ids = torch.from_numpy(batch.ids)
    with selecting_attention(model) as attention, routed(model) as loads:
        logits = model(ids, topk=ids.shape[1] if dense else None)
    text = next_token_loss(logits, ids, torch.from_numpy(batch.text_mask))
    reads = next_token_loss(logits, ids, torch.from_numpy(batch.read_mask))
    index = indexer_loss(attention)
    loss = text + reads + index
    if not torch.isfinite(loss):
        raise WorkbenchError("training diverged: the loss is not finite; lower the learning rates of the recipe")
    for part in optimiser:
        part.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for part in optimiser:
        part.step()
    with torch.no_grad():
        balance_routers(model, loads, recipe.balance)
    return {"text": float(text.detach()), "reads": float(reads.detach()), "index_kl": float(index.detach())}


def train(recipe: str | Recipe, out: Path, *, fresh: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Train a recipe into ``out``: weights, config, tokenizer, recipe.json, curve.json and scores.json; returns the scores.

    An interrupted run leaves its state in ``out`` and goes on from there; ``fresh`` starts over. Raises InputError for an
    unknown recipe or a folder that holds another recipe's run.
    """
    recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
    say = progress or (lambda text, share: None)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the checkpoint")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not any((out / name).exists() for name in (STATE_FILE, "recipe.json")):
        raise InputError(f"{out} holds something that is no training run; give a new or empty folder")
    say("preparing text and tokenizer", 0.0)
    data = prepare(recipe)
    model = build(recipe, data)
    parts = optimisers(model, recipe)
    base_rates = [[group["lr"] for group in part.param_groups] for part in parts]
    streams = make_streams(recipe, data)
    step, curve, cpu_before = (0, [], 0.0) if fresh else _resume(out, recipe, model, parts)
    cpu_start = time.process_time()
    ends = np.cumsum([phase.steps for phase in recipe.phases])
    total = int(ends[-1])
    model.train()
    while step < total:
        phase = recipe.phases[int(np.searchsorted(ends, step, side="right"))]
        if phase is not recipe.phases[0] and not warmed_up(curve, recipe.phases[0]):
            found = f"{best_hit(curve[-1]):.0%}" if curve else "an unknown share"
            raise WorkbenchError(
                f"after {step} steps the indexer finds {found} of the needles, the recipe wants "
                f"{recipe.phases[0].hit_target:.0%} three times before it goes sparse; give the first phase more steps"
            )
        for part, rates in zip(parts, base_rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(recipe, step, total)
        model.blocks[0].attn.requires_grad_(step >= recipe.held_steps)
        dense = not warmed_up(curve, phase)
        losses = train_step(model, parts, recipe, make_batch(recipe, data, streams, phase, step), dense)
        step += 1
        say(f"step {step}/{total} text {losses['text']:.2f} reads {losses['reads']:.2f}", step / total)
        if step % EVALUATE_EVERY == 0 or step == total:
            spent = cpu_before + time.process_time() - cpu_start
            point = {"step": step, "cpu_s": round(spent, 1), "dense": dense}
            curve.append(point | losses | quick_scores(model, data) | (quick_tally(model, data) if recipe.tally_share else {}))
            _save_state(out, recipe, model, parts, {"step": step, "curve": curve, "cpu_s": spent})
    model.eval()
    model.what = "toy, trained"
    say("scoring", 1.0)
    checkpoint.save(model, out)
    trained = checkpoint.load(out)
    scores = score_model(trained, data.heldout_ids)
    if recipe.tally_share:
        scores["tally"] = tally_scores(trained, data.heldout_ids)
    cpu = round(cpu_before + time.process_time() - cpu_start, 1)
    (out / "recipe.json").write_text(json.dumps(recipe.to_dict() | {"trained_with": circumstances(cpu)}, indent=1))
    (out / "curve.json").write_text(json.dumps(curve))
    (out / "scores.json").write_text(json.dumps(scores, indent=1))
    (out / STATE_FILE).unlink(missing_ok=True)
    return scores


def circumstances(cpu_seconds: float) -> dict[str, Any]:
    """What the figures depend on besides the recipe: text and arithmetic differ between Python and torch versions."""
    return {"python": platform.python_version(), "torch": torch.__version__, "cpu_seconds": cpu_seconds}


def quick_scores(model: LanguageModel, data: Data, batches: int = 4) -> dict[str, Any]:
    """Recall, hit rates and text loss on a few held-out batches, for the curve and the hand-over to sparse selection."""
    rng = np.random.default_rng(12345)
    stream = tasks.RecallStream.asked_once(data.tokenizer, data.heldout_ids)
    tests = [stream.batch(rng, 8, 256) for _ in range(batches)]
    model.eval()
    far = recall(model, tests)
    out = {
        "recall": far["far"],
        "hit_at_2": needle_hits(model, tests, 2),
        "hit_at_topk": needle_hits(model, tests, model.config.index_topk or 0),
        "heldout_text": text_loss(model, data.heldout_ids, windows=8, length=256),
    }
    model.train()
    return out


def quick_tally(model: LanguageModel, data: Data) -> dict[str, Any]:
    """Answers to what was written most often, with top-k as configured and 1; all records of a key now count as needles."""
    tests = tally_batches(model, data.heldout_ids, 8, 512)
    model.eval()
    out = {
        "tally": recall(model, tests)["all"],
        "tally_top1": recall(model, tests, topk=1)["all"],
        "hit_at_topk": needle_hits(model, tests, model.config.index_topk, sought=all_records),
    }
    model.train()
    return out


def _tensors(model: LanguageModel, parts: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, part in enumerate(parts):
        for key, state in part.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{key}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return {name: value.contiguous().clone() for name, value in tensors.items()}


def _save_state(
    out: Path, recipe: Recipe, model: LanguageModel, parts: list[torch.optim.Optimizer], note: dict[str, Any]
) -> None:
    temporary = out / (STATE_FILE + ".part")  # tensors and note in one file, so that they can never disagree
    metadata = {"note": json.dumps({"recipe": recipe.to_dict()} | note)}
    save_file(_tensors(model, parts), temporary, metadata=metadata)
    temporary.replace(out / STATE_FILE)


def _resume(
    out: Path, recipe: Recipe, model: LanguageModel, parts: list[torch.optim.Optimizer]
) -> tuple[int, list[dict[str, Any]], float]:
    if not (out / STATE_FILE).exists():
        return 0, [], 0.0
    with safe_open(out / STATE_FILE, "pt") as stored:
        note = json.loads(stored.metadata()["note"])
    if note["recipe"] != json.loads(json.dumps(recipe.to_dict())):
        raise InputError(f"{out} holds an unfinished run of another recipe; choose another folder or start fresh")
    tensors = load_file(out / STATE_FILE)
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    for number, part in enumerate(parts):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimiser.{number}."):
                _, _, key, field = name.split(".", 3)
                state.setdefault(int(key), {})[field] = value
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
    return note["step"], note["curve"], note["cpu_s"]
