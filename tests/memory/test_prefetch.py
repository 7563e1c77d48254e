"""Engram rows fetched ahead: same values as fetched on the spot, one clear error when they cannot be read, no thread left."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from tests.slow_reference import CONFIG, ENGRAM, random_ids, random_model
from workbench.errors import InputError, WorkbenchError
from workbench.memory.prefetch import Lookup, RowFetcher

WITH_ENGRAM = replace(CONFIG, engram=ENGRAM)
ROWS = torch.arange(6).view(1, 3, 2)


def workers() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("engram-rows")}


def gather(rows: torch.Tensor) -> torch.Tensor:
    return rows.flatten(2) * 2.0


@pytest.fixture
def fetcher():
    made = RowFetcher()
    yield made
    made.close()


@pytest.mark.parametrize("policy", ["prefetch", "serial"])
def test_a_lookup_brings_rows_values_and_times_in_order(fetcher, policy):
    lookup = fetcher.start(4, lambda: ROWS, gather, policy).result()
    assert lookup.layer == 4 and torch.equal(lookup.rows, ROWS) and torch.equal(lookup.memory, gather(ROWS))
    assert lookup.asked_s <= lookup.started_s <= lookup.hashed_s <= lookup.gathered_s <= lookup.wait_to_s
    assert lookup.wait_from_s <= lookup.wait_to_s


def test_prefetching_works_before_the_result_is_asked_for_and_serial_does_not(fetcher):
    gathered, here = threading.Event(), []

    def note(rows: torch.Tensor) -> torch.Tensor:
        here.append(threading.current_thread())
        gathered.set()
        return gather(rows)

    ahead = fetcher.start(0, lambda: ROWS, note, "prefetch")
    assert gathered.wait(30) and here[0] is not threading.main_thread()
    assert ahead.result().started_s <= ahead.result().wait_from_s
    gathered.clear()
    late = fetcher.start(0, lambda: ROWS, note, "serial")
    assert not gathered.wait(0.05)
    assert late.result().wait_from_s <= late.result().wait_to_s and here[-1] is threading.main_thread()


def test_lookups_are_served_in_the_order_asked_by_one_worker(fetcher):
    order: list[tuple[int, threading.Thread]] = []

    def note(layer: int) -> torch.Tensor:
        order.append((layer, threading.current_thread()))
        return ROWS

    fetches = [fetcher.start(layer, lambda layer=layer: note(layer), gather, "prefetch") for layer in range(7)]
    for fetch in reversed(fetches):
        fetch.result()
    assert [layer for layer, _ in order] == list(range(7)) and len({thread for _, thread in order}) == 1


def test_serial_lookups_need_no_worker():
    fetcher, before = RowFetcher(), workers()
    fetcher.start(0, lambda: ROWS, gather, "serial").result()
    assert workers() == before


def test_closing_lets_the_lookup_under_way_finish_and_ends_the_thread():
    before, fetcher, begun, may_end = workers(), RowFetcher(), threading.Event(), threading.Event()

    def slow(rows: torch.Tensor) -> torch.Tensor:
        begun.set()
        may_end.wait(30)
        return gather(rows)

    fetch = fetcher.start(0, lambda: ROWS, slow, "prefetch")
    mine = workers() - before
    begun.wait(30)
    threading.Timer(0.05, may_end.set).start()
    fetcher.close()
    assert len(mine) == 1 and not any(thread.is_alive() for thread in mine)
    assert torch.equal(fetch.result().memory, gather(ROWS))
    fetcher.close()  # twice does no harm
    assert isinstance(fetcher.start(0, lambda: ROWS, gather, "prefetch").result(), Lookup)  # and it can begin again
    fetcher.close()


def test_an_unknown_policy_is_refused(fetcher):
    with pytest.raises(InputError, match="'soon' is unknown; choose one of"):
        fetcher.start(0, lambda: ROWS, gather, "soon")


@pytest.mark.parametrize("policy", ["prefetch", "serial"])
@pytest.mark.parametrize("layer", ENGRAM.layer_ids)
@pytest.mark.parametrize("what", ["gather", "hash"])
def test_a_failing_lookup_surfaces_once_at_its_layer_and_leaves_no_thread(policy, layer, what):
    before, model, ids = workers(), random_model(WITH_ENGRAM), random_ids(CONFIG, 1, 19)
    engram, reached = model.blocks[layer].engram, []

    def fail(*_: object) -> torch.Tensor:
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
    with pytest.raises(WorkbenchError, match="half-filled"):
        model(ids, cache)
    for hook in hooks:
        hook.remove()
    setattr(engram.table if what == "gather" else engram, what, healthy)
    with torch.inference_mode():  # the worker has outlived the failure and serves the next call
        assert torch.isfinite(model(ids, prefetch=policy)).all()
    mine = workers() - before
    assert len(mine) == (policy == "prefetch")
    model.fetcher.close()
    assert not any(thread.is_alive() for thread in mine)


def test_rows_of_every_layer_are_gathered_while_the_first_block_is_still_at_work():
    """Block 0 does not go on until all rows are there, which only rows fetched beside it can be."""
    model, arrived, gathered = random_model(WITH_ENGRAM), [], threading.Semaphore(0)
    for layer in ENGRAM.layer_ids:
        table = model.blocks[layer].engram.table

        def note(rows: torch.Tensor, gather=table.gather) -> torch.Tensor:
            values = gather(rows)
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
    del model
    deadline = time.monotonic() + 30
    while any(thread.is_alive() for thread in mine) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in mine)


def test_many_threads_may_use_one_model_at_once():
    model, results = random_model(WITH_ENGRAM), {}
    lines = [random_ids(CONFIG, 1, 23, seed) for seed in range(4)]

    def work(number: int) -> None:
        cache = model.new_cache()
        with torch.inference_mode():
            results[number] = torch.cat([model(part, cache) for part in lines[number].split(3, dim=1)], 1)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with torch.inference_mode():
        for number, line in enumerate(lines):
            assert (results[number] - model(line)).abs().max() < 1e-4
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
