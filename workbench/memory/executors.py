"""Who computes, and how rows get there: the same prefetcher drives the CPU, an emulated device and CUDA through these classes.

An executor owns the staging memory (one ``Slot`` per lookup under way) and the compute windows of an overlap experiment. Only
``CudaExecutor`` knows streams and events. (reference/engram-and-overlap.md, sections 4.1, 4.4 and 5.4)
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.errors import InputError, WorkbenchError
from workbench.runtime import device_name, synchronize

NAMES = {  # executor -> what a chart says about it
    "modelled": "modelled (a virtual clock, nothing ran)",
    "emulated": "emulated device (compute is a timed wait, the lookup is real)",
    "cpu": "cpu (all real, compute and lookup share the cores)",
    "cuda": "cuda (all real, compute and copies on streams, the gather on the CPU)",
    "device": "device (all real, rows come from the host without a stream of their own)",  # of other kinds than CUDA
}
EXECUTORS = ("modelled", "emulated", "cpu", "cuda")  # of an experiment
SPIN_S = 2e-4  # the last stretch of a timed wait; a sleep overshoots by up to about 0.1 ms (section 5.2)
LEAST_BUFFER = 2**16  # bytes
ANCHOR_S = 1.0  # a device's clock is laid on the host's again after so long, before it drifts by microseconds
MATRIX = {"cpu": 192, "cuda": 4096}  # side of the square matrices that a real window multiplies


class Copied(NamedTuple):
    """When a copy to the device ran, on the host's clock (``time.perf_counter``), and how far off that may be."""

    start_s: float
    end_s: float
    error_s: float


@dataclass(slots=True, eq=False)
class Slot:
    """Room for one lookup: bytes on the host and, where rows are copied, on the device; what was last asked of both."""

    host: Tensor | None = None
    device: Tensor | None = None
    copy: Any = None  # the last copy out of ``host``
    consumed: Any = None  # an event after the last reader of ``device``


def executor_for(device: torch.device) -> HostExecutor:
    """What a model on ``device`` fetches its rows through; devices without an executor of their own take them from the host."""
    return CudaExecutor(device) if device.type == "cuda" else HostExecutor(device)


def executor_name(device: torch.device) -> str:
    return device.type if device.type in ("cpu", "cuda") else "device"


def finish_compute(device: torch.device) -> None:
    """Wait for what compute was asked for on ``device``; on CUDA, copies that nothing waits for yet may go on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    else:
        synchronize(device)


def wait_until(deadline_s: float) -> None:
    """Return at ``deadline_s`` (``time.perf_counter``): sleep, then look at the clock a few times, giving way in between."""
    while (left := deadline_s - time.perf_counter()) > SPIN_S:
        time.sleep(left - SPIN_S)
    while time.perf_counter() < deadline_s:
        time.sleep(0)  # lets a thread that waits for the interpreter have it


class HostExecutor:
    """Rows are used where they were gathered: there is no copy, and a buffer is free once its reader has released it."""

    name = "cpu"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._matrix: Tensor | None = None
        self._product_s = 0.0  # of one matrix product

    @property
    def label(self) -> str:
        return device_name(self.device)

    # -- staging ---------------------------------------------------------------------------------------------------------

    def room(self, slot: Slot, nbytes: int) -> Tensor:
        """The slot's host bytes [nbytes], which nobody reads any more. A buffer that is too small is replaced by one of the
        next power of two; none shrinks."""
        if slot.host is None or slot.host.numel() < nbytes:
            self.allocate(slot, 1 << (max(nbytes, LEAST_BUFFER) - 1).bit_length())
        assert slot.host is not None
        return slot.host[:nbytes]

    def allocate(self, slot: Slot, nbytes: int) -> None:
        with torch.inference_mode(False):  # ordinary tensors, which may be written in any mode
            slot.host = torch.empty(nbytes, dtype=torch.uint8)

    def send(self, slot: Slot, nbytes: int) -> Any:
        """In the worker: start the copy of the first ``nbytes`` to the device; returns what ``copied`` reads, None if there
        is nothing to copy."""
        return None

    def arrival(self, slot: Slot, nbytes: int) -> Tensor:
        """In the worker: the bytes [nbytes] that compute will read once ``receive`` has been called."""
        assert slot.host is not None
        return slot.host[:nbytes]

    def receive(self, slot: Slot) -> None:
        """In the thread that computes: what it does next may read the rows."""

    def done(self, slot: Slot) -> None:
        """In the thread that computes: whatever it asked for up to now may still read the rows, nothing later will."""

    def copied(self, copy: Any) -> Copied | None:
        """When a copy ran, for one that has ended."""
        return None

    # -- compute windows of an experiment --------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Find out how fast this machine multiplies matrices now."""
        side = MATRIX["cpu"]
        self._matrix = torch.rand(side, side)
        self.multiply(20)
        rates = []
        for _ in range(5):
            start = time.perf_counter()
            self.multiply(20)
            rates.append((time.perf_counter() - start) / 20)
        self._product_s = sorted(rates)[2]

    def _products_in(self, window_s: float) -> int:
        """How many products fill a window; the same number every time."""
        return max(1, round(window_s / self._product_s))

    def multiply(self, products: int) -> None:
        assert self._matrix is not None
        for _ in range(products):
            self._matrix @ self._matrix

    def block(self, window_s: float) -> Any:
        """Compute for one window; a mark that ``times`` reads."""
        start = time.perf_counter()
        self.multiply(self._products_in(window_s))
        return start, time.perf_counter()

    def mark(self) -> Any:
        """Where the compute lane is now."""
        now = time.perf_counter()
        return now, now

    def finish(self) -> None:
        """Wait until everything asked of the device is done."""
        finish_compute(self.device)

    def times(self, mark: Any) -> tuple[float, float]:
        """Start and end of a block, ``time.perf_counter`` seconds, after ``finish``."""
        return mark


class EmulatedDevice(HostExecutor):
    """A device whose compute takes a given time and none of the CPU's, as a GPU's would: each window is a timed wait."""

    name = "emulated"

    def prepare(self) -> None:
        """A wait needs no preparation."""

    def block(self, window_s: float) -> Any:
        start = time.perf_counter()
        wait_until(start + window_s)
        return start, time.perf_counter()


class CudaExecutor(HostExecutor):
    """Pinned staging, copied on a stream of its own; the compute stream waits for the copy's event at the layer.

    A host buffer is written again only after its copy's event, a device buffer only after its last reader's event. The copy
    stream owns the device buffers, so the allocator hands their memory on in that stream's order; ``record_stream`` tells it
    of the reader. (reference/engram-and-overlap.md, section 4.1)
    """

    name = "cuda"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise InputError("executor 'cuda' needs a CUDA device and this machine has none; use 'emulated' or 'cpu'")
        super().__init__(device)
        self._open()

    def _open(self) -> None:
        self.cuda: Any = torch.cuda
        self.copy_stream, self.clock_stream = self.cuda.Stream(self.device), self.cuda.Stream(self.device)
        self._anchor: tuple[Any, float, float] | None = None  # event, its time on the host's clock, half the uncertainty

    def _event(self, *, timing: bool = False) -> Any:
        return self.cuda.Event(enable_timing=timing)

    def _new_host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)  # only from pinned memory is a copy asynchronous

    def _new_device(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _used_on(self, tensor: Tensor, stream: Any) -> None:
        tensor.record_stream(stream)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def room(self, slot: Slot, nbytes: int) -> Tensor:
        if slot.copy is not None:
            slot.copy[1].synchronize()
        return super().room(slot, nbytes)

    def allocate(self, slot: Slot, nbytes: int) -> None:
        with torch.inference_mode(False), self.cuda.stream(self.copy_stream):
            slot.host, slot.device = self._new_host(nbytes), self._new_device(nbytes)

    def send(self, slot: Slot, nbytes: int) -> Any:
        assert slot.host is not None and slot.device is not None
        anchor = self._anchored()
        began, ready = self._event(timing=True), self._event(timing=True)
        with self.cuda.stream(self.copy_stream):
            if slot.consumed is not None:
                self.copy_stream.wait_event(slot.consumed)
            began.record(self.copy_stream)
            self._copy(slot.device[:nbytes], slot.host[:nbytes])
            ready.record(self.copy_stream)
        slot.copy = (began, ready, anchor)
        return slot.copy

    def arrival(self, slot: Slot, nbytes: int) -> Tensor:
        assert slot.device is not None
        return slot.device[:nbytes]

    def receive(self, slot: Slot) -> None:
        assert slot.device is not None
        stream = self.cuda.current_stream(self.device)
        # The worker recorded this event before it said it was done: one not recorded yet would not be waited for.
        stream.wait_event(slot.copy[1])
        self._used_on(slot.device, stream)

    def done(self, slot: Slot) -> None:
        event = self._event()
        event.record(self.cuda.current_stream(self.device))
        slot.consumed = event

    def copied(self, copy: Any) -> Copied | None:
        began, ready, anchor = copy
        start, end = (self._on_host(event, anchor) for event in (began, ready))
        return Copied(start, max(start, end), anchor[2])

    def _anchored(self) -> tuple[Any, float, float]:
        """An event whose time on the host's clock is known (section 4.4), on a stream of its own: it waits for no work."""
        if self._anchor is None or time.perf_counter() - self._anchor[1] > ANCHOR_S:
            event, before = self._event(timing=True), time.perf_counter()
            event.record(self.clock_stream)
            event.synchronize()
            after = time.perf_counter()
            self._anchor = event, (before + after) / 2, (after - before) / 2
        return self._anchor

    def _on_host(self, event: Any, anchor: tuple[Any, float, float]) -> float:
        return anchor[1] + anchor[0].elapsed_time(event) / 1e3

    @property
    def alignment_error_s(self) -> float:
        """How far times of the device may be off on the host's clock."""
        return self._anchored()[2]

    def prepare(self) -> None:
        side = MATRIX["cuda"]
        self._matrix = torch.rand(side, side, device=self.device, dtype=torch.bfloat16)
        self.multiply(20)
        self.finish()
        start = time.perf_counter()
        self.multiply(20)
        self.finish()
        self._product_s = (time.perf_counter() - start) / 20

    def block(self, window_s: float) -> Any:
        marks = self._stamp()
        self.multiply(self._products_in(window_s))
        return marks[0], self._stamp()[0], marks[1]

    def mark(self) -> Any:
        event, anchor = self._stamp()
        return event, event, anchor

    def _stamp(self) -> tuple[Any, Any]:
        anchor = self._anchored()
        event = self._event(timing=True)
        event.record(self.cuda.current_stream(self.device))
        return event, anchor

    def times(self, mark: Any) -> tuple[float, float]:
        start, end, anchor = mark
        began = self._on_host(start, anchor)
        return began, max(began, self._on_host(end, anchor))


def executor_named(name: str) -> HostExecutor:
    """One of the executors that really run. Raises InputError for another name, or for CUDA where there is none."""
    made = {"emulated": EmulatedDevice, "cpu": HostExecutor, "cuda": CudaExecutor}
    if name not in made:
        raise InputError(f"executor must be one of {EXECUTORS}, got {name!r}")
    try:
        return made[name]()
    except RuntimeError as error:  # a driver that is there and does not work
        raise WorkbenchError(f"executor {name!r} cannot start: {error}") from error
