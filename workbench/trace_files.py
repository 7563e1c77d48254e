"""Traces in folders: plain arrays beside a JSON manifest, never code; what comes back is checked before anyone draws it."""

from __future__ import annotations

import glob
import json
import zipfile
from collections.abc import Sequence
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from workbench.errors import InputError, given_path
from workbench.trace import EngramTrace, LayerTrace, Span, Timeline, Trace, stored_origin
from workbench.trace_check import ARRAYS, check_loaded

FORMAT, VERSION = "workbench-trace", 1
ARRAYS_FILE, MANIFEST_FILE = "arrays.npz", "trace.json"
SHIPPED = Path(__file__).parent / "assets" / "traces"
MAX_BYTES = 8 * 2**30  # a manifest that asks for more than this is refused before anything is allocated


def save(trace: Trace, folder: str | Path, *, half: bool) -> Path:
    """What ``Trace.save`` does."""
    folder = given_path("a folder", folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder to save the trace in")
    folder.mkdir(parents=True, exist_ok=True)
    arrays, manifest = _pack(trace)
    if half:
        arrays = {k: v.astype(np.float16) if k.split(".")[-1].startswith("index_") else v for k, v in arrays.items()}
    manifest["arrays"] = {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()}
    try:
        written = json.dumps(manifest)  # ASCII: half a character in a token's text comes back as it was
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the trace holds what JSON cannot ({error}); keep plain values in notes and config") from None
    temporary = folder / (ARRAYS_FILE + ".part")
    with temporary.open("wb") as out:
        np.savez_compressed(out, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    temporary.replace(folder / ARRAYS_FILE)
    (folder / MANIFEST_FILE).write_text(written, encoding="utf-8")
    return folder


def load(folder: str | Path) -> Trace:
    """What ``Trace.load`` does."""
    folder = _find_folder(folder)
    if not (folder / MANIFEST_FILE).is_file() or not (folder / ARRAYS_FILE).is_file():
        raise InputError(f"{folder} is no saved trace: expected {MANIFEST_FILE} and {ARRAYS_FILE} in it")
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise InputError(f"{folder} holds no {FORMAT} of version {VERSION}; save it again with this workbench")
        declared = manifest["arrays"]
        total = sum(_nbytes(kind, shape) for kind, shape in declared.values())
        if total > MAX_BYTES:
            raise InputError(f"{folder} declares {total} bytes of arrays; at most {MAX_BYTES} are read")
        return _unpack(manifest, _read_arrays(folder / ARRAYS_FILE, declared))
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file provokes in the readers of JSON, zip and npy
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} is damaged or foreign ({type(error).__name__}: {reason}); save the trace again") from None


def shipped_traces(prefix: str = "") -> tuple[str, ...]:
    """Names of the recordings that ship and begin with ``prefix``, for ``Trace.load``."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob(f"{glob.escape(prefix)}*/{MANIFEST_FILE}")))


def _find_folder(source: str | Path) -> Path:
    """A folder as given, or the shipped trace of that name."""
    folder = given_path("a trace", source)
    if folder.is_dir() or folder.name != str(source):
        return folder
    shipped = shipped_traces()
    if str(source) not in shipped:
        names = ", ".join(map(repr, shipped)) or "none"
        raise InputError(f"no trace {str(source)!r}: give a folder that Trace.save wrote, or a shipped trace ({names})")
    return SHIPPED / folder


_PLAIN = ("model", "what", "device", "config", "prompt_length", "storage", "notes")


def _pack(trace: Trace) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays = {name: getattr(trace, name) for name in ARRAYS}
    arrays |= {f"cache.{part}": held for part, held in trace.cache_bytes.items()}
    groups: tuple[tuple[str, tuple[LayerTrace | EngramTrace, ...]], ...] = (("layer", trace.layers), ("engram", trace.engram))
    for group, records in groups:
        for i, record in enumerate(records):
            values = {f.name: getattr(record, f.name) for f in fields(record)}
            arrays |= {f"{group}.{i}.{name}": v for name, v in values.items() if isinstance(v, np.ndarray)}
    spans = trace.timeline.spans
    arrays["span.times"] = np.array([(s.start_s, s.end_s) for s in spans], np.float64).reshape(-1, 2)
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION} | {name: getattr(trace, name) for name in _PLAIN}
    manifest["token_texts"] = list(trace.token_texts)
    manifest["layers"] = [{"layer": x.layer, "kind": x.kind, "ratio": x.ratio} for x in trace.layers]
    manifest["engram"] = [{"layer": x.layer, "pad": x.pad} for x in trace.engram]
    manifest["origin"] = stored_origin(trace.origin)
    timeline = trace.timeline
    manifest["timeline"] = {"origin": stored_origin(timeline.origin), "device": timeline.device, "note": timeline.note}
    manifest["spans"] = [[s.lane, s.name, s.step, stored_origin(s.origin), list(s.after)] for s in spans]
    return arrays, manifest


def _nbytes(kind: str, shape: Sequence[int]) -> int:
    if not all(type(side) is int and side >= 0 for side in shape):
        raise InputError(f"an array cannot have the shape {shape}")
    return np.dtype(kind).itemsize * prod(shape)


def _read_arrays(path: Path, declared: dict[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """The arrays a manifest lists. What a file promises is held against the manifest before memory is set aside for it."""
    arrays = {}
    with zipfile.ZipFile(path) as stored:
        if sorted(stored.namelist()) != sorted(f"{name}.npy" for name in declared):
            raise InputError(f"{path} does not hold the arrays its manifest lists; save the trace again")
        for name, (kind, shape) in declared.items():
            with stored.open(f"{name}.npy") as member:
                if npy.read_magic(member) != (1, 0):
                    raise InputError(f"{path}: array {name!r} is in another format than this workbench writes")
                promised, _, dtype = npy.read_array_header_1_0(member)
                size = member.tell() + _nbytes(kind, shape)
                if (list(promised), dtype, stored.getinfo(member.name).file_size) != (list(shape), np.dtype(kind), size):
                    raise InputError(f"{path}: array {name!r} differs from its manifest; save the trace again")
                member.seek(0)
                arrays[name] = npy.read_array(member, allow_pickle=False)
    return arrays


def _unpack(manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trace:
    def record(kind: type, group: str, i: int, plain: dict[str, Any]) -> Any:
        names = {f.name for f in fields(kind)}
        start = f"{group}.{i}."
        stored = {k[len(start) :]: v for k, v in arrays.items() if k.startswith(start) and k[len(start) :] in names}
        return kind(**plain, **stored)

    times = arrays["span.times"]
    spans = tuple(
        Span(lane, name, step, float(start), float(end), origin, tuple(after))
        for (lane, name, step, origin, after), (start, end) in zip(manifest["spans"], times, strict=True)
    )
    plain: dict[str, Any] = {name: manifest[name] for name in _PLAIN} | {name: arrays[name] for name in ARRAYS}
    trace = Trace(
        **plain,
        token_texts=tuple(manifest["token_texts"]),
        layers=tuple(record(LayerTrace, "layer", i, of) for i, of in enumerate(manifest["layers"])),
        engram=tuple(record(EngramTrace, "engram", i, of) for i, of in enumerate(manifest["engram"])),
        timeline=Timeline(spans=spans, **manifest["timeline"]),
        cache_bytes={name[6:]: a for name, a in arrays.items() if name.startswith("cache.")},
        origin=stored_origin(manifest["origin"]),
    )
    check_loaded(trace)
    return trace
