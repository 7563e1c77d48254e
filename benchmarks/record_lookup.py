"""Records the two timelines that ship: the same work with Engram rows looked up when needed, and ahead of need.

Timelines alone, without tokens: `python benchmarks/record_lookup.py FOLDER` writes FOLDER/lookup-serial and
FOLDER/lookup-prefetched, for `wb.Trace.load`. The rows are real, compute is a timed wait, so the machine should be quiet.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import workbench as wb
from workbench.runtime import machine
from workbench.trace import Timeline

TOKENS, ROWS_PER_TOKEN = 4096, 24  # a chunk, and what one Engram layer of V4.1-Flash reads for a token
WINDOW_MS, LAYERS = 16.0, (1, 3)


def as_trace(timeline: Timeline) -> wb.Trace:
    """One step and no token."""
    none, step = np.zeros(0, np.int32), np.zeros(1, np.int32)
    return wb.Trace("no model", "timeline alone", timeline.device, {}, none, (), 0, timeline=timeline, step_starts=step)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("give the folder to write to, such as workbench/assets/traces")
    found = wb.overlap_experiment(
        "emulated", rows_per_lookup=TOKENS * ROWS_PER_TOKEN, window_ms=WINDOW_MS, layers=LAYERS, rounds=15
    )
    print(machine()["device"], found.summary(), sep="\n")
    for name in ("serial", "prefetched"):
        timeline = replace(found.timelines[name], note=f"{found.timelines[name].note}; {found.load}")
        print(as_trace(timeline).save(Path(sys.argv[1]) / f"lookup-{name}"))


if __name__ == "__main__":
    main()
