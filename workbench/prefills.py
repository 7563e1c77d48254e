"""V4.1's two ways to read a prompt, side by side on a live model: exact, and with bounded replay.

Exact runs every layer on every token. Replay runs the encoder on every token and the decoder on the last window alone; what it
leaves exact and what it does not is measured here. (reference/deepseek-v41.md, section 10)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.model.kv_cache import KVCache
from workbench.model.language_model import LanguageModel
from workbench.model.single_pass import V41Model
from workbench.needle import hide_needle, sample_text
from workbench.runtime import device_name, synchronise, threads_for_run, use_threads
from workbench.sharing import replay_share
from workbench.training import tasks

Mode = Literal["exact", "replay"]
MODES: tuple[Mode, ...] = ("exact", "replay")
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Prefills:
    """One prompt read both ways; ``label`` says by which model and where. Layer -> largest difference of any cached number.

    ``seconds``: mode -> the shortest of a few readings. ``work_share``: replay's layers x tokens over exact's, counted.
    ``stream_gaps`` of shared entries and index keys, ``window_gaps`` of windows. ``logit_gap``: the largest difference of a
    logit after the prompt, in units of their spread. ``following``: mode -> the tokens decoded next, the likeliest each.
    """

    label: str
    tokens: int
    split: int
    seconds: dict[str, float]
    work_share: float
    stream_gaps: dict[int, float]
    window_gaps: dict[int, float]
    logit_gap: float
    following: dict[str, tuple[int, ...]]

    @property
    def same(self) -> int:
        """How many tokens both decode alike before the first that differs."""
        pairs = list(zip(*(self.following[mode] for mode in MODES), strict=True))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def compare_prefills(model: LanguageModel, ids: Sequence[int], follow: int = 8) -> Prefills:
    """Read ``ids`` exactly and with replay, then decode ``follow`` tokens from each cache.

    Raises InputError for a model without a replay, an empty prompt, and ``follow`` below 0.
    """
    model = _replaying(model)
    if not len(ids) or follow < 0:
        raise InputError(f"give a prompt of at least one token and follow >= 0, got {len(ids)} tokens and {follow}")
    use_threads(threads_for_run())
    line = torch.tensor([list(ids)], device=model.device)
    seconds: dict[str, float] = {}
    caches: dict[str, KVCache] = {}
    logits: dict[str, Tensor] = {}
    with torch.inference_mode():
        for _ in range(REPEATS):
            for mode in MODES:
                caches[mode] = model.new_cache()
                start = time.perf_counter()
                logits[mode] = model.prefill(line, caches[mode], mode)
                synchronise(model.device)
                seconds[mode] = min(seconds.get(mode, np.inf), time.perf_counter() - start)
        exact, replay = caches["exact"], caches["replay"]
        windows, streams = _gaps(exact, replay, ("window",)), _gaps(exact, replay, ("compressed", "index"))
        following: dict[str, tuple[int, ...]] = {mode: _decode(model, caches[mode], logits[mode], follow) for mode in MODES}
    gap = (logits["exact"] - logits["replay"]).abs().max() / logits["exact"].std()
    return Prefills(
        label=f"{model.name} ({model.what}), measured on {device_name(str(model.device))}",
        tokens=len(ids),
        split=model.replay_split(),
        seconds=seconds,
        work_share=replay_share(model.config, len(ids)),
        stream_gaps=streams,
        window_gaps=windows,
        logit_gap=float(gap),
        following=following,
    )


def needles_both_ways(model: LanguageModel, trials: int = 12, tokens: int = 512, seed: int = 7) -> dict[str, int]:
    """How many of ``trials`` hidden needles are answered after an exact prefill, and how many after a replayed one.

    Keys, codes, depths and texts are drawn from ``seed``; each needle is asked both ways. Raises InputError for a model without
    a replay or a tokenizer, and for no trial.
    """
    model = _replaying(model)
    if model.tokenizer is None or trials < 1:
        raise InputError("needles need a model with a tokenizer and at least one trial; load a shipped model")
    use_threads(threads_for_run())
    rng, text = np.random.default_rng(seed), sample_text()
    right: dict[str, int] = dict.fromkeys(MODES, 0)
    with torch.inference_mode():
        for trial in range(trials):
            start = int(rng.integers(len(text) - 8 * tokens))
            key, value = str(rng.choice(np.array(tasks.KEYS))), str(rng.integers(10, 100))
            depth = 0.8 * (trial + 0.5) / trials
            needle = hide_needle(model, text[start : start + 8 * tokens], key, value, depth, tokens)
            line = torch.tensor([needle.ids], device=model.device)
            for mode in MODES:
                cache = model.new_cache()
                first = model.prefill(line, cache, mode)
                right[mode] += _decode(model, cache, first, len(needle.value_ids)) == needle.value_ids
    return right


def _replaying(model: LanguageModel) -> V41Model:
    if not isinstance(model, V41Model):
        raise InputError(f"only V4.1 has a replayed prefill; load 'tiny-v41', got {model.name}")
    model.replay_split()  # says why, where its layers do not allow it
    return model


def _decode(model: V41Model, cache: KVCache, logits: Tensor, count: int) -> tuple[int, ...]:
    """The likeliest next tokens, ``count`` of them, one by one."""
    found: list[int] = []
    while len(found) < count:
        found.append(int(logits[0, -1].argmax()))
        if len(found) < count:
            logits = model(torch.tensor([found[-1:]], device=model.device), cache, logits="last")
    return tuple(found)


def _gaps(a: KVCache, b: KVCache, parts: tuple[str, ...]) -> dict[int, float]:
    """Layer -> largest difference in these parts; layers that have none of them are left out."""
    found: dict[int, float] = {}
    for layer, (mine, other) in enumerate(zip(a.layers, b.layers, strict=True)):
        for part in parts:
            rows, others = getattr(mine, part), getattr(other, part)
            if rows is None:
                continue
            x, y = (rows.last(rows.length), others.last(others.length)) if part == "window" else (rows.read(), others.read())
            count = min(x.shape[1], y.shape[1])  # a replayed window may not reach back as far
            gap = (x[:, x.shape[1] - count :] - y[:, y.shape[1] - count :]).abs()
            found[layer] = max(found.get(layer, 0.0), float(gap.max()) if gap.numel() else 0.0)
    return found
