"""What a trained model can do, measured on held-out text: needle recall, the indexer's hit rate, text loss; chance beside each.

Far means beyond the sliding window and what the open blocks could still carry; models without a window are asked the tiny
models' far questions. A needle counts as found when an entry that reads its value token is among the k best: with CSA's
overlapping blocks its own block's or the next one, in V3.2 the token itself. (reference/tiny-model.md, section 5)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from workbench.config import ModelConfig
from workbench.errors import InputError
from workbench.model.language_model import LanguageModel
from workbench.recorder import selecting_attention
from workbench.runtime import device_name, threads_for_run, use_threads
from workbench.trace import INDEXING
from workbench.training import tally, tasks

SEED = 20260424  # of the held-out needles; training seeds are small numbers
CHUNK = 512
TALLY_LENGTH = 1024
Sought = Callable[[tasks.RecallBatch], tuple[np.ndarray, np.ndarray, np.ndarray]]


def far_distance(model: LanguageModel) -> int:
    """Tokens between value and question above which only compressed entries can help; without a window, as if it had one."""
    config = model.config
    ratios = [config.compress_ratios[layer] for layer in selecting_layers(config)]
    return config.sliding_window + 2 * max(ratios) if config.sliding_window else tasks.FAR


def entries_of(config: ModelConfig, layer: int, token: Any) -> list[Any]:
    """The entries of ``layer`` that read ``token``, a number or an array of them; a token is in two overlapping CSA blocks."""
    own = token // config.compress_ratios[layer]
    return [own, own + 1] if config.layer_kinds[layer] == "csa" else [own]


def selecting_layers(config: ModelConfig) -> list[int]:
    """Layers that select for themselves; V4.1's reusing layers show another one's choice."""
    return [layer for layer, kind in enumerate(config.layer_kinds) if kind in INDEXING]


@torch.inference_mode()
def recall(model: LanguageModel, batches: Sequence[tasks.RecallBatch], topk: int | None = None) -> dict[str, float]:
    """Share of questions answered with the right value: all of them, and the far ones."""
    right: list[np.ndarray] = []
    far: list[np.ndarray] = []
    for batch in batches:
        ids = torch.from_numpy(batch.ids)
        guesses = model(ids.to(model.device), topk=topk).argmax(-1).cpu().numpy()
        row, t = np.nonzero(batch.read_mask)
        right.append(guesses[row, t] == batch.ids[row, t + 1])
        far.append(t - batch.needle_position[row, t] > far_distance(model))
    hits, distant = np.concatenate(right), np.concatenate(far)
    return {"all": float(hits.mean()), "far": float(hits[distant].mean()), "questions": int(distant.sum())}


def selected_entries(model: LanguageModel, ids: torch.Tensor, topk: int | None = None) -> dict[int, np.ndarray]:
    """Entries each selecting layer keeps for each query, best first: layer -> [B, T, K], -1 where none."""
    with selecting_attention(model) as seen, torch.inference_mode():
        model(ids.to(model.device), topk=topk)
    own = {layer: seen[layer] for layer in selecting_layers(model.config)}
    chosen = {layer: [r.selection.entries.cpu().numpy() for r in records if r.selection] for layer, records in own.items()}
    return {layer: np.concatenate(chunks, axis=1) for layer, chunks in chosen.items()}


def last_needles(batch: tasks.RecallBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, t, position): for each question, at t, where the value it asks for stood last."""
    row, t = np.nonzero(batch.read_mask)
    return row, t, batch.needle_position[row, t]


def all_records(batch: tasks.RecallBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, t, position): for each question, at t, each place where some value of its key was written as a whole sentence."""
    places = []
    for row, t in zip(*np.nonzero(batch.read_mask), strict=True):
        before = batch.ids[row, : t - 1]
        named = np.flatnonzero((before[:-2] == batch.ids[row, t - 1]) & (before[1:-1] == batch.ids[row, t]))
        places += [(row, t, at + 2) for at in named if not batch.text_mask[row, at]]
    row, t, position = np.array(places, np.int64).reshape(-1, 3).T
    return row, t, position


def needle_hits(
    model: LanguageModel,
    batches: Sequence[tasks.RecallBatch],
    k: int,
    topk: int | None = None,
    sought: Sought = last_needles,
) -> dict[str, float]:
    """Share of far needles whose entry is among the k best, as {"1 key": rate, "1 end": rate, "3 key": ...}.

    Per selecting layer and per query that may look it up: the key, next to last in the question, or the question's end. A model
    may fetch the value as soon as the key is named and hand it on through the window. Lower layers first, the key before the
    end; empty for a model that does not select. ``sought`` says which needles a question has: the last one, or ``all_records``.
    """
    found: dict[str, list[np.ndarray]] = {}
    for batch in batches if selecting_layers(model.config) else ():
        row, t, needle = sought(batch)
        distant = t - needle > far_distance(model)
        row, t, needle = row[distant], t[distant], needle[distant]
        for layer, entries in selected_entries(model, torch.from_numpy(batch.ids), topk).items():
            for query, back in (("key", 1), ("end", 0)):
                best = entries[row, t - back, :k]
                hit = np.any([best == entry[:, None] for entry in entries_of(model.config, layer, needle)], axis=(0, 2))
                found.setdefault(f"{layer} {query}", []).append(hit)
    return {layer: float(np.concatenate(hits).mean()) for layer, hits in found.items()}


def chance_hits(model: LanguageModel, batches: Sequence[tasks.RecallBatch], k: int) -> float:
    """Expected hit rate when k of the visible entries are drawn at random, in the selecting layer where that is likeliest.

    0 without a selecting layer.
    """
    likeliest = 0.0
    for layer in selecting_layers(model.config):
        right = len(entries_of(model.config, layer, 0))
        chances = []
        for batch in batches:
            row, t = np.nonzero(batch.read_mask)
            t = t[t - batch.needle_position[row, t] > far_distance(model)]
            visible = (t + 1) // model.config.compress_ratios[layer]
            missed = np.prod([np.clip(visible - k - i, 0, None) / (visible - i) for i in range(right)], axis=0)
            chances.append(1 - missed)
        likeliest = max(likeliest, float(np.concatenate(chances).mean()))
    return likeliest


@torch.inference_mode()
def text_loss(model: LanguageModel, ids: np.ndarray, windows: int, length: int) -> float:
    """Mean next-token loss in nats per token over evenly spaced windows of held-out text."""
    starts = np.linspace(0, len(ids) - length - 1, windows).astype(int)
    total = 0.0
    for first in range(0, windows, 8):
        rows = np.stack([ids[s : s + length + 1] for s in starts[first : first + 8]]).astype(np.int64)
        block = torch.from_numpy(rows).to(model.device)
        logits = model(block[:, :-1])
        total += float(F.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten(), reduction="sum"))
    return total / (windows * length)


@torch.inference_mode()
def answer(model: LanguageModel, ids: np.ndarray, topk: int | None = None) -> int:
    """The token the model puts after ``ids`` [L], read through its cache in chunks."""
    cache = model.new_cache()
    line = torch.from_numpy(ids.astype(np.int64)).unsqueeze(0).to(model.device)
    for chunk in line.split(CHUNK, dim=1):
        logits = model(chunk, cache, logits="last", topk=topk)
    return int(logits[0, -1].argmax())


def haystack_recall(model: LanguageModel, heldout: np.ndarray, length: int, trials: int, topk: int | None = None) -> float:
    """Share of single needles found in ``length`` tokens of held-out text, at depths from start to end."""
    assert model.tokenizer is not None
    rng = np.random.default_rng(SEED)
    right = 0
    for trial in range(trials):
        key, value = tasks.KEYS[rng.integers(len(tasks.KEYS))], tasks.VALUES[rng.integers(len(tasks.VALUES))]
        ids, needle = tasks.haystack(model.tokenizer, heldout, rng, length, key, value, depth=(trial + 0.5) / trials * 0.97)
        right += answer(model, ids, topk) == int(ids[needle])
    return right / trials


def score_model(model: LanguageModel, heldout: np.ndarray, *, quick: bool = False) -> dict[str, Any]:
    """Every figure the model is judged by. ``heldout`` are token ids of text the model never saw."""
    assert model.tokenizer is not None
    rng = np.random.default_rng(SEED)
    stream = tasks.RecallStream.asked_once(model.tokenizer, heldout)
    near = [stream.batch(rng, 8, 256) for _ in range(4 if quick else 24)]
    long = [stream.batch(rng, 1, 4096) for _ in range(1 if quick else 6)]
    scores: dict[str, Any] = {
        "recall_256": recall(model, near),
        "recall_4096": recall(model, long),
        "haystack_4096": haystack_recall(model, heldout, 4096, 4 if quick else 40),
        "recall_chance": 1 / len(tasks.VALUES),
    }
    if selecting_layers(model.config):
        kept = (1, 2, model.config.index_topk)
        scores["recall_256_top1"] = recall(model, near, topk=1)
        scores |= {f"hit_at_{k}": needle_hits(model, near, k) for k in kept}
        scores["hit_chance"] = {str(k): chance_hits(model, near, k) for k in kept}
    return scores | {
        "text_loss": text_loss(model, heldout, windows=8 if quick else 64, length=256),
        "text_loss_uniform": float(np.log(model.config.vocab_size)),
    }


def window_reach(model: LanguageModel) -> int:
    """Tokens, the last one included, that the sliding windows of all layers together can carry to the last one."""
    return model.config.num_hidden_layers * (model.config.sliding_window - 1) + 1


@torch.inference_mode()
def window_recall(model: LanguageModel, batches: Sequence[tasks.RecallBatch]) -> float:
    """Share of questions answered right by a model that is shown nothing but what its windows reach."""
    right, reach = [], window_reach(model)
    for batch in batches:
        row, t = np.nonzero(batch.read_mask)
        lines = np.stack([batch.ids[r, at + 1 - reach : at + 1] for r, at in zip(row, t, strict=True)])
        guesses = model(torch.from_numpy(lines).to(model.device), logits="last")[:, -1].argmax(-1).cpu().numpy()
        right.append(guesses == batch.ids[row, t + 1])
    return float(np.concatenate(right).mean())


def tally_batches(
    model: LanguageModel, heldout: np.ndarray, sequences: int, length: int = TALLY_LENGTH
) -> list[tasks.RecallBatch]:
    """Held-out sequences with four keys each, all their records beyond what the windows reach."""
    assert model.tokenizer is not None
    rng = np.random.default_rng(SEED)
    stream = tally.TallyStream(model.tokenizer, heldout, gap=window_reach(model))
    return [stream.batch(rng, 4, length) for _ in range(sequences // 4)]


def tally_scores(model: LanguageModel, heldout: np.ndarray, *, sequences: int = 80) -> dict[str, Any]:
    """How often the most frequent value is named, by the number of entries that CSA layers keep, and what that is worth.

    Beside it: all entries kept, the windows alone, a guess from one record drawn at random, blind chance, and the share of the
    records of the key whose entry is among the k best.
    """
    batches = tally_batches(model, heldout, sequences)
    most = model.config.index_topk
    kept = sorted({1, 2, 3, 4, 6, 8, 12, most} & set(range(1, most + 1)))
    return {
        "counts": list(tally.TEST_COUNTS),
        "length": TALLY_LENGTH,
        "entries": TALLY_LENGTH // model.config.csa_ratio,
        "questions": int(sum(batch.read_mask.sum() for batch in batches)),
        "accuracy": {str(k): recall(model, batches, topk=k)["all"] for k in kept},
        "accuracy_all_entries": recall(model, batches, topk=TALLY_LENGTH)["all"],
        "accuracy_4096": recall(model, tally_batches(model, heldout, max(4, sequences // 8), 4096))["all"],
        "window_alone": window_recall(model, batches),
        "one_record": max(tally.TEST_COUNTS) / sum(tally.TEST_COUNTS),
        "chance": 1 / len(tasks.VALUES),
        "records_found": {str(k): needle_hits(model, batches[:6], k, sought=all_records) for k in kept},  # 960 records
    }


@torch.inference_mode()
def storage_cost(
    model: LanguageModel,
    storage: str = "released",
    *,
    windows: int = 16,
    streams: int = 32,
    length: int = 256,
    seed: int = SEED,
) -> dict[str, Any]:
    """What keeping the KV cache in ``storage`` costs beside "fp32": both read the same held-out text through their caches.

    Keys are "loss" and "recall" for each storage (nats per token; share of needles answered), "kl" from fp32 to ``storage`` in
    nats per token, "changed", the share of tokens whose likeliest successor is another one, "kv_bytes" for each storage and
    what was counted ("tokens", "questions"). InputError for an unknown storage and a model without a tokenizer.
    """
    if model.tokenizer is None:
        raise InputError("this model has no tokenizer, so there is no text to read; load a shipped model")
    use_threads(threads_for_run())
    text = np.asarray(model.tokenizer.encode(tasks.heldout_sample()).ids, np.int64)
    starts = np.linspace(0, len(text) - length - 1, windows).astype(int)
    rows = torch.from_numpy(np.stack([text[s : s + length + 1] for s in starts])).to(model.device)
    batch = tasks.RecallStream.asked_once(model.tokenizer, text).batch(np.random.default_rng(seed), streams, length)
    row, t = np.nonzero(batch.read_mask)
    asked = torch.from_numpy(batch.ids).to(model.device)
    found: dict[str, Any] = {"storage": storage, "tokens": windows * length, "questions": len(row)}
    found |= {"loss": {}, "recall": {}, "kv_bytes": {}}
    logs: list[torch.Tensor] = []
    for kept in ("fp32", storage):
        cache = model.new_cache(windows, kept)
        logs.append(model(rows[:, :-1], cache).log_softmax(-1))
        found["loss"][kept] = float(F.nll_loss(logs[-1].flatten(0, 1), rows[:, 1:].flatten()))
        guesses = model(asked, model.new_cache(streams, kept)).argmax(-1).cpu().numpy()
        found["recall"][kept] = float((guesses[row, t] == batch.ids[row, t + 1]).mean())
        found["kv_bytes"][kept] = cache.nbytes // windows
    exact, other = logs
    found["kl"] = float((exact.exp() * (exact - other)).sum(-1).mean())
    found["changed"] = float((exact.argmax(-1) != other.argmax(-1)).float().mean())
    return found | {"label": f"{model.name} ({model.what}), measured on {device_name(str(model.device))}"}
