"""What compressing keeps: a token's weight in an entry, attention's split over window, entries and sink, and RoPE undone.

Weights are read from the model's own lines while they run, positions are moved by hooks; nothing is computed a second way.
(reference/deepseek-v4.md, sections 1.1, 1.2, 2.1 and 3)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.config import HybridConfig
from workbench.errors import InputError
from workbench.model.compressor import Compressor
from workbench.model.language_model import LanguageModel
from workbench.model.layers import Rotary, rotate
from workbench.runtime import device_name, threads_for_run, use_threads
from workbench.trace import Trace
from workbench.walk.lines import Statement, Watcher

POOLING = Statement(Compressor.forward, "pooled = self.norm((torch.softmax(scores", "attn.compressor")
MOST_MOVED = 10_000  # beyond, float32 knows an angle less and less well


@dataclass(frozen=True, slots=True)
class GateWeights:
    """How each entry of a layer is made: ``weights`` [S, rows, D] float32, which sum to one over the rows in every channel.

    ``tokens`` [S, rows] says which token a row is, -1 before the text. In CSA the first half of the rows is the block before
    the entry's own (series a), the second half its own (series b); an HCA entry has its own block alone.
    """

    label: str
    layer: int
    kind: str
    weights: np.ndarray
    tokens: np.ndarray

    @property
    def by_token(self) -> np.ndarray:
        """Mean weight of each row over the channels, [S, rows]."""
        return self.weights.mean(-1)

    @property
    def own_share(self) -> float:
        """Mean weight of an entry's own block, over all entries that have a block before them."""
        ratio = self.weights.shape[1] // 2 if self.kind == "csa" else self.weights.shape[1]
        later = self.tokens[:, 0] >= 0
        return float(self.by_token[later, -ratio:].sum(1).mean())

    @property
    def effective_tokens(self) -> np.ndarray:
        """[S, D]: exp of the entropy of a channel's weights, the number of tokens if all that count counted alike."""
        w = self.weights.astype(np.float64)
        return np.exp(-(w * np.log(np.where(w > 0, w, 1.0))).sum(1))

    def received(self, length: int) -> np.ndarray:
        """For each of ``length`` tokens, the mean weight over the channels that it has in all entries together, [length]."""
        total, there = np.zeros(length), self.tokens >= 0
        np.add.at(total, self.tokens[there], self.by_token[there])
        return total


def gate_weights(model: LanguageModel, ids: Sequence[int], layer: int) -> GateWeights:
    """The weights of every entry that ``ids`` complete in a CSA or HCA layer; the model runs once.

    Raises InputError for a layer without a compressor of that kind, and too few tokens for an entry.
    """
    config = model.config
    kind = config.layer_kinds[layer] if 0 <= layer < len(config.layer_kinds) else "none"
    if kind not in ("csa", "hca"):
        having = [i for i, one in enumerate(config.layer_kinds) if one in ("csa", "hca")]
        raise InputError(f"layers of {model.name} that compress by gates are {having}, got {layer!r}")
    block, ratio, found = model.blocks[layer], config.compress_ratios[layer], []
    if len(ids) < ratio:
        raise InputError(f"an entry of layer {layer} takes {ratio} tokens, got {len(ids)}")
    watcher = Watcher([POOLING], lambda path: attrgetter(path)(block), lambda _, seen: found.append(seen["scores"].softmax(2)))
    hooks = [
        block.register_forward_pre_hook(lambda *_: watcher.start()),
        block.register_forward_hook(lambda *_: watcher.stop()),
    ]
    try:
        _logits(model, ids)
    finally:
        watcher.stop()
        for hook in hooks:
            hook.remove()
    weights = found[-1][0].cpu().numpy()  # [S, rows, D]
    first = ratio * np.arange(len(weights)) - (ratio if kind == "csa" else 0)
    tokens = np.maximum(first[:, None] + np.arange(weights.shape[1]), -1)
    return GateWeights(_label(model), layer, kind, weights, tokens)


@dataclass(frozen=True, slots=True)
class Split:
    """How one query's attention divides: ``shares`` [H, 3] of window, entries and sink; they sum to one up to rounding."""

    layer: int
    kind: str
    token: int
    text: str
    shares: np.ndarray
    label: str


def attention_split(trace: Trace, tokens: Sequence[int]) -> list[Split]:
    """One for each of ``tokens`` and each layer that has a window. InputError for a token the trace does not have.

    Also for rows so long that they were recorded pooled (beyond 2,048 tokens): their sum is not known.
    """
    found = []
    for token in tokens:
        if not 0 <= token < trace.length:
            raise InputError(f"the trace has tokens 0..{trace.length - 1}, got {token}")
        for record in (record for record in trace.layers if record.window):
            window = record.window_probs[token].astype(np.float64).sum(1)
            sink = record.sink_probs[token].astype(np.float64)
            entries = np.zeros_like(window)
            if record.selected_probs is not None:
                entries = record.selected_probs[token].astype(np.float64).sum(1)
            elif record.entry_probs is not None:
                if record.entry_pooling(token) > 1:
                    raise InputError(f"the entries of token {token} were recorded pooled; choose an earlier token")
                entries = record.entry_probs[token].astype(np.float64).sum(1)
            shares = np.stack([window, entries, sink], axis=1)
            found.append(Split(record.layer, record.kind, token, trace.token_texts[token], shares, trace.label))
    return found


@dataclass(frozen=True, slots=True)
class Moved:
    """One text at other positions, ``by`` [N] tokens further on each. Largest change of a logit, with the output turned back as
    in V4 and without, ``turned_back`` and ``left_turned`` [N]; and the last token's rotary output channels of one layer,
    ``before`` and ``after`` turning back, [N, H, R / 2, 2].
    """

    label: str
    layer: int
    kind: str
    by: np.ndarray
    turned_back: np.ndarray
    left_turned: np.ndarray
    before: np.ndarray
    after: np.ndarray


@torch.inference_mode()
def moved_text(model: LanguageModel, ids: Sequence[int], layer: int, by: Sequence[int]) -> Moved:
    """Run ``ids`` as if the text began ``by`` tokens later: rotations are made for later positions, nothing else changes.

    ``left_turned`` leaves the inverse rotation of the attention outputs out, in every layer. Raises InputError for a model
    without one, a layer it does not have, no move, and moves outside 0 to 10,000.
    """
    config = model.config
    if not isinstance(config, HybridConfig):
        raise InputError(f"{model.name} does not turn its attention output back; take a V4 model such as tiny-v4")
    if not 0 <= layer < config.num_hidden_layers:
        raise InputError(f"{model.name} has layers 0..{config.num_hidden_layers - 1}, got {layer!r}")
    if not by or min(by) < 0 or max(by) > MOST_MOVED:
        raise InputError(f"a text can be moved by 0 to {MOST_MOVED} tokens, got {list(by)!r:.60}")
    use_threads(threads_for_run())
    home, left_home = _logits(model, ids), _left_turned(model, ids, 0)
    back, left, before, after = [], [], [], []
    for far in by:
        outputs: list[Tensor] = []
        attn = model.blocks[layer].attn
        hook = attn.wo_a.register_forward_pre_hook(lambda _, args, to=outputs: to.append(args[0][0, -1]))
        try:
            with _moved(model, far):
                back.append(float((_logits(model, ids) - home).abs().max()))
        finally:
            hook.remove()
        left.append(float((_left_turned(model, ids, far) - left_home).abs().max()))
        output = outputs[-1].view(config.num_attention_heads, config.head_dim)
        turns = _turns(model, layer, torch.tensor([len(ids) - 1 + far], device=model.device))
        after.append(_pairs(output, config.qk_rope_head_dim))
        before.append(_pairs(rotate(output, turns), config.qk_rope_head_dim))
    kind = config.layer_kinds[layer]
    arrays = (np.array(by), np.array(back), np.array(left), np.stack(before), np.stack(after))
    return Moved(_label(model), layer, kind, *arrays)


@contextmanager
def _moved(model: LanguageModel, by: int) -> Iterator[None]:
    """All positions that are turned into angles are ``by`` larger."""
    tables = [module for module in model.modules() if isinstance(module, Rotary)]
    hooks = [table.register_forward_pre_hook(lambda _, args: (args[0] + by,)) for table in tables]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _left_turned(model: LanguageModel, ids: Sequence[int], by: int) -> Tensor:
    """The logits if outputs were not turned back: they are turned forth again before the output projection."""
    config: Any = model.config
    hooks = []
    for layer, block in enumerate(model.blocks):
        turns = _turns(model, layer, torch.arange(by, by + len(ids), device=model.device)).unsqueeze(1)

        def forth(_: Any, args: Any, turns: Tensor = turns) -> tuple[Tensor]:
            return (rotate(args[0].unflatten(-1, (-1, config.head_dim)), turns).flatten(2),)

        hooks.append(block.attn.wo_a.register_forward_pre_hook(forth))
    try:
        with _moved(model, by):
            return _logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()


def _turns(model: Any, layer: int, positions: Tensor) -> Tensor:
    """Angles of a layer at these positions, which are not moved again."""
    window = model.config.layer_kinds[layer] == "window"
    return (model.window_rotary if window else model.compressed_rotary).forward(positions)


def _pairs(output: Tensor, channels: int) -> np.ndarray:
    return output[:, -channels:].unflatten(-1, (-1, 2)).cpu().numpy()


def _logits(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([list(ids)], device=model.device), prefetch="resident")[0]


def _label(model: LanguageModel) -> str:
    return f"{model.name} ({model.what}), measured on {device_name(str(model.device))}"
