"""A small trace that obeys every rule of ``workbench.trace`` and needs no model: for tests of figures and widgets.

The probabilities of a query (window, entries, sink) sum to one, the selection is what the recorded lightning indexer
scores say, and nothing looks into the future. One letter sizes are those of ``workbench.trace``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workbench.config import DenseConfig, EngramConfig, HybridConfig, LatentConfig, ModelConfig, SharedStreamConfig
from workbench.trace import ATTENDING_TO_ALL, EngramTrace, LayerTrace, Span, Timeline, Trace, entry_pooling, row_tokens

# Ordinary words beside everything that breaks a careless page: markup, quotes, line ends, right-to-left text, an emoji.
ORDINARY = ("The", " key", " of", " box", " seven", " is", ",", ".")
NASTY = (" <b>bold</b>", " \"quoted'", "\n", "  ", " שלום", " 🔑", " &amp;")
WORDS = ORDINARY + NASTY
BYTES_PER_VALUE = 4  # storage "fp32"
ROWS_OF_CHUNK = 512  # queries scored at once, so that a long trace needs little memory
# Layers as each family has them; every kind occurs once, V4.1's with a stream of two tokens an entry and one of one.
FAMILIES = {
    "deepseek_v4": ("window", "csa", "hca"),
    "deepseek_v41": ("window", "csa2-full", "csa2-reuse", "csa2-reindex", "csa2-full", "csa2-reuse"),
    "deepseek_v32": ("mla-dsa", "mla-dsa"),
    "deepseek_v3": ("mla", "mla"),
    "llama": ("gqa", "gqa"),
    "llama, a KV head for each head": ("mha", "mha"),
}


def synthetic_trace(
    length: int = 97,
    seed: int = 0,
    needle: int | None = None,
    *,
    prompt_length: int | None = None,
    prefill_chunk: int = 64,
    kinds: Sequence[str] = ("window", "csa", "hca", "csa"),
    heads: int = 3,
    window: int = 7,
    topk: int = 5,
    csa_ratio: int = 4,
    hca_ratio: int = 16,
    stream_ratios: Sequence[int] = (2, 1),
) -> Trace:
    """A consistent trace of ``length`` tokens: the prompt in chunks of ``prefill_chunk``, then one token per step.

    ``kinds`` are the layers of one family. ``needle`` is a token whose entry every later query of a layer that chooses scores
    highest and attends to most; ``notes["needle"]`` then holds its first and last token. By default the last quarter of the
    tokens was decoded. ``stream_ratios`` are those of V4.1's shared streams, in turn.
    """
    rng = np.random.default_rng(seed)
    prompt = length - length // 4 if prompt_length is None else prompt_length
    config = _config(kinds, heads, window, topk, csa_ratio, hca_ratio, stream_ratios)
    starts = np.array([*range(0, prompt, prefill_chunk), *range(prompt, length)], np.int32)
    ids = rng.integers(0, len(WORDS), length + 1)
    memories = _engram(rng, config, length)
    top_probs = np.sort(rng.dirichlet(np.ones(6), len(starts))[:, :5], axis=1)[:, ::-1]
    top_ids = np.argsort(rng.random((len(starts), len(WORDS))), axis=1)[:, :5]
    ends = np.append(starts[1:], length)
    layers: list[LayerTrace] = []
    for number in range(len(kinds)):
        layers.append(_layer(rng, number, length, config, needle, layers))
    return Trace(
        model="synthetic-v4" if isinstance(config, HybridConfig) else f"synthetic-{kinds[-1]}",
        what="random numbers, for tests",
        device="CPU",
        config=config.to_dict(),
        token_ids=ids[:length].astype(np.int32),
        token_texts=tuple(WORDS[i] for i in ids),
        prompt_length=prompt,
        layers=tuple(layers),
        engram=memories,
        timeline=_timeline(rng, ends - starts),
        step_starts=starts,
        cache_bytes=_cache_bytes(config, ends),
        cache_reserved=np.full(len(starts), 4096, np.int64),
        top_ids=top_ids.astype(np.int32),
        top_probs=top_probs.astype(np.float32),
        next_ids=ids[ends].astype(np.int32),
        notes={} if needle is None else {"needle": [needle, needle]},
    )


def _config(
    kinds: Sequence[str],
    heads: int,
    window: int,
    topk: int,
    csa_ratio: int,
    hca_ratio: int,
    stream_ratios: Sequence[int],
) -> ModelConfig:
    common = {"vocab_size": len(WORDS), "hidden_size": 24, "num_attention_heads": heads}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    index = {"index_n_heads": 2, "index_head_dim": 8}
    if set(kinds) <= {"gqa", "mha"}:
        kv_heads = 1 if "gqa" in kinds else heads
        return DenseConfig(
            **common, num_hidden_layers=len(kinds), num_key_value_heads=kv_heads, head_dim=8, intermediate_size=16
        )
    if set(kinds) <= {"mla", "mla-dsa"}:
        return LatentConfig(
            **common,
            **experts,
            **index,
            num_hidden_layers=len(kinds),
            q_lora_rank=8,
            kv_lora_rank=12,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            intermediate_size=16,
            index_topk=topk if "mla-dsa" in kinds else 0,
            n_group=2,
            topk_group=1,
        )
    shared = (
        common | experts | index | {"head_dim": 16, "qk_rope_head_dim": 4, "q_lora_rank": 8, "o_groups": 1, "o_lora_rank": 8}
    )
    shared |= {"index_topk": topk, "sliding_window": window, "hc_mult": 2}
    if not set(kinds) <= {"window", "csa", "hca"}:
        owners = [i for i, kind in enumerate(kinds) if kind == "csa2-full"]
        made = np.cumsum([kind == "csa2-full" for kind in kinds])
        ratios = [
            0 if kind == "window" else stream_ratios[(n - 1) % len(stream_ratios)] for kind, n in zip(kinds, made, strict=True)
        ]
        choosers = tuple(i for i, kind in enumerate(kinds) if kind in ("csa2-full", "csa2-reindex"))
        return SharedStreamConfig(
            **shared, compress_ratios=tuple(ratios), kv_source_layer_ids=tuple(owners), index_source_layer_ids=choosers
        )
    return HybridConfig(
        **shared,
        layer_kinds=tuple(kinds),
        mlp_kinds=tuple("score" for _ in kinds),
        csa_ratio=csa_ratio,
        hca_ratio=hca_ratio,
        engram=EngramConfig(
            layer_ids=(min(1, len(kinds) - 1),), vocab_size=53, compressed_vocab_size=len(WORDS), n_heads=2, head_dim=4
        ),
    )


def _engram(rng: np.random.Generator, config: ModelConfig, length: int) -> tuple[EngramTrace, ...]:
    if not isinstance(config, HybridConfig) or config.engram is None:
        return ()
    engram = config.engram
    gates = rng.uniform(0, 1, (length, config.hc_mult)).astype(np.float16)
    rows = rng.integers(0, engram.rows_per_token * engram.vocab_size, (length, engram.rows_per_token))
    return tuple(EngramTrace(i, rows.astype(np.int64), gates) for i in engram.layer_ids)


def _layer(
    rng: np.random.Generator,
    number: int,
    length: int,
    config: ModelConfig,
    needle: int | None,
    before: Sequence[LayerTrace],
) -> LayerTrace:
    heads, window = config.num_attention_heads, config.sliding_window
    kind, ratio = config.layer_kinds[number], config.compress_ratios[number]
    t = np.arange(length)
    seen = t[:, None] - window + 1 + np.arange(window) >= 0  # [L, W]
    window_mass = np.where(seen[:, None, :], rng.gamma(0.4, 1.0, (length, heads, window)), 0.0)
    sink_mass = rng.gamma(1.0, 0.5, (length, heads)) + 1e-3 if window else np.zeros((length, heads))
    if kind == "window":
        total = window_mass.sum(-1) + sink_mass
        return LayerTrace(number, kind, 0, _half(window_mass / total[..., None]), _half(sink_mass / total))
    closed = (t + 1) // ratio  # [L] entries complete before each query
    if kind in ATTENDING_TO_ALL:
        pooling = np.array([entry_pooling(int(i), row_tokens(length, ratio)) for i in t])
        columns = -(-closed // pooling)
        entry_mass = rng.gamma(0.4, 1.0, (length, heads, int(columns.max(initial=0)))) + (1e-3 if not window else 0.0)
        entry_mass *= (np.arange(entry_mass.shape[-1]) < columns[:, None])[:, None, :]
        total = window_mass.sum(-1) + sink_mass + entry_mass.sum(-1)
        probs = _half(entry_mass / total[..., None])
        return LayerTrace(
            number, kind, ratio, _half(window_mass / total[..., None]), _half(sink_mass / total), entry_probs=probs
        )
    assert not isinstance(config, DenseConfig)
    if kind == "csa2-reuse":  # it has no indexer of its own
        chooser = next(layer for layer in reversed(before) if layer.indexes)
        assert chooser.selected is not None and chooser.selected_scores is not None
        entry_mass = np.where((chooser.selected >= 0)[:, None, :], rng.gamma(0.4, 1.0, chooser.selected_probs.shape), 0.0)
        total = window_mass.sum(-1) + sink_mass + entry_mass.sum(-1)
        return LayerTrace(
            number,
            kind,
            ratio,
            _half(window_mass / total[..., None]),
            _half(sink_mass / total),
            selected=chooser.selected,
            selected_scores=chooser.selected_scores,
            selected_probs=_half(entry_mass / total[..., None]),
        )
    queries = rng.normal(size=(length, config.index_n_heads, config.index_head_dim)).astype(np.float32)
    weights = rng.uniform(0.1, 1.0, (length, config.index_n_heads)).astype(np.float32)
    keys = rng.normal(size=(length // ratio, config.index_head_dim)).astype(np.float32)
    if needle is not None and needle // ratio < len(keys):  # every query likes direction 0, and one key has much of it
        queries[..., 0] = 3.0
        keys[needle // ratio] = 10.0 * np.eye(config.index_head_dim, dtype=np.float32)[0]
    selected, scores, runner, runner_scores = _select(queries, weights, keys, closed, config.index_topk)
    entry_mass = np.where((selected >= 0)[:, None, :], rng.gamma(0.4, 1.0, (length, heads, selected.shape[1])), 0.0)
    if not window:
        entry_mass[:, :, 0] += 1e-3  # the first token is always there, and nothing else may be
    if needle is not None:
        entry_mass[np.broadcast_to((selected == needle // ratio)[:, None, :], entry_mass.shape)] = 8.0 + window
    total = window_mass.sum(-1) + sink_mass + entry_mass.sum(-1)
    return LayerTrace(
        number,
        kind,
        ratio,
        _half(window_mass / total[..., None]),
        _half(sink_mass / total),
        selected=selected,
        selected_scores=scores,
        selected_probs=_half(entry_mass / total[..., None]),
        runner_up=runner,
        runner_up_scores=runner_scores,
        index_queries=queries,
        index_weights=weights,
        index_keys=keys,
    )


def _select(
    queries: np.ndarray, weights: np.ndarray, keys: np.ndarray, closed: np.ndarray, topk: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Entries kept per query, best first, their scores, and the best entry left out with its score."""
    length, entries = len(queries), len(keys)
    selected, runner = np.full((length, topk), -1, np.int32), np.full(length, -1, np.int32)
    scores, runner_scores = np.full((length, topk), -np.inf, np.float32), np.full(length, np.nan, np.float32)
    for start in range(0, length, ROWS_OF_CHUNK):
        rows = slice(start, start + ROWS_OF_CHUNK)
        relu = np.maximum(np.einsum("thd,sd->ths", queries[rows], keys), 0.0)
        every = np.einsum("th,ths->ts", weights[rows], relu)  # [T, S]
        every[np.arange(entries) >= closed[rows, None]] = -np.inf
        order = np.argsort(-every, axis=1, kind="stable")[:, : topk + 1]  # equal scores: lower entry first
        best = np.take_along_axis(every, order, axis=1)
        order = np.where(np.isfinite(best), order, -1)
        kept = min(topk, order.shape[1])
        selected[rows, :kept], scores[rows, :kept] = order[:, :kept], best[:, :kept]
        if order.shape[1] > topk:
            runner[rows] = order[:, topk]
            runner_scores[rows] = np.where(order[:, topk] >= 0, best[:, topk], np.nan)
    return selected, scores, runner, runner_scores


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16)


def _timeline(rng: np.random.Generator, tokens: np.ndarray) -> Timeline:
    """Per step: rows looked up while layer 0 computes, a stall if they come late, their transfer, then the other layers."""
    spans, now = [], 0.0
    for step, count in enumerate(tokens.tolist()):
        first = 1e-3 + 2e-5 * count
        lookup = first * rng.uniform(0.3, 1.5)
        transfer = 0.1 * lookup
        ready = now + lookup
        spans.append(Span("lookup", f"rows {step}", step, now, ready))
        spans.append(Span("compute", f"layer 0, step {step}", step, now, now + first))
        if ready > now + first:
            spans.append(Span("stall", f"wait {step}", step, now + first, ready, after=(f"rows {step}",)))
        begin = max(ready, now + first)
        spans.append(Span("transfer", f"copy {step}", step, begin, begin + transfer, after=(f"rows {step}",)))
        now = begin + transfer + 3 * first
        spans.append(Span("compute", f"layers 1 on, step {step}", step, begin + transfer, now, after=(f"copy {step}",)))
    return Timeline("measured", tuple(spans), "CPU", "made up for tests")


def _cache_bytes(config: ModelConfig, ends: np.ndarray) -> dict[str, np.ndarray]:
    """Bytes held by part after each step, in the proportions of a real cache (the tail kept simple)."""
    parts = {name: np.zeros(len(ends), np.int64) for name in ("window", "compressed", "index", "tail", "engram")}
    if isinstance(config, DenseConfig | LatentConfig):
        if isinstance(config, DenseConfig):
            width = 2 * config.num_key_value_heads * config.head_dim
        else:
            width = config.kv_lora_rank + config.qk_rope_head_dim
            parts["index"] += config.layer_kinds.count("mla-dsa") * ends * config.index_head_dim * BYTES_PER_VALUE
        return parts | {"kv": config.num_hidden_layers * ends * width * BYTES_PER_VALUE}
    for kind, ratio in zip(config.layer_kinds, config.compress_ratios, strict=True):
        parts["window"] += np.minimum(ends, config.sliding_window) * config.head_dim * BYTES_PER_VALUE
        if kind in ("csa", "hca", "csa2-full"):
            parts["compressed"] += ends // ratio * config.head_dim * BYTES_PER_VALUE
            parts["tail"] += ends % ratio * 2 * config.head_dim * BYTES_PER_VALUE
        if kind in ("csa", "csa2-full"):
            parts["index"] += ends // ratio * config.index_head_dim * BYTES_PER_VALUE
    if config.engram is not None:
        state = np.minimum(ends, config.engram.conv_state_length) * config.hc_mult * config.hidden_size
        parts["engram"] += len(config.engram.layer_ids) * state * BYTES_PER_VALUE
    return parts
