"""Our backbone beside the transformers implementation of DeepSeek-V4, same weights, same machine, one thread, in turn.

What a user would pick instead is ``DeepseekV4ForCausalLM``; the figures are the ratios of medians, theirs / ours.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import workbench as wb
from workbench import checkpoint
from workbench.runtime import machine, use_threads

ROUNDS, PREFILL, DECODED = 5, 2048, 32


def main() -> None:
    from transformers import DeepseekV4ForCausalLM

    use_threads(1)
    ours = wb.load("tiny-v4", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(ours, folder, dtype=torch.float32)
        theirs = DeepseekV4ForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    assert ours.tokenizer is not None
    ids = torch.tensor([ours.tokenizer.encode(wb.sample_text()).ids[:PREFILL]])
    state = {}

    def our_prefill() -> None:
        state["cache"] = ours.new_cache()
        ours(ids, state["cache"], logits="last")

    def our_decode() -> None:
        for t in range(DECODED):
            ours(ids[:, t : t + 1], state["cache"], logits="last")

    def their_prefill() -> None:
        state["past"] = theirs(ids, use_cache=True, logits_to_keep=1).past_key_values

    def their_decode() -> None:
        for t in range(DECODED):
            theirs(ids[:, t : t + 1], past_key_values=state["past"], use_cache=True)

    with torch.inference_mode():
        # Index scores or router scores within rounding of each other may be ordered differently: count such tokens apart.
        difference = (ours(ids) - theirs(ids, use_cache=False).logits).abs().amax(-1)
        work = {"prefill": (our_prefill, their_prefill), "decode": (our_decode, their_decode)}
        times: dict[str, list[list[float]]] = {name: [[], []] for name in work}
        for _ in range(ROUNDS):
            for name, pair in work.items():
                for kept, function in zip(times[name], pair, strict=True):
                    kept.append(_seconds(function))
    print(f"{machine()['device']}, torch {torch.__version__}, 1 thread, load {machine()['load_average']}")
    same = difference <= 1e-4
    print(f"logits within 1e-4 at {int(same.sum())} of {PREFILL} tokens; largest difference {float(difference.max()):.1e}")
    for name, (mine, other) in times.items():
        tokens = PREFILL if name == "prefill" else DECODED
        ratio = statistics.median(other) / statistics.median(mine)
        print(f"{name}: ours {tokens / statistics.median(mine):,.0f} tokens/s, theirs / ours {ratio:.2f}")


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
