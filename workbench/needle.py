"""Hide a needle: a sentence with a code somewhere in a long text, the question at its end, and what the model made of it.

Everything here reads a model or a trace; nothing draws. The sentence is the one the shipped models were trained on, see
training/tasks.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import InputError
from workbench.live import encode
from workbench.model.transformer import V4Model
from workbench.trace import Trace
from workbench.training import score, tasks

MAX_TOKENS = 4096
SAMPLE_TEXT = Path(__file__).parent / "assets" / "heldout.txt"


@dataclass(frozen=True, slots=True)
class Needle:
    """A prompt with a needle in it: token ids, where the value's first token stands, and what was hidden."""

    ids: tuple[int, ...]
    position: int
    key: str
    value: str

    @property
    def notes(self) -> dict[str, Any]:
        """What a trace remembers of it."""
        return {"needle": {"position": self.position, "key": self.key, "value": self.value}}


def sample_text() -> str:
    """Text no shipped model was trained on: Python's own documentation and standard library, up to 200 KB."""
    return SAMPLE_TEXT.read_text(encoding="utf-8")


def hide_needle(
    model: V4Model, text: str, key: str = "apple", value: str = "37", depth: float = 0.5, tokens: int | None = None
) -> Needle:
    """Put " The code of KEY is VALUE." into ``text`` at ``depth`` (0 start, 1 end) and ask for it at the end.

    ``tokens`` cuts the text so that the whole prompt has at most that many; without it, a prompt beyond 4,096 tokens raises
    InputError. So do an empty key or value and a depth outside 0..1.
    """
    if not key.strip() or not value.strip():
        raise InputError("give the needle a key and a value, such as 'apple' and '37'")
    if not 0 <= depth <= 1:
        raise InputError(f"depth must lie between 0 (start) and 1 (end), got {depth}")
    record, asked = encode(model, tasks.needle(key.strip(), value.strip())), encode(model, tasks.question(key.strip()))
    room = (tokens or MAX_TOKENS) - len(record) - len(asked)
    filler = encode(model, text) if text else []
    if tokens is not None:
        filler = filler[: max(0, room)]
    if room < 0 or len(filler) > room:
        most = max(0, room)
        raise InputError(f"the text has {len(filler)} tokens, and with the needle at most {most} fit; cut it with tokens=")
    cut = round(depth * len(filler))
    before_value = len(encode(model, tasks.question(key.strip())))
    ids = (*filler[:cut], *record, *filler[cut:], *asked)
    return Needle(ids, cut + before_value, key.strip(), value.strip())


def find_needle(trace: Trace, needle: Needle | None = None) -> dict[str, Any]:
    """How a finished or running trace answered: the answer, and per CSA layer whether the needle's entry was kept, and why.

    A value's token lies in entry b and, because blocks overlap, also in b + 1: either counts. ``rank`` counts from 1 among all
    visible entries by index score; ``chance`` is the probability that as many random entries contain one of the two.
    """
    notes = trace.notes.get("needle") if needle is None else needle.notes["needle"]
    if not notes:
        raise InputError("this trace has no needle; make the prompt with wb.hide_needle")
    position, asked = int(notes["position"]), trace.prompt_length - 1
    layers: list[dict[str, Any]] = []
    for layer in trace.layers:
        if layer.kind != "csa" or trace.length <= asked or layer.selected is None:
            continue
        scores, kept = layer.index_scores(asked), layer.selected[asked]
        kept = kept[kept >= 0]
        right = [e for e in (position // layer.ratio, position // layer.ratio + 1) if e < len(scores)]
        rank = min(1 + int((scores > scores[e]).sum()) for e in right)
        found = [e for e in right if e in kept]
        probs = layer.selected_probs[asked].astype(np.float32) if layer.selected_probs is not None else np.zeros((1, 0))
        columns = [int(np.flatnonzero(layer.selected[asked] == e)[0]) for e in found]
        mass = float(probs[:, columns].sum(1).max()) if columns else 0.0
        unlucky = math.prod((len(scores) - len(right) - i) / (len(scores) - i) for i in range(len(kept)))
        layers.append(
            {
                "layer": layer.layer,
                "entries": right,
                "visible": len(scores),
                "kept": len(kept),
                "found": bool(found),
                "rank": rank,
                "best_head_probability": mass,
                "chance": float(1 - max(0.0, unlucky)),
            }
        )
    step = trace.step_of_token(asked) if trace.steps else -1
    answered = step >= 0 and trace.length > asked and len(trace.top_ids) > step and len(trace.token_texts) > asked + 1
    answer = trace.token_texts[asked + 1].strip() if answered else None
    return {"expected": notes["value"], "answer": answer, "right": answer == notes["value"], "layers": layers}


def needle_rates(model: V4Model, topk: int | None = None, *, sequences: int = 12, seed: int = 7) -> dict[str, float]:
    """Far recall and each CSA layer's hit rate on ``sequences`` held-out streams of 256 tokens, chance beside them.

    Far: the value lies beyond the sliding window, so only compressed entries can carry it.
    """
    if model.tokenizer is None:
        raise InputError("this model has no tokenizer, so no needle can be written for it; load a shipped model")
    held = np.asarray(encode(model, sample_text()))
    stream = tasks.RecallStream.asked_once(model.tokenizer, held)
    batches = [stream.batch(np.random.default_rng(seed), sequences, 256)]
    k = topk or model.config.index_topk
    hits = score.needle_hits(model, batches, k, topk=k)
    return {
        "topk": k,
        "recall": score.recall(model, batches, topk=k)["far"],
        "recall_chance": 1 / len(tasks.VALUES),
        **{f"hit_layer_{layer}": rate for layer, rate in hits.items()},
        "hit_chance": score.chance_hits(model, batches, k),
    }


def untrained_twin(model: V4Model, seed: int = 0) -> V4Model:
    """The same shape and tokenizer with the random weights training starts from."""
    twin = V4Model.untrained(model.config, seed).to(model.device)
    if model.config.engram:
        twin.engram_canonical_ids.copy_(model.engram_canonical_ids)
    twin.tokenizer, twin.name = model.tokenizer, f"{model.name} untrained"
    return twin
