"""What recording costs: one 512-token generation with and without it, in turn; the bar is at most 15 % of the run time."""

from __future__ import annotations

import statistics
import time

import workbench as wb
from workbench.runtime import machine

ROUNDS, TOKENS = 5, 512


def seconds(model, record: bool) -> float:
    start = time.perf_counter()
    run = wb.run(model, "The code of apple is 37.", max_new_tokens=TOKENS, record=record)
    run.wait()
    if run.state != "done":
        raise SystemExit(f"the run ended as {run.state}: {run.error}")
    return time.perf_counter() - start


def main() -> None:
    model = wb.load("tiny-v4-engram", device="cpu")
    seconds(model, True)
    pairs = [(seconds(model, False), seconds(model, True)) for _ in range(ROUNDS)]
    ratios = [recorded / plain for plain, recorded in pairs]
    plain = statistics.median(p for p, _ in pairs)
    print(f"{machine()['device']}, load {machine()['load_average']}")
    print(f"plain {plain:.2f} s for {TOKENS} tokens; recording / plain: median {statistics.median(ratios):.3f}, ")
    print("ratios", [round(r, 3) for r in sorted(ratios)])


if __name__ == "__main__":
    main()
