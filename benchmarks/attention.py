"""Our V4 beside transformers' at long contexts: prefill, decode, memory, and each part against what the machine can do.

    workbench bench attention                    the CPU, one thread, beside ``DeepseekV4ForCausalLM`` with the same weights
    workbench bench attention --device cuda --dtype bf16       ours alone, on any device torch names
    workbench bench attention --quick            two rounds at an eighth of the lengths: does it run?

Both read the text in chunks of 1,024 tokens, in turn, round after round; a ratio is of medians, theirs / ours. Memory is the
peak of a fresh process. The record goes to ``benchmarks/results/attention-<device>-<dtype>.json``.

What the gaps mean (CPU). Decoding one token (model/one_token.py) is about 560 small operations of 1 to 3 us, twelve Sinkhorn
balances in plain Python of 25 us, and 21 MB of weights and rows: with everything in cache the operations are the floor, not the
bytes. What is left to merge are projections that read the same input, at the price of a second copy of their weights; beyond
that only a compiled step helps (a captured graph on an accelerator). Prefill is matrix products of 1,024 rows by 256 columns
with passes over the M streams between them; those passes and the indexer's products (inner length 32 is too short for the full
rate) keep it below the matrix rate, and one fused kernel for score, ReLU and weighing would remove most of that. Selecting is
bound by a scan of the scores, gathering by rows of 256 bytes that lie apart.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import workbench as wb
from benchmarks import _record
from workbench import checkpoint
from workbench.config import HybridConfig
from workbench.model.attention.core import attend_one
from workbench.model.compressor import Compressor
from workbench.model.indexer import topk_lower_first
from workbench.model.kv_cache import KVCache, gather_rows
from workbench.model.transformer import V4Model
from workbench.runtime import device_name, pick_device, synchronize, use_threads

CONFIG = HybridConfig(
    vocab_size=512,
    hidden_size=256,
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=64,
    layer_kinds=("window", "window", "csa", "hca", "csa", "hca"),
    mlp_kinds=("hash", "hash", "score", "score", "score", "score"),
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    index_n_heads=16,
    index_head_dim=32,
    index_topk=64,
    csa_ratio=4,
    hca_ratio=128,
    sliding_window=128,
    hc_mult=4,
    hc_sinkhorn_iters=20,
)
CHUNK, PREFILL, LONG, RECORDED = 1024, 16384, 65536, 65536
ROUNDS, DECODED = 3, 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BARS = {"prefill": 5.0, "decode": 3.0, "growth": 1.6, "peak growth": 4.5, "recorded GB": 3.0}


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="workbench bench attention")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--quick", action="store_true", help="an eighth of the lengths, two rounds, nothing stored")
    options = parser.parse_args(list(arguments))
    device, scale = pick_device(options.device), 8 if options.quick else 1
    if device.type == "cpu":
        use_threads(1)
    found = _record.begin(
        "attention",
        measured_on=device_name(device),
        dtype=options.dtype,
        config=CONFIG.to_dict() | {"chunk": CHUNK},
        tokens={"prefill": PREFILL // scale, "longest": LONG // scale, "recorded": RECORDED // scale},
    )
    ours = make(device, options.dtype)
    theirs = their_model(ours) if (device.type, options.dtype) == ("cpu", "fp32") else None
    with torch.inference_mode():
        found["speed"] = speed(ours, theirs, PREFILL // scale, 2 if options.quick else ROUNDS)
        found["growth"] = growth(ours, LONG // 16 // scale, LONG // scale)
        found["parts"] = parts(ours, PREFILL // scale, found["speed"])
    if device.type == "cpu":
        found["memory"] = memory(scale)
    report(found)
    if not options.quick:
        _record.store(found, f"{found['measured_on']} {options.dtype}")


def make(device: torch.device, dtype: str) -> V4Model:
    return V4Model.untrained(CONFIG).to(device=device, dtype=DTYPES[dtype])


def their_model(ours: V4Model) -> Any:
    """The same weights in ``transformers``, through a saved folder; None where it is not installed."""
    try:
        from transformers import DeepseekV4ForCausalLM
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(ours, folder, dtype=torch.float32)
        return DeepseekV4ForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()


def text(tokens: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def prefill(model: V4Model, ids: torch.Tensor, cache: KVCache | None = None) -> KVCache:
    cache = cache if cache is not None else model.new_cache()
    for piece in ids.split(CHUNK, dim=1):
        model(piece, cache, logits="last")
    synchronize(model.device)
    return cache


def decode(model: V4Model, ids: torch.Tensor, cache: KVCache) -> None:
    for t in range(DECODED):
        model(ids[:, t : t + 1], cache, logits="last")
    synchronize(model.device)


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def speed(ours: V4Model, theirs: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of seconds, ours and theirs in turn in every round, and their ratios."""
    ids = text(tokens, ours.device)
    state: dict[str, Any] = {}

    def their_prefill() -> None:
        past = None
        for piece in ids.split(CHUNK, dim=1):
            past = theirs(piece, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
        state["past"] = past

    def their_decode() -> None:
        for t in range(DECODED):
            theirs(ids[:, t : t + 1], past_key_values=state["past"], use_cache=True, logits_to_keep=1)

    prefill(ours, ids[:, :CHUNK])  # warm
    kept: dict[str, list[float]] = {name: [] for name in ("prefill", "decode", "their prefill", "their decode")}
    for _ in range(rounds):
        kept["prefill"].append(seconds(lambda: state.update(cache=prefill(ours, ids))))
        if theirs is not None:
            kept["their prefill"].append(seconds(their_prefill))
        for _ in range(3):  # short, so in turn more often
            kept["decode"].append(seconds(lambda: decode(ours, ids, state["cache"])) / DECODED)
            if theirs is not None:
                kept["their decode"].append(seconds(their_decode) / DECODED)
    found: dict[str, Any] = {f"{name} s": statistics.median(times) for name, times in kept.items() if times}
    found["rounds"] = kept
    if theirs is not None:
        for name in ("prefill", "decode"):
            found[f"{name} ratio"] = found[f"their {name} s"] / found[f"{name} s"]
    return found


def growth(ours: V4Model, short: int, long: int) -> dict[str, Any]:
    """Seconds per decoded token at a short and at a long context, in turn."""
    ids = text(long, ours.device)
    caches = {length: prefill(ours, ids[:, :length]) for length in (short, long)}
    times: dict[int, list[float]] = {short: [], long: []}
    for _ in range(7):
        for length, cache in caches.items():
            times[length].append(seconds(lambda cache=cache: decode(ours, ids, cache)) / DECODED)
    short_s, long_s = (statistics.median(times[length]) for length in (short, long))
    return {"lengths": [short, long], "decode s": [short_s, long_s], "ratio": long_s / short_s}


def memory(scale: int) -> dict[str, Any]:
    """Peaks of fresh processes: a prefill of 8k and of 32k above the model alone, and a recorded run."""
    weights, short, long = (peak("prefill", tokens) for tokens in (0, 8192 // scale, 32768 // scale))
    return {
        "peak bytes above weights": [short - weights, long - weights],
        "ratio": (long - weights) / max(1, short - weights),
        "recorded run bytes": peak("recorded", RECORDED // scale),
    }


def peak(what: str, tokens: int) -> int:
    """The most memory, in bytes, that a fresh process held which did ``what`` with that many tokens."""
    code = f"from benchmarks.attention import alone; alone({what!r}, {tokens})"
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=settings)
    return int(out.stdout.split()[-1])


def alone(what: str, tokens: int) -> None:
    """One piece of work in this process, then its peak memory in bytes."""
    use_threads(1)
    model = make(torch.device("cpu"), "fp32") if what == "prefill" else wb.load("tiny-v4", device="cpu")
    with torch.inference_mode():
        if what == "prefill":
            model(text(8, model.device), model.new_cache(), logits="last")  # what torch itself takes on first use
            if tokens:
                model(text(tokens, model.device), model.new_cache(), logits="last")  # all at once: the hardest case
        else:
            new = 64
            prompt = [i % model.config.vocab_size for i in text(tokens - new, model.device)[0].tolist()]
            run = wb.run(model, prompt, max_new_tokens=new, record=True)
            run.wait()
            if run.state != "done" or run.trace.length < tokens - 1:
                raise SystemExit(f"the run ended as {run.state}: {run.error}")
    print(peak_memory())


def peak_memory() -> int:
    """The most bytes this process has held. Linux's ``ru_maxrss`` would begin with what the parent held when it forked."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def best_seconds(function: Callable[[], Any], device: torch.device, rounds: int = 15) -> float:
    def once() -> None:
        function()
        synchronize(device)

    once()
    return min(seconds(once) for _ in range(rounds))


def parts(ours: V4Model, context: int, measured: dict[str, Any]) -> dict[str, Any]:
    """Single parts at ``context`` tokens beside what they must move or compute, and the whole beside the machine's rates."""
    device, dtype = ours.device, ours.embed.weight.dtype
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    big, square = random(2**24), random(2048, 2048)
    target = torch.empty_like(big)
    copy_rate = 2 * big.numel() * big.element_size() / best_seconds(lambda: target.copy_(big), device)
    matrix_rate = 2 * 2048**3 / best_seconds(lambda: square @ square, device, 5)
    tiny = random(4)
    operation_s = best_seconds(lambda: [tiny * 2 for _ in range(1000)], device) / 1000
    entries, t, k, d, heads = context // CONFIG.csa_ratio, 256, CONFIG.index_topk, CONFIG.head_dim, CONFIG.num_attention_heads
    scores, rows = random(1, t, entries).float(), random(1, entries, d)
    chosen = topk_lower_first(scores, k)[1]
    q, keys, one = random(1, 1, heads, d), random(1, CONFIG.sliding_window, d), random(1, k, d)
    sinks, x = random(heads), random(1, CHUNK, CONFIG.hidden_size)
    compressor: Compressor = ours.blocks[2].attn.compressor
    size = rows.element_size()
    work: dict[str, tuple[Callable[[], Any], int, int]] = {  # name -> call, bytes it must move, FLOPs
        "top-k of 256 queries": (lambda: topk_lower_first(scores, k), t * (4 * entries + 12 * k), 0),
        "gather for 256 queries": (lambda: gather_rows(rows, chosen), t * k * (2 * d * size + 8), 0),
        "sink softmax of one query": (
            lambda: attend_one(q, keys, one, sinks),
            (CONFIG.sliding_window + k + 2 * heads) * d * size,
            4 * heads * d * (CONFIG.sliding_window + k),
        ),
        "compressor of 1,024 tokens": (
            lambda: compressor(x, 0, None),
            (CHUNK * CONFIG.hidden_size + 4 * d * CONFIG.hidden_size + CHUNK // CONFIG.csa_ratio * d) * size,
            2 * CHUNK * CONFIG.hidden_size * 4 * d,
        ),
    }
    found: dict[str, Any] = {"copy bytes/s": copy_rate, "matrix FLOP/s": matrix_rate, "one small operation s": operation_s}
    for name, (call, moved, flops) in work.items():
        took = best_seconds(call, device)
        bound = max(moved / copy_rate, flops / matrix_rate)
        found[name] = {"s": took, "bytes": moved, "flops": flops, "bound s": bound, "times the bound": took / bound}
    flops = sum(prefill_flops(ours, first) for first in range(0, context, CHUNK))
    found["prefill FLOPs"] = flops
    found["prefill share of matrix rate"] = flops / measured["prefill s"] / matrix_rate
    moved, operations = decode_work(ours, context)
    floor = moved / copy_rate + operations * operation_s
    found["decode"] = {"bytes": moved, "operations": operations, "floor s": floor, "times": measured["decode s"] / floor}
    return found


def prefill_flops(model: V4Model, first: int) -> int:
    """Matrix products of one chunk of 1,024 tokens from position ``first`` on, those of window masks' unseen keys left out."""
    c = CONFIG
    used = {
        name: p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name and "ape" not in name
    }
    chosen = c.num_experts_per_tok / c.n_routed_experts
    per_token = sum(2 * n * (chosen if ".experts." in name else 1) for name, n in used.items() if not name.startswith("head."))
    seen = first + CHUNK // 2  # by the middle query
    for kind in c.layer_kinds:
        rows = min(seen, c.sliding_window)
        if kind == "csa":
            entries = seen // c.csa_ratio
            per_token += 2 * c.index_n_heads * (c.index_head_dim + 1) * entries
            rows += min(entries, c.index_topk)
        elif kind == "hca":
            rows += seen // c.hca_ratio
        per_token += 4 * c.num_attention_heads * c.head_dim * rows
    return int(CHUNK * per_token)


def decode_work(model: V4Model, context: int) -> tuple[int, int]:
    """(bytes one decoded token must read: weights and cache, operations it takes: kernels counted while one is decoded)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    views = re.compile(r"view|slice|select|expand|squeeze|transpose|permute|alias|detach|split|unbind|\.t\.|_conj|unsafe")

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operations += not views.search(str(func))
            return func(*args, **(kwargs or {}))

    cache, ids = model.new_cache(), text(CHUNK + 1, model.device)
    prefill(model, ids[:, :CHUNK], cache)
    with Count() as count:
        model(ids[:, CHUNK:], cache, logits="last")
    chosen = CONFIG.num_experts_per_tok / CONFIG.n_routed_experts
    weights = sum(
        p.numel() * p.element_size() * (chosen if ".experts." in name else 1)
        for name, p in model.named_parameters()
        if "embed" not in name
    )
    return int(weights + wb.decode_bytes(CONFIG, context, "fp32")["total"]), count.operations


def report(found: dict[str, Any]) -> None:
    speed, grown, pieces, held = found["speed"], found["growth"], found["parts"], found.get("memory")
    tokens, m = found["tokens"], found["machine"]
    print(f"{found['measured_on']}, {found['dtype']}, torch {m['torch']}, {m['threads']} thread(s), load {m['load_average']}")
    print(f"prefill of {tokens['prefill']:,}: {speed['prefill s']:.2f} s", end="")
    if "prefill ratio" in speed:
        print(f", theirs / ours {speed['prefill ratio']:.2f} (bar {BARS['prefill']})", end="")
    print(f"\ndecode at {tokens['prefill']:,}: {1e3 * speed['decode s']:.2f} ms a token", end="")
    if "decode ratio" in speed:
        print(f", theirs / ours {speed['decode ratio']:.2f} (bar {BARS['decode']})", end="")
    short, long = grown["lengths"]
    print(f"\ndecode at {long:,} / at {short:,}: {grown['ratio']:.2f} (bar {BARS['growth']})")
    if held:
        print(f"peak above weights, four times the length: {held['ratio']:.2f} times (bar {BARS['peak growth']})")
        print(f"recorded run of {tokens['recorded']:,}: {held['recorded run bytes'] / 1e9:.2f} GB (bar {BARS['recorded GB']})")
    rates = f"copy {pieces['copy bytes/s'] / 1e9:.1f} GB/s, matrices {pieces['matrix FLOP/s'] / 1e9:.0f} GFLOP/s"
    print(f"this machine: {rates}, one small operation {1e6 * pieces['one small operation s']:.1f} us")
    print(f"prefill runs at {pieces['prefill share of matrix rate']:.0%} of the matrix rate (aim 40 %)")
    d = pieces["decode"]
    print(f"decode: {d['times']:.1f} times bytes / bandwidth + {d['operations']} operations (aim 2)")
    for name, piece in pieces.items():
        if isinstance(piece, dict) and "bound s" in piece:
            print(f"{name}: {1e6 * piece['s']:.0f} us, {piece['times the bound']:.1f} times what its bytes and FLOPs allow")


if __name__ == "__main__":
    main(sys.argv[1:])
