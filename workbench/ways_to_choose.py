"""What the indexer's choice is worth: the same text with entries chosen by the indexer, by attention mass, and at random.

Every layer that chooses is told the same kind of choice; in V4.1 those that reuse a choice follow. The oracle by mass keeps,
for each query and layer, the k entries that would get most attention (mean over heads) if nothing were left out, given what
the layers below chose by mass: no indexer sees that much. Letters: B lines, T tokens, H heads, K kept entries, S entries.
(reference/deepseek-v4.md, section 2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import InputError, whole_number
from workbench.live import check_model
from workbench.microscope import closed_entries, keep_all, label, listened
from workbench.model.indexer import Selection, keep_best
from workbench.model.language_model import LanguageModel
from workbench.model.selection_edits import SelectionEdit, edited_selections
from workbench.needle import sample_text
from workbench.trace import INDEXING
from workbench.training import tasks
from workbench.training.score import window_reach
from workbench.training.tally import TallyStream

METHODS = ("indexer", "mass", "random")
Text = Literal["held-out text", "needles", "tally"]
Edits = dict[nn.Module, SelectionEdit]


@torch.inference_mode()
def selection_curve(
    model: LanguageModel,
    text: Text | Sequence[Sequence[int]] = "held-out text",
    ks: Sequence[int] | None = None,
    *,
    lines: int = 6,
    tokens: int = 384,
    draws: int = 3,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Nats per token lost against keeping every entry, for each k and each way to choose.

    ``text``: "held-out text" counts every token, "needles" and "tally" the answers to questions in it; or lines of token ids,
    all of one length. ``draws`` random choices are made for each k, ``seed`` draws them and the questions.
    Keys of the result: "ks"; "lost", by method an array [k, B x draws] of nats per counted token; "everything" [B], the loss
    with every entry kept; "left_out" [k], entries a query and layer does not see, on average; "recall" [k], the share of the k
    entries with most mass that the indexer keeps, "missed_mass" [k] the attention (0 to 1) that what it leaves out would get,
    both over queries with more than k entries; "text", "lines", "draws", "tokens" counted and "label".
    Raises InputError for a model that chooses nothing and for ks, lines or texts that cannot be used.
    """
    check_model(model)
    kinds = list(model.config.layer_kinds)
    layers = [layer for layer, kind in enumerate(kinds) if kind in INDEXING]
    if not layers:
        raise InputError(f"{model.name} attends to every token, so there is no choice to compare; take another model")
    if min(whole_number("lines", lines), whole_number("draws", draws)) < 1:
        raise InputError(f"lines and draws must be at least 1, got {lines} and {draws}")
    ids, counted = _lines(model, text, lines, tokens, seed)
    ks = _ks(model, ks)
    if (most := max(model.config.compress_ratios[x] for x in layers)) >= ids.shape[1]:
        raise InputError(
            f"lines of {ids.shape[1]} tokens leave nothing to choose where {most} make an entry; give longer lines"
        )
    ratios = {layer: model.config.compress_ratios[layer] for layer in layers}
    attentions = {layer: model.blocks[layer].attn for layer in layers}
    everything = _losses(model, ids, counted, {attentions[x]: keep_all(ratios[x]) for x in layers})
    done, todo = 0, len(ks) * (len(layers) + 2 + draws)

    def losses(edits: Edits, k: int | None = None) -> Tensor:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done / todo)
        return _losses(model, ids, counted, edits, k)

    lost: dict[str, list[Tensor]] = {method: [] for method in METHODS}
    left_out, recall, missed = [], [], []
    for k in ks:
        chosen: Edits = {}
        recalls, masses, open_entries = [], [], []
        for layer in layers:
            own: list[Tensor] = []
            with listened(model, [layer]) as heard:
                losses(chosen | {attentions[layer]: _noting(own, keep_all(ratios[layer]))}, k)
            mass, ranked = _mass(heard.attention[layer], ids.shape[1] - 1)
            best = keep_best(ranked, k).entries
            chosen[attentions[layer]] = _as_told(best)
            agreed, gone, beyond = _compare(_joined(own), best, mass, ratios[layer])
            recalls.append(agreed)
            masses.append(gone)
            open_entries.append(beyond)
        lost["indexer"].append(losses({}, k) - everything)
        lost["mass"].append(losses(chosen) - everything)
        picks = [
            losses({attentions[x]: _at_random(ratios[x], k, 1000 * (seed + 1) + 100 * draw + x) for x in layers})
            for draw in range(draws)
        ]
        lost["random"].append(torch.cat([pick - everything for pick in picks]))
        recall.append(float(np.mean(recalls)))
        missed.append(float(np.mean(masses)))
        left_out.append(float(np.mean(open_entries)))
    return {
        "ks": list(ks),
        "lost": {method: np.array([x.tolist() for x in rows]) for method, rows in lost.items()},
        "everything": np.array(everything.tolist()),
        "left_out": left_out,
        "recall": recall,
        "missed_mass": missed,
        "text": text if isinstance(text, str) else "lines given",
        "lines": len(ids),
        "draws": draws,
        "tokens": int(counted.sum()),
        "label": label(model),
    }


def _ks(model: LanguageModel, ks: Sequence[int] | None) -> Sequence[int]:
    if ks is None:
        ks = [2**i for i in range(model.config.index_topk.bit_length()) if 2**i <= model.config.index_topk]
    if not isinstance(ks, Sequence) or not ks or any(not isinstance(k, int) or k < 1 for k in ks):
        raise InputError(f"ks are positive whole numbers of entries to keep, got {ks!r:.60}")
    return ks


def _lines(model: LanguageModel, text: Any, lines: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and which of the T - 1 predictions count, [B, T - 1]."""
    if not isinstance(text, str):
        lists = isinstance(text, Sequence) and all(isinstance(line, Sequence) for line in text)
        if not lists or not text or len({len(line) for line in text}) != 1 or len(text[0]) < 2:
            raise InputError("lines must be of one length, of at least two tokens")
        ids = torch.tensor([list(line) for line in text])
        return ids.to(model.device), torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool)
    if text not in ("held-out text", "needles", "tally"):
        raise InputError(f"text is 'held-out text', 'needles', 'tally' or lines of token ids, got {text!r}")
    if model.tokenizer is None:
        raise InputError("this model has no tokenizer; give lines of token ids as text")
    held_out = np.asarray(model.tokenizer.encode(sample_text()).ids, np.int64)
    if not 2 <= whole_number("tokens", tokens) < len(held_out) or whole_number("seed", seed) < 0:
        raise InputError(f"lines have from 2 to {len(held_out) - 1} tokens and seeds begin at 0, got {tokens} and {seed}")
    if text == "held-out text":
        starts = np.linspace(0, len(held_out) - tokens - 1, lines).astype(int)
        ids = torch.from_numpy(np.stack([held_out[s : s + tokens] for s in starts]))
        return ids.to(model.device), torch.ones(lines, tokens - 1, dtype=torch.bool)
    rng = np.random.default_rng(seed)
    if text == "needles":
        batch = tasks.RecallStream.asked_once(model.tokenizer, held_out).batch(rng, lines, tokens)
    else:
        batch = TallyStream(model.tokenizer, held_out, gap=window_reach(model)).batch(rng, lines, tokens)
    return torch.from_numpy(batch.ids).to(model.device), torch.from_numpy(batch.read_mask[:, :-1])


def _losses(model: LanguageModel, ids: Tensor, counted: Tensor, edits: Edits, topk: int | None = None) -> Tensor:
    """Mean next-token loss of each line over the tokens that count, [B] float64 on the host."""
    with edited_selections(edits):
        logits = model(ids[:, :-1], topk=topk)
    each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().cpu() * counted
    return each.sum(1) / counted.sum(1)


def _joined(parts: list[Tensor]) -> Tensor:
    """Chunks of queries [B, t, any width] -> [B, T, widest], padded with -1."""
    width = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[-1]), value=-1) for part in parts], dim=1)


def _mass(heard: Sequence[Any], queries: int) -> tuple[Tensor, Tensor]:
    """Mean over heads of the attention to each entry, all kept: [B, T, S], 0 where invisible; and the same with -inf there."""
    total = max(int(part.selection.entries.max()) + 1 for part in heard if part.selection is not None)
    parts, seen = [], []
    for part in heard:
        b, t = part.sink_probs.shape[:2]
        mass, there = torch.zeros(b, t, total), torch.zeros(b, t, total, dtype=torch.bool)
        if part.selection is not None:  # in order of entries, see keep_all
            width = part.selection.entries.shape[-1]
            mass[..., :width], there[..., :width] = part.entry_probs.float().mean(2).cpu(), part.selection.entries.cpu() >= 0
        parts.append(mass)
        seen.append(there)
    mass, visible = torch.cat(parts, dim=1), torch.cat(seen, dim=1)
    assert mass.shape[1] == queries
    return mass * visible, mass.masked_fill(~visible, -torch.inf)


def _compare(own: Tensor, best: Tensor, mass: Tensor, ratio: int) -> tuple[float, float, float]:
    """Share of the best by mass that an indexer keeps, the mass its leftovers would get; how many they are."""
    own, k = own.cpu(), best.shape[-1]
    visible = (torch.arange(mass.shape[1]) + 1) // ratio
    choosing = visible > k  # queries with something to leave out
    if not choosing.any():
        return 1.0, 0.0, 0.0
    held = torch.zeros(*mass.shape[:2], mass.shape[2] + 1, dtype=torch.bool)
    held.scatter_(-1, own.where(own >= 0, mass.shape[2]), True)
    agreed = held.gather(-1, best.clamp(min=0))[:, choosing].float().mean()
    gone = (mass * ~held[..., :-1]).sum(-1)[:, choosing].mean()
    left = (visible - held[..., :-1].sum(-1)).clamp(min=0).float().mean()
    return float(agreed), float(gone), float(left)


def _noting(into: list[Tensor], edit: SelectionEdit) -> SelectionEdit:
    """``edit``, writing down the choice it replaces."""

    def noting(start: int, chosen: Selection) -> Selection:
        into.append(chosen.entries)
        return edit(start, chosen)

    return noting


def _as_told(entries: Tensor) -> SelectionEdit:
    """Entries [B, T, K] chosen beforehand for positions 0..T-1."""

    def edit(start: int, chosen: Selection) -> Selection:
        mine = entries[:, start : start + chosen.entries.shape[1]].to(chosen.entries.device)
        return Selection(torch.zeros_like(mine, dtype=torch.float32), mine)

    return edit


def _at_random(ratio: int, k: int, seed: int) -> SelectionEdit:
    """``k`` entries drawn without putting back for each query, or all that are complete."""
    generator = torch.Generator().manual_seed(seed)

    def edit(start: int, chosen: Selection) -> Selection:
        closed = closed_entries(start, chosen, ratio).cpu()
        scores = torch.rand(*chosen.entries.shape[:2], int(closed.max()), generator=generator)
        hidden = torch.arange(scores.shape[-1]) >= closed
        best = keep_best(scores.masked_fill(hidden, -torch.inf), k)
        return Selection(*(part.to(chosen.entries.device) for part in best))

    return edit
