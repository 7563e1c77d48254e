"""Engram rows fetched ahead of a model's layers: the same logits with every policy, one clear error, no thread left."""

import threading
import time
from dataclasses import replace

import pytest
import torch

import workbench as wb
from tests.memory.test_prefetch import gone, workers
from tests.slow_reference import CONFIG, ENGRAM, random_ids, random_model
from tests.test_every_family import CONFIGS
from workbench.errors import WorkbenchError
from workbench.memory import prefetch
from workbench.memory.executors import Copied, HostExecutor
from workbench.memory.prefetch import POLICIES, Lookup, RowFetcher
from workbench.model.families import model_class
from workbench.recorder import Recorder

WITH_ENGRAM = replace(CONFIG, engram=ENGRAM)
AHEAD = ("prefetch", "serial")


def in_parts(model, ids: torch.Tensor, sizes: list[int], policy: str) -> torch.Tensor:
    cache = model.new_cache(ids.shape[0])
    with torch.inference_mode():
        return torch.cat([model(part, cache, prefetch=policy) for part in ids.split(sizes, dim=1)], 1)


@pytest.mark.parametrize("name", ["tiny-v4-engram", "v4.1, untrained"])
def test_every_policy_gives_the_same_logits_bit_for_bit(name):
    before = workers()
    if name == "tiny-v4-engram":
        model = wb.load(name, device="cpu")
    else:
        model = model_class(CONFIGS["v4.1"])(CONFIGS["v4.1"])
        model = type(model).untrained(CONFIGS["v4.1"], seed=3)
    ids = random_ids(model.config, 1, 150)
    for sizes in ([150], [70, 64, *[1] * 16]):
        wanted = in_parts(model, ids, sizes, "resident")
        for policy in AHEAD:
            assert torch.equal(in_parts(model, ids, sizes, policy), wanted), policy
    model.fetcher.close()
    assert gone(lambda: workers() - before)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_with_any_policy_gives_the_same_text_and_leaves_no_thread(policy):
    before, model = set(threading.enumerate()), random_model(WITH_ENGRAM)
    texts = {p: None for p in ("prefetch", policy)}
    for p in texts:
        run = wb.run(model, list(range(40)), max_new_tokens=6, prefetch=p)
        assert run.wait(60) and run.state == "done", run.error
        texts[p] = run.text
        lanes = {span.lane for span in run.trace.timeline.spans}
        assert ("lookup" in lanes) == (p != "resident") and "executor cpu (all real" in run.trace.timeline.note
        assert set(threading.enumerate()) <= before
    assert texts["prefetch"] == texts[policy]


def test_a_stopped_run_leaves_no_thread():
    before, model = set(threading.enumerate()), random_model(WITH_ENGRAM)
    run = wb.run(model, list(range(40)), max_new_tokens=3000)
    run.stop()
    assert run.wait(60) and set(threading.enumerate()) <= before


def test_spans_run_from_the_token_ids_to_the_layer():
    model = random_model(WITH_ENGRAM)
    for policy in AHEAD:
        run = wb.run(model, list(range(40)), max_new_tokens=3, prefetch=policy)
        assert run.wait(60) and run.state == "done", run.error
        timeline = run.trace.timeline
        for step in range(run.trace.steps):
            spans = {span.name: span for span in timeline.of_step(step).spans}
            ids, block = spans["token ids"], spans["layer 0"]
            assert ids.lane == "ids" and ids.end_s <= spans["layer 1 hash"].start_s
            if policy == "prefetch":
                assert ids.end_s <= block.start_s
            for layer in ENGRAM.layer_ids:
                hashed, gathered, layer_span = (spans[f"layer {layer}{part}"] for part in (" hash", " gather", ""))
                assert hashed.after == ("token ids",) and gathered.after == (hashed.name,)
                assert layer_span.after == (gathered.name,) and hashed.end_s <= gathered.start_s
                assert gathered.end_s <= layer_span.start_s  # rows are not used before they are there
                stall = spans.get(f"layer {layer} waits")
                assert (stall is not None) or policy == "prefetch"
                if stall is not None:
                    assert stall.after == (gathered.name,) and gathered.end_s <= stall.end_s <= layer_span.start_s


class CopyingExecutor(HostExecutor):
    """Rows reach compute through a copy whose times are told with an uncertainty."""

    def send(self, slot, nbytes):
        slot.device, start = slot.host.clone(), time.perf_counter()
        return Copied(start, time.perf_counter(), 3e-6)

    def arrival(self, slot, nbytes):
        return slot.device[:nbytes]

    def copied(self, copy):
        return copy


class CopyingFetcher(RowFetcher):
    executor = CopyingExecutor()

    def start(self, layer, hash_rows, source, policy, device=None, ids_from_s=None):
        return super().start(layer, hash_rows, source, policy, self.executor, ids_from_s)


@pytest.mark.parametrize("policy", AHEAD)
def test_a_copy_to_the_device_is_a_span_between_gather_and_layer(policy):
    model, ids = random_model(WITH_ENGRAM), random_ids(CONFIG, 1, 30)
    with torch.inference_mode():
        wanted = model(ids)
    model.fetcher.close()
    model.fetcher = CopyingFetcher()
    recorder, cache = Recorder(model), model.new_cache()
    with recorder, torch.inference_mode():
        assert torch.equal(model(ids, cache, prefetch=policy), wanted)
    recorder.finish_step(30, cache)
    timeline = recorder.snapshot("here")["timeline"]
    spans = {span.name: span for span in timeline.spans}
    for layer in ENGRAM.layer_ids:
        gathered, copy, block = (spans[f"layer {layer}{part}"] for part in (" gather", " copy", ""))
        assert copy.lane == "transfer" and copy.after == (gathered.name,) and block.after == (copy.name,)
        assert gathered.end_s <= copy.start_s <= copy.end_s <= block.start_s
        if policy == "serial":
            stall = spans[f"layer {layer} waits"]
            assert stall.after == (copy.name,) and stall.start_s <= copy.start_s and copy.end_s <= stall.end_s
    assert timeline.note.endswith("the device's clock is aligned to within 3 us")
    model.fetcher.close()


@pytest.mark.parametrize("policy", AHEAD)
@pytest.mark.parametrize("layer", ENGRAM.layer_ids)
@pytest.mark.parametrize("what", ["gather", "hash"])
def test_a_failing_lookup_surfaces_once_at_its_layer_and_leaves_no_thread(policy, layer, what):
    before, model, ids = workers(), random_model(WITH_ENGRAM), random_ids(CONFIG, 1, 19)
    engram, reached = model.blocks[layer].engram, []

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise OSError("disk gone")

    healthy = engram.table.gather if what == "gather" else engram.hash
    if what == "gather":
        engram.table.gather = fail
    else:
        engram.hash = fail
    hooks = [block.register_forward_pre_hook(lambda _m, _i, n=n: reached.append(n)) for n, block in enumerate(model.blocks)]
    cache = model.new_cache()
    with torch.inference_mode(), pytest.raises(WorkbenchError) as failed:
        model(ids, cache, prefetch=policy)
    assert str(failed.value) == f"Engram rows of layer {layer} could not be fetched: disk gone"
    assert reached == list(range(layer + 1))
    assert gone(lambda: workers() - before)  # after a failure at once, not only when idle
    with pytest.raises(WorkbenchError, match="half-filled"):
        model(ids, cache)
    for hook in hooks:
        hook.remove()
    setattr(engram.table if what == "gather" else engram, what, healthy)
    with torch.inference_mode():
        assert torch.isfinite(model(ids, prefetch=policy)).all()
    model.fetcher.close()
    assert gone(lambda: workers() - before)


def test_a_call_that_breaks_off_before_its_layers_gives_all_buffers_back():
    model, ids = random_model(WITH_ENGRAM), random_ids(CONFIG, 1, 9)
    model.fetcher.timeout_s = 5.0

    def fail(*_: object) -> None:
        raise ValueError("broken off")

    for _ in range(2 * prefetch.DEPTH):
        hook = model.blocks[0].register_forward_pre_hook(fail)
        with torch.inference_mode(), pytest.raises(ValueError, match="broken off"):
            model(ids)
        hook.remove()
        with torch.inference_mode():
            model(ids)
    model.fetcher.close()


def test_rows_of_every_layer_are_gathered_while_the_first_block_is_still_at_work():
    """Block 0 does not go on until all rows are there, which only rows fetched beside it can be."""
    model, arrived, gathered = random_model(WITH_ENGRAM), [], threading.Semaphore(0)
    for layer in ENGRAM.layer_ids:
        table = model.blocks[layer].engram.table

        def note(rows: torch.Tensor, out: torch.Tensor, gather=table.gather) -> torch.Tensor:
            values = gather(rows, out)
            gathered.release()
            return values

        table.gather = note
    model.blocks[0].attn.register_forward_pre_hook(
        lambda *_: arrived.extend(gathered.acquire(timeout=30) for _ in ENGRAM.layer_ids)
    )
    with torch.inference_mode():
        model(random_ids(CONFIG, 1, 11), prefetch="prefetch")
    assert arrived == [True, True]
    model.fetcher.close()


def test_a_model_that_is_dropped_takes_its_worker_along():
    before = workers()
    model = random_model(WITH_ENGRAM)
    with torch.inference_mode():
        model(random_ids(CONFIG, 1, 5))
    mine = workers() - before
    assert len(mine) == 1
    began = time.monotonic()
    del model
    assert gone(lambda: any(thread.is_alive() for thread in mine))
    assert time.monotonic() - began < prefetch.IDLE_S  # it did not just fall asleep


@pytest.mark.parametrize("depth", [1, 2])
def test_many_threads_may_use_one_model_at_once(depth):
    model, results = random_model(WITH_ENGRAM), {}
    model.fetcher = RowFetcher(depth=depth)
    lines = [random_ids(CONFIG, 1, 23, seed) for seed in range(4)]

    def work(number: int) -> None:
        policy = AHEAD[number % 2]
        results[number] = in_parts(model, lines[number], [3] * 7 + [2], policy)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, line in enumerate(lines):
        assert torch.equal(results[number], in_parts(model, line, [3] * 7 + [2], "resident"))
    model.fetcher.close()


def test_while_training_rows_are_fetched_in_the_thread_that_trains():
    """Autograd must see the table: its rows get gradients, and only those that were read."""
    before, model, ids = workers(), random_model(WITH_ENGRAM), random_ids(CONFIG, 1, 9)
    lookups: list[Lookup] = []
    model.blocks[1].lookup_tap.register_forward_hook(lambda _m, _i, out: lookups.append(out))
    model(ids).square().mean().backward()
    touched = model.blocks[1].engram.table.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == sorted(set(lookups[0].rows.flatten().tolist()))
    assert workers() <= before
