"""Long use in one process: many runs, paused, stepped and stopped at random, leave no thread and no growing memory behind."""

import gc
import random
import resource
import threading
from pathlib import Path

import pytest

import workbench as wb
from tests.synthetic import synthetic_trace

pytestmark = pytest.mark.slow
ROUNDS, WARM = 60, 15
STATM = Path("/proc/self/statm")


def peak_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_sixty_runs_in_one_process_leave_no_thread_and_no_growing_memory():
    model, chance = wb.load("tiny-v4-engram", device="cpu"), random.Random(0)
    before = None
    for number in range(ROUNDS):
        run = wb.run(model, wb.sample_text()[: chance.randrange(1, 6000)], max_new_tokens=40, seed=number, temperature=1.0)
        for _ in range(chance.randrange(6)):
            getattr(run, chance.choice(("pause", "step", "resume")))()
        assert run.trace.length <= len(run.trace.token_texts)
        run.resume()
        if number % 3 == 0:
            run.stop()
        assert run.wait(timeout_s=120) and run.state in ("done", "stopped")
        if number == WARM:
            gc.collect()
            before = peak_kib()
    assert not [t for t in threading.enumerate() if t.name.startswith("workbench")]
    assert peak_kib() - before < 200_000, "memory grew by more than 200 MB over forty-five runs"


@pytest.mark.skipif(not STATM.exists(), reason="the memory held now is read from /proc, which this system lacks")
def test_a_thousand_slider_moves_leave_the_kernel_as_it_is():
    trace, chance = synthetic_trace(512, window=32, heads=2), random.Random(0)
    explorer, growth = wb.AttentionExplorer(trace), wb.KVCacheGrowth(trace)
    held = []
    for move in range(1200):
        explorer.token.value = chance.randrange(512)
        if move % 5 == 0:
            explorer.layer.value = chance.randrange(4)
            explorer._zoom_by(chance.choice((1, -1)))
            explorer.view.value = chance.choice(("both", "composite", "entries", "window"))
            explorer.text_panel.find.needle = chance.choice(("key", "box", "seven"))
        if move % 200 == 199:
            gc.collect()
            held.append(int(STATM.read_text().split()[1]) * resource.getpagesize() / 1e6)
    assert held[-1] - held[0] < 20, f"megabytes held after every 200 moves: {held}"
    growth.close()
