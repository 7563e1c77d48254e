"""Long use in one process: many runs, paused, stepped and stopped at random, leave no thread and no growing memory behind."""

import gc
import random
import resource
import threading

import pytest

import workbench as wb

pytestmark = pytest.mark.slow
ROUNDS, WARM = 60, 15


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
