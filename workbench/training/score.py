"""What a trained model can do, measured on held-out text: needle recall, the indexer's hit rate, text loss; chance beside each.

Far means beyond the sliding window and what the open blocks could still carry. A needle counts as found when the entry of its
value token's block, or by CSA's overlap the next one, is among the k best. (reference/tiny-model.md, section 5)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from workbench.model.language_model import LanguageModel
from workbench.recorder import selecting_attention
from workbench.trace import INDEXING
from workbench.training import tasks

SEED = 20260424  # of the held-out needles; training seeds are small numbers
CHUNK = 512


def far_distance(model: LanguageModel) -> int:
    """Tokens between value and question above which only compressed entries can help."""
    return model.config.sliding_window + 2 * max((ratio for _, ratio in indexing_layers(model).values()), default=0)


def indexing_layers(model: LanguageModel) -> dict[int, tuple[str, int]]:
    """Layers that choose entries themselves: layer -> its kind and ratio."""
    kinds = zip(model.config.layer_kinds, model.config.compress_ratios, strict=True)
    return {layer: (kind, ratio) for layer, (kind, ratio) in enumerate(kinds) if kind in INDEXING}


def holding_entries(kind: str) -> int:
    """How many entries, from a token's own block on, a token goes into: CSA's blocks overlap."""
    return 2 if kind == "csa" else 1


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
    """Entries each layer that chooses keeps for each query, best first: layer -> [B, T, K], -1 where none."""
    with selecting_attention(model) as seen, torch.inference_mode():
        model(ids.to(model.device), topk=topk)
    own = {layer: seen[layer] for layer in indexing_layers(model)}
    chosen = {layer: [r.selection.entries.cpu().numpy() for r in records if r.selection] for layer, records in own.items()}
    return {layer: np.concatenate(chunks, axis=1) for layer, chunks in chosen.items()}


def needle_hits(
    model: LanguageModel, batches: Sequence[tasks.RecallBatch], k: int, topk: int | None = None
) -> dict[str, float]:
    """Share of far questions whose needle's entry is among the k best, as {"1 key": rate, "1 end": rate, "3 key": ...}.

    Per layer that chooses and per query that may look it up: the key, next to last in the question, or the question's end. A
    model may fetch the value as soon as the key is named and hand it on through the window. Lower layers first, the key before
    the end.
    """
    found: dict[str, list[np.ndarray]] = {}
    layers = indexing_layers(model)
    for batch in batches:
        row, t = np.nonzero(batch.read_mask)
        needle = batch.needle_position[row, t]
        distant = t - needle > far_distance(model)
        row, t, needle = row[distant], t[distant], needle[distant]
        for layer, entries in selected_entries(model, torch.from_numpy(batch.ids), topk).items():
            kind, ratio = layers[layer]
            first = needle[:, None] // ratio
            for query, back in (("key", 1), ("end", 0)):
                best = entries[row, t - back, :k]
                hit = ((best >= first) & (best < first + holding_entries(kind))).any(1)
                found.setdefault(f"{layer} {query}", []).append(hit)
    return {layer: float(np.concatenate(hits).mean()) for layer, hits in found.items()}


def chance_hits(model: LanguageModel, batches: Sequence[tasks.RecallBatch], k: int) -> float:
    """Expected hit rate when k of the visible entries are drawn at random; of the layers that choose, the luckiest."""
    chances = []
    for kind, ratio in set(indexing_layers(model).values()):
        for_layer = []
        for batch in batches:
            row, t = np.nonzero(batch.read_mask)
            t = t[t - batch.needle_position[row, t] > far_distance(model)]
            visible = (t + 1) // ratio
            misses = np.ones(len(t))
            for right in range(holding_entries(kind)):
                misses *= np.clip(visible - k - right, 0, None) / (visible - right)
            for_layer.append(1 - misses)
        chances.append(float(np.concatenate(for_layer).mean()))
    return max(chances)


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
    k = model.config.index_topk
    return {
        "recall_256": recall(model, near),
        "recall_256_top1": recall(model, near, topk=1),
        "recall_4096": recall(model, long),
        "haystack_4096": haystack_recall(model, heldout, 4096, 4 if quick else 40),
        "recall_chance": 1 / len(tasks.VALUES),
        "hit_at_1": needle_hits(model, near, 1),
        "hit_at_2": needle_hits(model, near, 2),
        f"hit_at_{k}": needle_hits(model, near, k),
        "hit_chance": {str(n): chance_hits(model, near, n) for n in (1, 2, k)},
        "text_loss": text_loss(model, heldout, windows=8 if quick else 64, length=256),
        "text_loss_uniform": float(np.log(model.config.vocab_size)),
    }
