"""One decoded token of V4 on a CPU, in as few operations as it takes.

The general forms in the files beside this one say what is computed; here is the same for one token of one sequence, where torch
spends its time on starting operations and not on arithmetic. So vectors have no batch axes, a norm is one number, what a few
numbers need is done in plain Python, and every sublayer writes its output where the next operation reads it. Caches are the
same objects, whatever they store. Tests hold this against the general forms.
Letters: M streams, C model dim, H heads, D head dim, S entries, K kept entries, G output groups, E experts, I expert width.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from itertools import chain
from math import exp
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.memory.prefetch import Fetch
from workbench.model.attention.hybrid import HybridAttention, Positions
from workbench.model.compressor import Compressor
from workbench.model.hyper_connections import HyperConnection, HyperHead, balance_4x4
from workbench.model.indexer import CACHED_ELEMENTS, Indexer, keep_best, select_entries
from workbench.model.kv_cache import BlockTail, GrowingRows, KVCache, LayerCache
from workbench.model.layers import RMSNorm, rms_scale
from workbench.model.moe import MoE
from workbench.model.selection_edits import editing

if TYPE_CHECKING:
    from workbench.model.transformer import V4Model

STREAMS = 4  # what every released model has, and what the Sinkhorn in plain numbers is written for


def applies(model: V4Model, ids: Tensor, cache: KVCache | None) -> bool:
    """Whether this call decodes one token of one sequence, in float32 on a CPU; no gradient, nobody listening, no edit."""
    if cache is None or ids.numel() != 1 or model.config.hc_mult != STREAMS:
        return False
    return plain(model.embed.weight) and not any(_step_of(model).hooks) and not editing()


def plain(x: Tensor) -> bool:
    """Whether operations on ``x`` are the few that count here: float32 on a CPU, outside of training."""
    return x.is_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled()


def run_layers(model: V4Model, ids: Tensor, at: Positions, cache: KVCache, fetches: Mapping[int, Fetch]) -> Tensor:
    """``V4Model.run_layers`` for ids [1, 1]: the M streams after the last layer, [1, 1, M, C]."""
    return _step_of(model).run(int(ids), at, cache, fetches).view(1, 1, STREAMS, -1)


_steps: WeakKeyDictionary[V4Model, Step] = WeakKeyDictionary()


def _step_of(model: V4Model) -> Step:
    step = _steps.get(model)
    if step is None or step.made_for != Step.mark_of(model):
        step = _steps[model] = Step(model)
    return step


class Step:
    """The layers' parameters, looked up once, as views: looking them up for each token costs as much as computing with them."""

    def __init__(self, model: V4Model) -> None:
        self.made_for = self.mark_of(model)
        self.config = model.config
        self.embeddings = model.embed.weight.detach()
        self.blocks = [
            (block, Connection(block.hc_attn), Norm(block.attn_norm), Attention(block.attn, model.config.head_dim),
             Connection(block.hc_ffn), Norm(block.ffn_norm), Experts(block.ffn))
            for block in model.blocks
        ]  # fmt: skip
        self.hooks = [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    @staticmethod
    def mark_of(model: V4Model) -> tuple[int, ...]:
        """Changes when parameters are replaced instead of written to, so that a step is made anew."""
        first, last = model.embed.weight, model.head.weight
        return id(first), first.data_ptr(), id(last), last.data_ptr()

    def run(self, token: int, at: Positions, cache: KVCache, fetches: Mapping[int, Fetch]) -> Tensor:
        here, there = torch.zeros(2, STREAMS + 1, self.config.hidden_size).unbind(0)  # the streams, then a sublayer's output
        (streams, y), (next_streams, next_y) = ((x[:STREAMS], x[STREAMS]) for x in (here, there))
        streams.copy_(self.embeddings[token])
        near = Turns(at.window_turns[0], self.config)
        far = Turns(at.compressed_turns[0], self.config)
        for layer, (block, hc_attn, attn_norm, attention, hc_ffn, ffn_norm, experts) in enumerate(self.blocks):
            if layer in fetches:
                joined = block.remember(streams.view(1, 1, STREAMS, -1), fetches[layer], cache.engram)
                streams.copy_(joined[0, 0])
            read, write = hc_attn.weights(streams)
            attention.run(attn_norm(torch.mv(streams.t(), read)), at, far if attention.ratio else near, cache.layers[layer], y)
            torch.mm(write, here, out=next_streams)
            read, write = hc_ffn.weights(next_streams)
            experts.run(ffn_norm(torch.mv(next_streams.t(), read)), token, next_y)
            torch.mm(write, there, out=streams)
        return streams


class Turns:
    """Rotations of whole heads at one position, channels that stay turned by one: of keys, queries, and back for outputs."""

    def __init__(self, turns: Tensor, config: Any) -> None:
        still = turns.new_ones(max(config.head_dim, config.index_head_dim) // 2 - turns.shape[0])
        whole = torch.cat([still, turns])
        self.key, self.index = whole[-(config.head_dim // 2) :], whole[-(config.index_head_dim // 2) :]
        self.query, self.back = self.key * config.head_dim**-0.5, torch.conj_physical(self.key)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """x [..., D], whose neighbouring channels are pairs, rotated by complex turns [D / 2]."""
    return (x.view(torch.complex64) * turns).view(torch.float32)


def _scale(x: Tensor, eps: float) -> float:
    """1 / sqrt(mean(x^2) + eps) of one vector."""
    return (torch.dot(x, x).item() / x.shape[0] + eps) ** -0.5


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x > -700 else 0.0  # beyond, exp overflows


class Norm:
    """RMSNorm of one vector."""

    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = norm.weight.detach(), norm.eps
        self.nothing = torch.zeros_like(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.nothing, x, self.weight, value=_scale(x, self.eps))


class Connection:
    """mHC around one sublayer."""

    def __init__(self, connection: HyperConnection) -> None:
        self.fn, self.base, self.scale = (p.detach() for p in (connection.fn, connection.base, connection.scale))
        self.eps, self.rms_eps, self.iterations = connection.eps, connection.rms_eps, connection.iterations

    def weights(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """streams [M, C] -> what the sublayer reads them with [M], and [M, M + 1] that mixes them and adds what it gives."""
        flat, eps = streams.view(-1), self.eps
        scale = _scale(flat, self.rms_eps)
        pre, post, mix = (scale * part for part in self.scale.tolist())
        z, base = torch.mv(self.fn, flat).tolist(), self.base.tolist()
        read = [_sigmoid(pre * a + b) + eps for a, b in zip(z[:4], base[:4], strict=True)]
        give = [2 * _sigmoid(post * a + b) for a, b in zip(z[4:8], base[4:8], strict=True)]
        logits = [mix * a + b for a, b in zip(z[8:], base[8:], strict=True)]
        rows = []
        for first in (0, 4, 8, 12):
            row = logits[first : first + 4]
            most = max(row)
            powers = [exp(value - most) for value in row]
            total = sum(powers)
            rows.append([power / total + eps for power in powers])
        columns = zip(*balance_4x4(rows, self.iterations, eps), strict=True)  # X'_k = sum_j mix_jk X_j + give_k y
        numbers = array("f", chain(read, *((*column, weight) for column, weight in zip(columns, give, strict=True))))
        packed = torch.frombuffer(numbers, dtype=torch.float32)
        return packed[:STREAMS], packed[STREAMS:].view(STREAMS, STREAMS + 1)


def merge(head: HyperHead, streams: Tensor) -> Tensor:
    """``HyperHead.forward`` for the streams [1, 1, M, C] of one token."""
    flat = streams.view(-1)
    scale = _scale(flat, head.rms_eps) * head.scale.item()
    z, base = torch.mv(head.fn, flat).tolist(), head.base.tolist()
    read = [_sigmoid(scale * a + b) + head.eps for a, b in zip(z, base, strict=True)]
    return torch.mv(streams[0, 0].t(), torch.tensor(read)).view(1, 1, -1)


class Attention:
    """One attention sublayer."""

    def __init__(self, attention: HybridAttention, head_dim: int) -> None:
        self.heads, self.head_dim, self.eps = attention.heads, head_dim, attention.eps
        self.kind, self.ratio, self.topk = attention.kind, attention.ratio, attention.topk
        self.wq_a, self.wq_b = attention.wq_a.weight.detach(), attention.wq_b.weight.detach()
        self.wkv, self.wo_b = attention.wkv.weight.detach(), attention.wo_b.weight.detach()
        groups = attention.wo_a.groups
        self.wo_a = attention.wo_a.weight.detach().view(groups, -1, self.heads * head_dim // groups)  # [G, rank, H D / G]
        self.q_norm, self.kv_norm = Norm(attention.q_norm), Norm(attention.kv_norm)
        self.sinks = attention.attn_sink.detach().view(self.heads, 1)
        if self.ratio:
            self.compressor = Compression(attention.compressor)
        if self.kind == "csa":
            self.indexer = Choice(attention.indexer)

    def run(self, x: Tensor, at: Positions, turns: Turns, cache: LayerCache, out: Tensor) -> None:
        """Attention of one token x [C] over its window, its compressed entries and the sink; the cache takes it in."""
        assert cache.window is not None
        qr = self.q_norm(torch.mv(self.wq_a, x))
        q = torch.mv(self.wq_b, qr).view(self.heads, self.head_dim)
        key = turned(self.kv_norm(torch.mv(self.wkv, x)), turns.key)
        cache.window.append(key.view(1, 1, self.head_dim))
        rows = cache.window.read(in_order=False)[0]
        entries = self._entries(x, qr, at, turns, cache) if cache.compressed is not None else None
        if entries is not None:
            rows = torch.cat([rows, entries])
        rows = rows.to(torch.float32)
        # Heads' queries are normed without a weight, which commutes with turning: the norm goes to their logits instead.
        logits = torch.mm(turned(q, turns.query), rows.t()).mul_(rms_scale(q, self.eps))
        probs = torch.softmax(torch.cat([logits, self.sinks], dim=1), dim=1)
        mixed = turned(torch.mm(probs[:, :-1], rows), turns.back)
        grouped = torch.bmm(self.wo_a, mixed.view(self.wo_a.shape[0], -1, 1))
        torch.mv(self.wo_b, grouped.view(-1), out=out)

    def _entries(self, x: Tensor, qr: Tensor, at: Positions, turns: Turns, cache: LayerCache) -> Tensor | None:
        """The entries that this token attends to, [K, D], after it has joined its block; None where there are none."""
        rows = cache.compressed
        assert rows is not None
        self.compressor.take(x, at.start, cache.tail, rows)
        if self.kind == "csa":
            assert cache.index is not None
            self.indexer.compressor.take(x, at.start, cache.index_tail, cache.index)
        if not rows.length:
            return None
        if self.kind == "csa":
            kept = min(at.topk or self.topk, rows.length)
            best = self.indexer.choose(x, qr, turns.index, cache.index, kept)  # type: ignore[arg-type]
            if kept < rows.length:
                return rows.gather(best)[0, 0]
        return rows.read()[0]


class Compression:
    """A compressor. Most tokens only join the open block, which is two products."""

    def __init__(self, compressor: Compressor) -> None:
        self.ratio, self.overlapping, self.norm = compressor.ratio, compressor.overlapping, Norm(compressor.norm)
        self.frequencies = compressor.rotary.frequencies
        self.ones = torch.ones_like(self.frequencies)
        self.wkv, self.wgate = compressor.wkv.weight.detach(), compressor.wgate.weight.detach()
        self.biases = compressor.ape.detach().unbind(0)

    def take(self, x: Tensor, start: int, tail: BlockTail | None, entries: GrowingRows) -> None:
        """Token x [C] at position ``start`` joins the open block; the entry that it may complete joins ``entries``."""
        assert tail is not None
        values, scores = tail.next_row()
        torch.mv(self.wkv, x, out=values)
        torch.addmv(self.biases[start % self.ratio], self.wgate, x, out=scores)
        if tail.count == self.ratio:
            entries.append(self._close(tail))

    def _close(self, tail: BlockTail) -> Tensor:
        """The entry of the open block, which is full, [1, 1, D]; the next block opens."""
        block, d, first = tail.open[:, 0], self.norm.weight.shape[0], tail.blocks * self.ratio  # [2, R, w]
        rows = torch.cat([tail.overlap[:, 0], block[:, :, d:]], dim=1) if self.overlapping else block  # values, scores
        pooled = (torch.softmax(rows[1], dim=0) * rows[0]).sum(0)
        tail.keep(block[:, None, :0], block[:, None, :, :d] if self.overlapping else None, 1)
        turns = torch.polar(self.ones, first * self.frequencies)
        key = self.norm(pooled)
        moving = 2 * turns.shape[0]
        return torch.cat([key[:-moving], turned(key[-moving:], turns)]).view(1, 1, d)


class Choice:
    """A lightning indexer."""

    def __init__(self, indexer: Indexer) -> None:
        self.heads, self.width = indexer.heads, indexer.width
        self.wq_b, self.weights_proj = indexer.wq_b.weight.detach(), indexer.weights_proj.weight.detach()
        self.compressor = Compression(indexer.compressor)
        self.scale = torch.tensor(self.width**-0.5 * self.heads**-0.5)

    def choose(self, x: Tensor, qr: Tensor, turns: Tensor, keys: GrowingRows, kept: int) -> Tensor:
        """Numbers of the ``kept`` best entries, [1, 1, K]; anything where nothing is left out."""
        q = keys.as_queries(turned(torch.mv(self.wq_b, qr).view(self.heads, self.width), turns))
        w = torch.mv(self.weights_proj, x).mul_(self.scale)
        if self.heads * keys.length > CACHED_ELEMENTS:  # by tiles
            return select_entries(q[None, None], w[None, None], keys, None, kept).entries
        products = torch.mm(q.to(torch.float32), keys.read()[0].to(torch.float32).t()).relu_()  # [H, S]
        scores = torch.mm(w.view(1, -1), products)
        if kept == keys.length:
            return scores  # nothing to choose
        best, entries = scores.topk(kept + 1)
        if bool((best[:, 1:] == best[:, :-1]).any()):  # equal scores: the lower entry first
            return keep_best(scores.unsqueeze(0), kept).entries
        return entries[:, :-1].unsqueeze(0)


class Experts:
    """A mixture of experts, the shared one among them."""

    def __init__(self, moe: MoE) -> None:
        gate, shared = moe.gate, moe.shared_experts
        self.gate, self.k, self.scaling = gate.weight.detach(), gate.k, gate.scaling
        self.table: Any = gate.tid2eid if gate.hashed else None
        self.bias: Any = None if gate.hashed else gate.bias
        self.w13, self.w2 = moe.experts.w13.detach().unbind(0), moe.experts.w2.detach().unbind(0)
        self.width, self.limit = moe.experts.w2.shape[2], moe.experts.limit
        self.shared = [w.weight.detach() for w in (shared.w1, shared.w3, shared.w2)]
        self.shared_limit = shared.limit

    def run(self, x: Tensor, token: int, out: Tensor) -> None:
        """The routed experts of one token x [C], each weighed, and the shared one."""
        scores = F.softplus(torch.mv(self.gate, x)).sqrt_()
        if self.table is not None:
            chosen = self.table[token].tolist()
        else:
            chosen = torch.add(scores, self.bias).topk(self.k, sorted=False).indices.tolist()
        share = scores.tolist()
        total = (sum(share[e] for e in chosen) + 1e-20) / self.scaling
        hidden = x.new_empty(len(chosen), 2 * self.width)
        for row, e in zip(hidden.unbind(0), chosen, strict=True):
            torch.mv(self.w13[e], x, out=row)
        done = _clamped(hidden[:, : self.width], hidden[:, self.width :], self.limit)
        w1, w3, w2 = self.shared
        torch.mv(w2, _clamped(torch.mv(w1, x), torch.mv(w3, x), self.shared_limit), out=out)
        for part, e in zip(done.unbind(0), chosen, strict=True):
            out.addmv_(self.w2[e], part, alpha=share[e] / total)


def _clamped(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.clamp(max=limit)).mul_(up.clamp(-limit, limit))
