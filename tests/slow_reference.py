"""DeepSeek-V4 one token at a time in float64 numpy, written from the equations and not from our modules.

Nothing is cached, chunked or fused here: every key ever made is kept, a compressed entry is pooled when its last token arrives,
and every query sorts all scores. Slow and obvious, so that the fast model can be compared with it.
(reference/deepseek-v4.md, sections 1 to 4, 7 and 8; reference/engram-and-overlap.md, section 1)
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from workbench.config import EngramConfig, HybridConfig, RopeConfig
from workbench.model.families import model_class
from workbench.model.indexer import score_entries
from workbench.model.transformer import V4Model

CONFIG = HybridConfig(
    vocab_size=53,
    hidden_size=24,
    num_attention_heads=3,
    head_dim=12,
    qk_rope_head_dim=4,
    q_lora_rank=11,
    o_groups=3,
    o_lora_rank=5,
    layer_kinds=("window", "csa", "hca", "csa"),
    mlp_kinds=("hash", "score", "hash", "score"),
    n_routed_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=13,
    index_n_heads=16,
    index_head_dim=8,
    index_topk=3,
    csa_ratio=4,
    hca_ratio=7,
    sliding_window=5,
    hc_mult=3,
    max_position_embeddings=8192,
    compress_rope=RopeConfig(factor=4, original_max_position_embeddings=64),
)
ENGRAM = EngramConfig(layer_ids=(1, 3), vocab_size=61, compressed_vocab_size=29, n_heads=2, head_dim=3, pad_token_id=7)


LEAST_GAP = 1e-5  # of scores that decide a choice in V4.1; below, rounding may turn them round


def random_model(config: Any = CONFIG, seed: int = 0) -> Any:
    """A model of any family in which every term is random, also those that start at zero and would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config)(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            leaf = name.rpartition(".")[2]
            noise = torch.randn(tensor.shape, generator=generator)
            if leaf == "tid2eid":  # distinct experts for each token id
                table = torch.rand(tensor.shape[0], config.n_routed_experts, generator=generator).argsort(1)
                tensor.copy_(table[:, : tensor.shape[1]])
            elif leaf == "engram_canonical_ids":  # every id at least once, in a shuffled order
                wanted = config.engram.compressed_vocab_size if config.engram else 1
                tensor.copy_(torch.randperm(len(tensor), generator=generator) % wanted)
            elif "norm" in name or leaf in ("q_weight", "k_weight"):
                tensor.copy_(1 + 0.1 * noise)
            elif leaf == "scale":
                tensor.copy_(0.75 + 0.1 * noise)
            elif leaf in ("attn_sink", "ape", "bias", "base"):
                tensor.copy_(0.5 * noise)
            else:
                tensor.copy_(noise * (1.0 if "table" in name else tensor.shape[-1] ** -0.5))
    return model.eval()


def random_config(seed: int, *, engram: bool | None = None) -> HybridConfig:
    """A tiny configuration that differs with the seed; windows, ratios and widths seldom divide one another."""
    draw = random.Random(seed)
    kinds = draw.choices(["window", "csa", "hca"], k=draw.randint(1, 4))
    heads, groups = draw.choice([(2, 1), (2, 2), (3, 3), (4, 2), (5, 1), (8, 4)])
    rotary, width = draw.choice([2, 4, 6]), draw.choice([8, 10, 12])
    config = replace(
        CONFIG,
        hidden_size=draw.choice([16, 23, 32]),
        num_attention_heads=heads,
        head_dim=width,
        qk_rope_head_dim=rotary,
        o_groups=groups,
        layer_kinds=tuple(kinds),
        mlp_kinds=tuple(draw.choices(["hash", "score"], k=len(kinds))),
        n_shared_experts=draw.choice([1, 2]),
        num_experts_per_tok=draw.choice([1, 2, 5]),
        index_topk=draw.choice([1, 2, 3, 5, 1000]),
        csa_ratio=draw.choice([2, 3, 4, 5]),
        hca_ratio=draw.choice([6, 7, 11, 16]),
        sliding_window=draw.choice([1, 2, 5, 8, 13]),
        hc_mult=draw.choice([1, 2, 4]),
        hc_sinkhorn_iters=draw.choice([1, 2, 20]),
        swiglu_limit=draw.choice([0.5, 10.0]),
    )
    if engram if engram is not None else draw.random() < 0.5:
        layers = tuple(sorted(draw.sample(range(len(kinds)), draw.randint(1, len(kinds)))))
        size = draw.choice([2, 3, 4])
        config = replace(
            config, engram=replace(ENGRAM, layer_ids=layers, max_ngram_size=size, conv_kernel_size=draw.choice([1, 2, 4]))
        )
    return config


def random_ids(config: Any, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1000 + seed))


def in_pieces(model: Any, ids: torch.Tensor, sizes: list[int], **settings: Any) -> torch.Tensor:
    """Logits of ``ids`` read through a cache in pieces of the given sizes."""
    assert sum(sizes) == ids.shape[1]
    cache = model.new_cache(ids.shape[0])
    with torch.inference_mode():
        return torch.cat([model(piece, cache, **settings) for piece in ids.split(sizes, dim=1)], dim=1)


def random_pieces(length: int, seed: int) -> list[int]:
    """Sizes from 1 to about a third of the length, single tokens among them, that sum to ``length``."""
    draw, sizes = random.Random(seed), []
    while sum(sizes) < length:
        sizes.append(min(length - sum(sizes), draw.choice([1, 1, 2, 3, draw.randint(1, max(1, length // 3))])))
    return sizes


def settled(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, T] True up to the first token of a sequence whose choice of entries, candidate blocks or experts is nearly a tie."""
    ties = torch.zeros(ids.shape, dtype=torch.bool)

    def note(kept: torch.Tensor, next_best: torch.Tensor, start: int) -> None:
        near = (kept - next_best < LEAST_GAP) & next_best.isfinite()
        ties[:, start : start + near.shape[1]] |= near

    def choice(_module: Any, _inputs: Any, record: Any) -> None:
        if record.runner_up is not None and record.runner_up.scores.shape[-1]:
            note(record.selection.scores[..., -1], record.runner_up.scores[..., 0], record.start)

    def pool(_module: Any, _inputs: Any, index: Any) -> None:
        if not index.k.length:
            return
        closed = (torch.arange(ids.shape[1]) + 1) // model.config.compress_ratios[source]
        scores = score_entries(index.q, index.w, index.k, closed)
        size, blocks = model.config.candidate_block_size, model.config.candidate_topk_blocks
        best = torch.stack([part.amax(-1) for part in scores.split(size, dim=-1)], dim=-1)
        best[:, torch.arange(len(closed)), ((closed - 1) // size).clamp(min=0)] = torch.inf
        if best.shape[-1] > blocks:
            ranked = best.sort(dim=-1, descending=True).values
            note(ranked[..., blocks - 1], ranked[..., blocks], 0)

    def routing(gate: Any, inputs: Any, _out: Any) -> None:
        ranked = (F.softplus(inputs[0] @ gate.weight.T).sqrt() + gate.bias).sort(dim=-1, descending=True).values
        if ranked.shape[-1] > gate.k:
            note(*ranked[:, gate.k - 1 : gate.k + 1].view(*ids.shape, 2).unbind(-1), 0)

    source = model.config.candidate_source_layer_id
    hooks = [block.attn.attention_tap.register_forward_hook(choice) for block in model.blocks if block.attn.ratio]
    hooks += [block.ffn.gate.register_forward_hook(routing) for block in model.blocks]
    if source >= 0:
        hooks.append(model.blocks[source].attn.indexer.index_tap.register_forward_hook(pool))
    with torch.inference_mode():
        model(ids)
    for hook in hooks:
        hook.remove()
    return ties.cumsum(1) == 0


@dataclass
class Query:
    """What one query of one layer looked at: probabilities by token, by entry, and of the sink [H]; index scores [S]."""

    window: dict[int, np.ndarray]
    entries: dict[int, np.ndarray]
    sink: np.ndarray
    scores: np.ndarray
    selected: list[int]


@dataclass
class Series:
    """The projections one compressor has made so far, and the entries pooled from them."""

    values: list[np.ndarray] = field(default_factory=list)
    gates: list[np.ndarray] = field(default_factory=list)
    entries: list[np.ndarray] = field(default_factory=list)


class SlowV4:
    """One sequence; ``feed`` takes a token and returns its logits [V]. ``seen[layer][t]`` is the Query of token t."""

    def __init__(self, model: V4Model, topk: int | None = None) -> None:
        self.config = model.config
        self.topk = topk or model.config.index_topk
        self.weights = {
            name: (value.double() if value.is_floating_point() else value).numpy() for name, value in model.state_dict().items()
        }
        layers = range(self.config.num_hidden_layers)
        self.keys: list[list[np.ndarray]] = [[] for _ in layers]
        self.main = [Series() for _ in layers]
        self.index = [Series() for _ in layers]
        self.seen: list[list[Query]] = [[] for _ in layers]
        self.conv_inputs: list[list[np.ndarray]] = [[] for _ in layers]
        self.gates: list[list[np.ndarray]] = [[] for _ in layers]
        self.rows: list[list[list[int]]] = [[] for _ in layers]
        self.ids: list[int] = []

    def read(self, ids: torch.Tensor) -> np.ndarray:
        """Logits [T, V] of a whole sequence [T]."""
        return np.stack([self.feed(int(token)) for token in ids])

    def feed(self, token: int) -> np.ndarray:
        self.ids.append(token)
        streams = np.repeat(self.weights["embed.weight"][token][None], self.config.hc_mult, axis=0)  # [M, C]
        for layer in range(self.config.num_hidden_layers):
            if self.config.engram and layer in self.config.engram.layer_ids:
                streams = self._remember(layer, streams)
            streams = self._wrapped(layer, "attn", streams, lambda x, layer=layer: self._attention(layer, x))
            streams = self._wrapped(layer, "ffn", streams, lambda x, layer=layer: self._moe(layer, x, token))
        head = self._part("hc_head.")
        z = rms(streams.ravel(), self.config.rms_norm_eps) @ head["fn"].T
        x = (sigmoid(head["scale"] * z + head["base"]) + self.config.hc_eps) @ streams
        return self.weights["head.weight"] @ (rms(x, self.config.rms_norm_eps) * self.weights["norm.weight"])

    def _part(self, prefix: str) -> dict[str, np.ndarray]:
        return {name[len(prefix) :]: value for name, value in self.weights.items() if name.startswith(prefix)}

    def _wrapped(self, layer: int, part: str, streams: np.ndarray, sublayer: Any) -> np.ndarray:
        """X' = post y + A^T X around one sublayer, A by 20 plain Sinkhorn iterations (section 8)."""
        w, c, m = self._part(f"layers.{layer}.hc_{part}."), self.config, self.config.hc_mult
        z = rms(streams.ravel(), c.rms_norm_eps) @ w["fn"].T
        pre = sigmoid(w["scale"][0] * z[:m] + w["base"][:m]) + c.hc_eps
        post = 2 * sigmoid(w["scale"][1] * z[m : 2 * m] + w["base"][m : 2 * m])
        mix = sinkhorn((w["scale"][2] * z[2 * m :] + w["base"][2 * m :]).reshape(m, m), c.hc_sinkhorn_iters, c.hc_eps)
        x = sum(pre[k] * streams[k] for k in range(m))
        norm = self.weights[f"layers.{layer}.{part}_norm.weight"]
        y = sublayer(rms(x, c.rms_norm_eps) * norm)
        return np.stack([post[k] * y + sum(mix[j, k] * streams[j] for j in range(m)) for k in range(m)])

    def _rotate(self, x: np.ndarray, position: float, compressed: bool) -> np.ndarray:
        """Turn the trailing channels pairwise; YaRN changes frequencies only (section 1.1)."""
        c, out = self.config, x.copy()
        width, rope = c.qk_rope_head_dim, c.compress_rope
        theta = rope.theta if compressed else c.rope_theta
        for i in range(width // 2):
            frequency = theta ** (-2 * i / width)
            if compressed and rope.factor > 1:
                corr = [
                    width * math.log(rope.original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(theta))
                    for turns in (rope.beta_fast, rope.beta_slow)
                ]
                low, high = max(math.floor(corr[0]), 0), min(math.ceil(corr[1]), width - 1)
                ramp = min(1.0, max(0.0, (i - low) / ((high - low) or 0.001)))
                frequency = frequency / rope.factor * ramp + frequency * (1 - ramp)
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            at = x.shape[-1] - width + 2 * i
            out[..., at] = cos * x[..., at] - sin * x[..., at + 1]
            out[..., at + 1] = sin * x[..., at] + cos * x[..., at + 1]
        return out

    def _compress(self, series: Series, w: dict[str, np.ndarray], x: np.ndarray, ratio: int, overlapping: bool) -> None:
        """Take in one token; pool an entry when it closes its block (sections 2.1 and 3)."""
        t = len(series.values)
        series.values.append(w["wkv.weight"] @ x)
        series.gates.append(w["wgate.weight"] @ x + w["ape"][t % ratio])
        if (t + 1) % ratio:
            return
        own = range(t + 1 - ratio, t + 1)
        width = w["norm.weight"].shape[0]
        values, gates = [series.values[i][-width:] for i in own], [series.gates[i][-width:] for i in own]
        if overlapping and own[0] > 0:  # the block before, by its "a" series
            before = range(own[0] - ratio, own[0])
            values += [series.values[i][:width] for i in before]
            gates += [series.gates[i][:width] for i in before]
        weights = softmax(np.stack(gates), axis=0)
        pooled = rms((weights * np.stack(values)).sum(0), self.config.rms_norm_eps) * w["norm.weight"]
        series.entries.append(self._rotate(pooled, own[0], compressed=True))

    def _attention(self, layer: int, x: np.ndarray) -> np.ndarray:
        c, t = self.config, len(self.keys[layer])
        w, kind, ratio = self._part(f"layers.{layer}.attn."), c.layer_kinds[layer], c.compress_ratios[layer]
        compressed, d = kind != "window", c.head_dim
        low = rms(w["wq_a.weight"] @ x, c.rms_norm_eps) * w["q_norm.weight"]
        q = (w["wq_b.weight"] @ low).reshape(-1, d)
        q = self._rotate(rms(q, c.rms_norm_eps), t, compressed)
        key = rms(w["wkv.weight"] @ x, c.rms_norm_eps) * w["kv_norm.weight"]
        self.keys[layer].append(self._rotate(key, t, compressed))
        visible: list[int] = []
        scores = np.zeros(0)
        if compressed:
            self._compress(self.main[layer], self._part(f"layers.{layer}.attn.compressor."), x, ratio, kind == "csa")
            visible = list(range((t + 1) // ratio))
        if kind == "csa":
            index = self._part(f"layers.{layer}.attn.indexer.compressor.")
            self._compress(self.index[layer], index, x, ratio, True)
            iq = self._rotate((w["indexer.wq_b.weight"] @ low).reshape(-1, c.index_head_dim), t, True)
            head_weights = w["indexer.weights_proj.weight"] @ x * c.index_head_dim**-0.5 * c.index_n_heads**-0.5
            scores = np.array([head_weights @ np.maximum(iq @ self.index[layer].entries[s], 0) for s in visible])
            visible = self._chosen(layer, t, sorted(visible, key=lambda s: (-scores[s], s))[: self.topk])
        near = range(max(0, t - c.sliding_window + 1), t + 1)
        rows = [self.keys[layer][i] for i in near] + [self.main[layer].entries[s] for s in visible]
        logits = np.concatenate([q @ np.stack(rows).T * d**-0.5, w["attn_sink"][:, None]], axis=1)  # [H, n + 1]
        probs = softmax(logits, axis=1)
        out = self._rotate(probs[:, :-1] @ np.stack(rows), -t, compressed)
        window = {i: probs[:, n] for n, i in enumerate(near)}
        entries = {s: probs[:, len(near) + n] for n, s in enumerate(visible)}
        self.seen[layer].append(Query(window, entries, probs[:, -1], scores, visible))
        rank = c.o_lora_rank
        parts = [
            w["wo_a.weight"][g * rank : (g + 1) * rank] @ chunk for g, chunk in enumerate(np.split(out.ravel(), c.o_groups))
        ]
        return w["wo_b.weight"] @ np.concatenate(parts)

    def _chosen(self, layer: int, t: int, best: list[int]) -> list[int]:
        """The entries token ``t`` attends to: the best, unless somebody says otherwise."""
        return best

    def _moe(self, layer: int, x: np.ndarray, token: int) -> np.ndarray:
        c, w = self.config, self._part(f"layers.{layer}.ffn.")
        scores = np.sqrt(np.log1p(np.exp(w["gate.weight"] @ x)))
        if c.mlp_kinds[layer] == "hash":
            chosen = w["gate.tid2eid"][token].tolist()
        else:
            chosen = sorted(range(len(scores)), key=lambda e: -(scores[e] + w["gate.bias"][e]))[: c.num_experts_per_tok]
        total = sum(scores[e] for e in chosen)
        shared = [w[f"shared_experts.{name}.weight"] for name in ("w1", "w3", "w2")]
        out = expert(x, *shared, c.swiglu_limit)
        for e in chosen:
            gate, up = np.split(w["experts.w13"][e], 2)
            out = out + scores[e] / total * c.routed_scaling_factor * expert(x, gate, up, w["experts.w2"][e], c.swiglu_limit)
        return out

    def _remember(self, layer: int, streams: np.ndarray) -> np.ndarray:
        """H <- H + SiLU(conv(RMSNorm(gate v))) + gate v, one row per n-gram order and hash head (Engram, section 1)."""
        c, w, engram = self.config, self._part(f"layers.{layer}.engram."), self.config.engram
        assert engram is not None
        rows = ngram_rows(self.ids, self.weights["engram_canonical_ids"], engram, layer)
        self.rows[layer].append(rows)
        memory = np.concatenate([w["table.weight"][r] for r in rows])
        *keys, value = np.split(w["wkv.weight"] @ memory, c.hc_mult + 1)
        gates, gated, inputs = [], [], []
        for m in range(c.hc_mult):
            k = rms(keys[m], c.rms_norm_eps) * w["k_weight"][m]
            q = rms(streams[m], c.rms_norm_eps) * w["q_weight"][m]
            s = float(k @ q) / math.sqrt(c.hidden_size)
            gates.append(float(sigmoid(math.copysign(math.sqrt(max(abs(s), 1e-6)), s))))
            gated.append(gates[-1] * value)
            inputs.append(rms(gated[-1], c.rms_norm_eps) * w["conv_norm"][m])
        self.gates[layer].append(np.array(gates))
        history = self.conv_inputs[layer]
        history.append(np.concatenate(inputs))
        mixed = np.zeros_like(history[-1])
        for tap in range(engram.conv_kernel_size):  # the last tap is the token itself
            back = (engram.conv_kernel_size - 1 - tap) * engram.max_ngram_size
            if back < len(history):
                mixed = mixed + w["conv"][:, tap] * history[-1 - back]
        return streams + (mixed * sigmoid(mixed)).reshape(streams.shape) + np.stack(gated)


def ngram_rows(ids: list[int], canonical: np.ndarray, engram: EngramConfig, layer: int) -> list[int]:
    """Table rows of the n-grams that end at the last of ``ids``, primes found by trial division."""
    used: set[int] = set()
    primes: list[int] = []
    for this in engram.layer_ids:
        primes = []
        for _ in range(2, engram.max_ngram_size + 1):
            candidate = engram.vocab_size - 1
            for _ in range(engram.n_heads):
                candidate += 1
                while candidate in used or any(candidate % n == 0 for n in range(2, math.isqrt(candidate) + 1)):
                    candidate += 1
                used.add(candidate)
                primes.append(candidate)
        if this == layer:
            break
    half = max(1, (2**63 - 1) // engram.compressed_vocab_size // 2)
    draws = np.random.default_rng(engram.seed + 10007 * layer).integers(0, half, size=engram.max_ngram_size, dtype=np.int64)
    padded = [engram.pad_token_id] * engram.max_ngram_size + list(ids)
    rows, mix = [], 0
    for back in range(engram.max_ngram_size):
        mix ^= int(canonical[padded[-1 - back]]) * (2 * int(draws[back]) + 1)
        if back:
            for head in range(engram.n_heads):
                column = (back - 1) * engram.n_heads + head
                rows.append(mix % primes[column] + sum(primes[:column]))
    return rows


def expert(x: np.ndarray, w1: np.ndarray, w3: np.ndarray, w2: np.ndarray, limit: float) -> np.ndarray:
    gate, up = np.minimum(w1 @ x, limit), np.clip(w3 @ x, -limit, limit)
    return w2 @ (gate * sigmoid(gate) * up)


def sinkhorn(logits: np.ndarray, iterations: int, eps: float) -> np.ndarray:
    """One matrix [M, M], written as the reference writes it."""
    a = softmax(logits, axis=1) + eps
    a = a / (a.sum(0, keepdims=True) + eps)
    for _ in range(iterations - 1):
        a = a / (a.sum(1, keepdims=True) + eps)
        a = a / (a.sum(0, keepdims=True) + eps)
    return a


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))
