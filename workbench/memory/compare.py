"""One prefill, twice: Engram rows fetched serially and prefetched, with a table large enough for the lookup to matter.

A toy's own table fits in a cache and is read in microseconds. So the comparison gathers, besides the model's own rows, rows of
a random table made for timing: its values are read and thrown away, its size is named on every picture.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor

from workbench.errors import InputError, WorkbenchError
from workbench.memory.executors import NAMES, executor_name
from workbench.memory.prefetch import RowFetcher
from workbench.memory.rows import RowSource
from workbench.model.language_model import LanguageModel
from workbench.recorder import Recorder
from workbench.runtime import device_name, threads_for_run, use_threads
from workbench.trace import Timeline

ROUNDS = 3
TIMING_WIDTH = 256  # float16 values a row, 512 bytes
TIMING_ROWS = 24  # rows read per token, as many as one Engram layer of V4.1-Flash reads


class TimingTable:
    """A random table in host memory, and room for the rows that ``tokens`` tokens read of it."""

    def __init__(self, table_bytes: int, tokens: int) -> None:
        rows = table_bytes // (2 * TIMING_WIDTH)
        if rows < 1:
            raise InputError(f"table_bytes must hold at least one row of {2 * TIMING_WIDTH} bytes, got {table_bytes}")
        self.values = torch.empty(rows, TIMING_WIDTH, dtype=torch.float16)
        self.values.view(torch.int16).random_(generator=torch.Generator().manual_seed(0))  # touches every page once
        self.staging = torch.empty(tokens * TIMING_ROWS, TIMING_WIDTH, dtype=torch.float16)

    def read(self, rows: Tensor) -> None:
        """One model row [n] per token -> as many scattered rows per token as wanted, spread over the whole table, read."""
        factors = 2654435761 * torch.arange(1, 2 * TIMING_ROWS, 2)  # large and odd
        scattered = (rows.unsqueeze(-1) * factors % self.values.shape[0]).flatten()
        torch.index_select(self.values, 0, scattered, out=self.staging[: scattered.numel()])


class AlsoRead:
    """A model's table that reads the timing table too whenever it is read, and gives its own rows."""

    in_memory = True

    def __init__(self, source: RowSource, table: TimingTable, rows_per_token: int) -> None:
        self.source, self.table, self.rows_per_token = source, table, rows_per_token
        self.width, self.dtype = source.width, source.dtype

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        self.table.read(rows[:: self.rows_per_token])
        return self.source.gather(rows, out)

    def resident(self, device: torch.device) -> Tensor:
        return self.source.resident(device)


class TimingFetcher(RowFetcher):
    """The model's own fetcher with one more table to read."""

    def __init__(self, table: TimingTable, rows_per_token: int) -> None:
        super().__init__()
        self.table, self.rows_per_token = table, rows_per_token

    def start(self, layer, hash_rows, source, policy, *rest):  # type: ignore[no-untyped-def]
        return super().start(layer, hash_rows, AlsoRead(source, self.table, self.rows_per_token), policy, *rest)


def compare_prefill(
    model: LanguageModel,
    *,
    tokens: int = 4096,
    table_bytes: int = 256 * 2**20,
    progress: Callable[[float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[Timeline, Timeline]:
    """Measure one prefill of ``tokens`` random tokens, serial and prefetched in turn; the median round of each is returned.

    Raises InputError for a model without Engram; WorkbenchError when stopped.
    """
    engram = model.config.engram
    if engram is None:
        raise InputError(f"{model.name} has no Engram layers, so there is no lookup to overlap; load 'tiny-v4-engram'")
    if not 1 <= tokens <= model.config.max_position_embeddings:
        raise InputError(f"tokens must lie in 1..{model.config.max_position_embeddings}, got {tokens}")
    say = progress or (lambda share: None)
    use_threads(threads_for_run())
    table = TimingTable(table_bytes, tokens)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    layers = [model.blocks[i].engram for i in engram.layer_ids]
    own_table = sum(layer.hash.rows * layer.table.width * layer.table.dtype.itemsize for layer in layers)
    size = f"{table_bytes / 2**20:.0f} MiB"
    note = (
        f"one prefill of {tokens:,} tokens; each lookup also reads {TIMING_ROWS} rows a token of a {size} "
        f"random table made for timing (the model's own holds {own_table / 2**20:.1f} MiB); median of {ROUNDS} rounds"
    )
    twin = copy.copy(model)  # the same layers with another fetcher, so a live run of this model goes on undisturbed
    twin.fetcher = TimingFetcher(table, engram.rows_per_token)
    rounds: dict[str, list[Timeline]] = {"serial": [], "prefetch": []}
    try:
        for done in range(-2, 2 * ROUNDS):  # the first of each policy warms up and is not counted
            if should_stop and should_stop():
                raise WorkbenchError("the comparison was stopped; nothing was kept of it")
            policy = ("serial", "prefetch")[done % 2]
            timeline = _measure(twin, ids, policy, note)
            if done >= 0:
                rounds[policy].append(timeline)
            say((done + 3) / (2 * ROUNDS + 2))
    finally:
        twin.fetcher.close()
    serial, prefetched = (sorted(rounds[p], key=_duration)[ROUNDS // 2] for p in ("serial", "prefetch"))
    return serial, prefetched


def _measure(model: LanguageModel, ids: torch.Tensor, policy: str, note: str) -> Timeline:
    recorder = Recorder(model, spans_only=True)
    cache = model.new_cache()
    with recorder, torch.inference_mode():
        start = time.perf_counter()
        model(ids, cache, logits="last", prefetch=policy)
    recorder.finish_step(ids.shape[1], cache)
    who = f"executor {NAMES[executor_name(model.device)]}"
    return Timeline("measured", recorder.timeline_since(start), device_name(str(model.device)), f"{note}; {who}")


def _duration(timeline: Timeline) -> float:
    return max(span.end_s for span in timeline.spans)
