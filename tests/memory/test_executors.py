"""Who computes and how rows get there. CUDA's ordering is run on simulated streams too, which do things as late as they may.

The simulation keeps what CUDA promises and nothing more: operations of one stream run in order, a stream waits for an event
only if it was recorded before, and the host waits only where it synchronises. Between streams the order is drawn at random.
"""

import random
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from workbench.errors import InputError
from workbench.memory.executors import CudaExecutor, EmulatedDevice, HostExecutor, Slot, executor_named, wait_until
from workbench.memory.prefetch import RowFetcher
from workbench.memory.rows import TableSource

NO_CUDA = "no CUDA device here: the CUDA path ran on simulated streams only"


class Table:
    """Every row holds its own number."""

    rows, width, in_memory = 1000, 3, True

    def gather(self, row_ids, out=None):
        values = np.repeat(np.asarray(row_ids, np.float32)[:, None], self.width, axis=1)
        if out is None:
            return values
        out[...] = values
        return out


class Streams:
    """A device: streams of operations that wait until somebody makes them run."""

    def __init__(self, seed: int) -> None:
        self.lock, self.draw = threading.RLock(), random.Random(seed)
        self.streams: list[SimulatedStream] = []
        self.done: set[int] = set()
        self.recorded, self.ran = 0, 0
        self.compute = SimulatedStream(self)
        self.current = threading.local()

    # What CudaExecutor asks of torch.cuda.

    def Stream(self, device):
        return SimulatedStream(self)

    def Event(self, enable_timing=False):
        return SimulatedEvent(self)

    def current_stream(self, device):
        return getattr(self.current, "stream", self.compute)

    @contextmanager
    def stream(self, stream):
        before, self.current.stream = self.current_stream(None), stream
        yield
        self.current.stream = before

    # The simulation.

    def run_until(self, over) -> None:
        with self.lock:
            while not over():
                able = [s for s in self.streams if s.queue and s.queue[0][0] in (None, *self.done)]
                assert able, "the device is deadlocked"
                stream = self.draw.choice(able)
                _, work = stream.queue.pop(0)
                self.ran += 1
                work()


class SimulatedStream:
    def __init__(self, world: Streams) -> None:
        self.world, self.queue = world, []
        world.streams.append(self)

    def add(self, work, after=None) -> None:
        with self.world.lock:
            self.queue.append((after, work))

    def wait_event(self, event) -> None:
        if event.record_id is not None:  # an event that was never recorded is not waited for
            self.add(lambda: None, after=event.record_id)

    def synchronize(self) -> None:
        self.world.run_until(lambda: not self.queue)


class SimulatedEvent:
    def __init__(self, world: Streams) -> None:
        self.world, self.record_id, self.time = world, None, None

    def record(self, stream) -> None:
        with self.world.lock:
            self.world.recorded += 1
            self.record_id = record_id = self.world.recorded

        def happen() -> None:
            self.world.done.add(record_id)
            self.time = self.world.ran

        stream.add(happen)

    def synchronize(self) -> None:
        self.world.run_until(lambda: self.record_id in self.world.done)

    def elapsed_time(self, other) -> float:
        return 1e-3 * (other.time - self.time)


class SimulatedCuda(CudaExecutor):
    def __init__(self, seed: int) -> None:
        self.world = Streams(seed)
        super().__init__("cpu")

    def _open(self) -> None:
        self.cuda = self.world
        self.copy_stream, self.clock_stream = self.world.Stream(None), self.world.Stream(None)
        self._anchor = None

    def _new_host(self, nbytes):
        return torch.zeros(nbytes, dtype=torch.uint8)

    _new_device = _new_host

    def _used_on(self, tensor, stream) -> None:
        """The allocator's business."""

    def _copy(self, target, source) -> None:
        self.world.current_stream(None).add(lambda: target.copy_(source))


class ForgetsToWaitForTheCopy(SimulatedCuda):
    def receive(self, slot):
        pass


class OverwritesTheHostBuffer(SimulatedCuda):
    def room(self, slot, nbytes):
        return HostExecutor.room(self, slot, nbytes)


class OverwritesTheDeviceBuffer(SimulatedCuda):
    def done(self, slot):
        pass


def wrong_lookups(executor: SimulatedCuda, policy: str, depth: int, lookups: int = 24) -> int:
    """How many of the lookups a compute stream read wrongly, running as late as it may; fetched a few ahead."""
    fetcher, source, draw = RowFetcher(depth=depth), TableSource(Table()), np.random.default_rng(0)
    wanted = [torch.from_numpy(draw.integers(0, 1000, (1, 5, 2))) for _ in range(lookups)]
    read: list[torch.Tensor] = []
    for first in range(0, lookups, 3):
        fetches = [fetcher.start(n, lambda n=n: wanted[n], source, policy, executor) for n in range(first, first + 3)]
        for fetch in fetches:
            with fetch as lookup:
                executor.world.compute.add(lambda memory=lookup.memory: read.append(memory.clone()))
    fetcher.close()
    executor.world.run_until(lambda: not any(stream.queue for stream in executor.world.streams))
    return sum(not torch.equal(r, w.repeat_interleave(3, -1).float()) for r, w in zip(read, wanted, strict=True))


@pytest.mark.parametrize("policy", ["prefetch", "serial"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_on_streams_that_run_late_every_lookup_is_read_before_its_buffers_are_written_again(policy, depth):
    assert [wrong_lookups(SimulatedCuda(seed), policy, depth) for seed in range(10)] == [0] * 10


@pytest.mark.parametrize("broken", [ForgetsToWaitForTheCopy, OverwritesTheHostBuffer, OverwritesTheDeviceBuffer])
def test_without_any_one_of_the_waits_rows_come_out_wrong(broken):
    assert sum(wrong_lookups(broken(seed), "prefetch", 2) for seed in range(10)) > 0


def test_a_copy_lies_between_its_events_on_the_hosts_clock():
    executor = SimulatedCuda(0)
    fetcher, rows = RowFetcher(), torch.zeros(1, 2, 2, dtype=torch.int64)
    with fetcher.start(0, lambda: rows, TableSource(Table()), "prefetch", executor) as lookup:
        pass
    executor.world.run_until(lambda: not any(stream.queue for stream in executor.world.streams))
    copied = lookup.copied()
    assert copied is not None and copied.start_s < copied.end_s and copied.error_s > 0
    anchor, at, error = executor._anchor
    assert copied.end_s == pytest.approx(at + 1e-6 * (lookup.copy[1].time - anchor.time)) and copied.error_s == error
    fetcher.close()


def test_a_buffer_grows_to_the_next_power_of_two_and_does_not_shrink():
    executor, slot = HostExecutor(), Slot()
    sizes = []
    for nbytes in (1, 70_000, 5, 2**17, 2**17 + 1):
        assert executor.room(slot, nbytes).numel() == nbytes
        sizes.append(slot.host.numel())
    assert sizes == [2**16, 2**17, 2**17, 2**17, 2**18]


@pytest.mark.parametrize("window_s", [0.0, 0.0005, 0.01])
def test_a_timed_wait_never_ends_early(window_s):
    start = time.perf_counter()
    wait_until(start + window_s)
    assert time.perf_counter() - start >= window_s


def test_a_timed_wait_sleeps_and_does_not_compute():
    start, used = time.perf_counter(), time.thread_time()
    wait_until(start + 0.2)
    assert time.thread_time() - used < 0.1


def test_a_timed_wait_leaves_the_interpreter_to_others():
    """Another thread counts while this one waits, the last stretch included."""
    counted, over = [0], threading.Event()

    def count() -> None:
        while not over.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    for _ in range(50):
        wait_until(time.perf_counter() + 1e-3)
    over.set()
    thread.join()
    assert counted[0] > 100


@pytest.mark.parametrize("executor", [EmulatedDevice, HostExecutor])
def test_a_block_lies_between_its_times(executor):
    made = executor()
    made.prepare()
    before = time.perf_counter()
    start, end = made.times(made.block(0.002))
    made.finish()
    assert before <= start < end <= time.perf_counter()
    if executor is EmulatedDevice:
        assert end - start >= 0.002


def test_an_executor_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"executor must be one of \('modelled', 'emulated', 'cpu', 'cuda'\), got 'gpu'"):
        executor_named("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="executor 'cuda' needs a CUDA device and this machine has none"):
            executor_named("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
def test_on_a_real_device_rows_arrive_and_copies_run_beside_compute():
    executor, source, fetcher = CudaExecutor(), TableSource(Table()), RowFetcher(depth=2)
    executor.prepare()
    draw = torch.Generator().manual_seed(0)
    wanted = [torch.randint(0, 1000, (1, 4000, 2), generator=draw) for _ in range(12)]
    read, lookups = [], []
    for n, rows in enumerate(wanted):
        fetch = fetcher.start(n, lambda rows=rows: rows, source, "prefetch", executor)
        executor.block(0.005)
        with fetch as lookup:
            read.append(lookup.memory.clone())
            lookups.append(lookup)
    executor.finish()
    for got, rows, lookup in zip(read, wanted, lookups, strict=True):
        assert got.is_cuda and torch.equal(got.cpu(), rows.repeat_interleave(3, -1).float())
        copied = lookup.copied()
        assert copied.end_s >= copied.start_s >= lookup.gathered_s - copied.error_s - 1e-3
    fetcher.close()
