"""The record a benchmark leaves: what it found, on which machine, and how busy that was, as JSON under benchmarks/results/."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from workbench.runtime import machine, slug

RESULTS = Path(__file__).parent / "results"


def begin(benchmark: str, **settings: Any) -> dict[str, Any]:
    """A record to fill; call it before anything is measured, for the load."""
    return {"benchmark": benchmark, "machine": machine(accelerator=True), "niceness": niceness(), **settings}


def niceness() -> int | None:
    """Of this process: below 0 it came before others that wanted the cores."""
    return os.nice(0) if hasattr(os, "nice") else None


def store(record: dict[str, Any], device: str | None = None, path: Path | None = None) -> Path:
    """Add the load there is now and write the record as ``<benchmark>-<device>.json``, or to ``path``; says where it lies.

    ``device`` is what was measured on and in which format, by default the machine's processor.
    """
    record = record | {"load after": machine()["load_average"]}
    if path is None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{record['benchmark']}-{slug(device or record['machine']['device'])}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    checkout = RESULTS.parents[1]
    print(f"record: {path.relative_to(checkout) if path.is_relative_to(checkout) else path}")
    return path
