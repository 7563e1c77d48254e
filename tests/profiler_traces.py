"""Traces as profilers of CUDA programs write them, made by hand and in bulk."""

from __future__ import annotations

import json
from typing import Any

BASE_NS = 1_700_000_000_000_000_000
HOST, THREAD, GPU = 4321, 4322, 0
DEVICE = {"id": GPU, "name": "NVIDIA Imaginary"}


def span(cat: str, name: str, ts: float, dur: float, pid: Any = HOST, tid: Any = THREAD, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": arguments}


def on_stream(cat: str, name: str, ts: float, dur: float, stream: int, correlation: int, **arguments: Any) -> dict[str, Any]:
    about = {"device": GPU, "stream": stream, "correlation": correlation, **arguments}
    return span(cat, name, ts, dur, GPU, stream, **about)


def document(events: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"schemaVersion": 1, "deviceProperties": [DEVICE], "baseTimeNanoseconds": BASE_NS, "traceEvents": events} | more


def cuda_trace() -> dict[str, Any]:
    """Two compute streams and a copy stream; every number of the tests about it can be read off here (microseconds)."""
    upload, download = "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pinned)"
    events = [
        {"ph": "M", "name": "thread_name", "pid": HOST, "tid": THREAD, "ts": 0, "args": {"name": "thread 4322 (python)"}},
        span("user_annotation", "ProfilerStep#3", 1000, 900),
        span("user_annotation", "forward", 1080, 400),
        span("python_function", "train.py(7): step", 1000, 800),
        span("cpu_op", "aten::mm", 1090, 40),
        span("cuda_runtime", "cudaLaunchKernel", 1100, 5, correlation=1),
        span("cuda_runtime", "cudaMemcpyAsync", 1110, 4, correlation=2),
        span("cuda_runtime", "cudaLaunchKernel", 1130, 5, correlation=3),
        span("cuda_runtime", "cudaLaunchKernel", 1300, 5, correlation=4),
        span("cuda_runtime", "cudaMemcpyAsync", 1305, 5, correlation=5),
        span("cuda_runtime", "cudaDeviceSynchronize", 1320, 120, correlation=6),
        on_stream("kernel", "gemm<128, 64>", 1120, 100, 7, 1),  # 1120..1220
        on_stream("gpu_memcpy", upload, 1150, 150, 20, 2, bytes=3_000_000),  # 1150..1300: 70 under the kernel, 80 exposed
        on_stream("kernel", "softmax", 1310, 90, 7, 3),  # 1310..1400
        on_stream("kernel", "gather_rows", 1380, 40, 9, 4),  # 1380..1420: 20 beside softmax
        on_stream("gpu_memcpy", download, 1425, 10, 7, 5, bytes=64),  # 1425..1435: exposed
        on_stream("gpu_memset", "Memset (Device)", 1400, 5, 7, 7),  # 1400..1405, under gather_rows
        on_stream("gpu_user_annotation", "forward", 1120, 280, 7, 0),
        {"ph": "s", "id": 1, "pid": HOST, "tid": THREAD, "ts": 1100, "cat": "ac2g", "name": "ac2g"},
        {"ph": "f", "id": 1, "pid": GPU, "tid": 7, "ts": 1120, "cat": "ac2g", "name": "ac2g", "bp": "e"},
        span("Trace", "PyTorch Profiler (0)", 900, 1200, "Spans", "PyTorch Profiler"),
        {"ph": "i", "s": "g", "name": "Record Window End", "pid": "", "tid": "", "ts": 2000},
    ]
    return document(events)


def large_trace(megabytes: float) -> bytes:
    """JSON of about that size: short kernels on one stream, copies on another, half of each copy under kernels, and their
    launches; made as text, piece by piece, because that is quick."""
    head = json.dumps(document([]))[:-2]  # up to the list's opening bracket, which "]}" ends
    assert head.endswith('"traceEvents": [')
    pieces, size, i = [], 0, 0
    while size < megabytes * 1e6:
        t = 100 * i
        rows = [
            span("cpu_op", "aten::linear", t, 30, **{"External id": i, "Input Dims": [[64, 4096], [4096, 4096], [4096]]}),
            span("cuda_runtime", "cudaLaunchKernel", t + 3, 4, correlation=2 * i + 1, cbid=211),
            on_stream("kernel", f"void gemm_kernel<{i % 37}, 128>(float const*)", t + 20, 60, 7, 2 * i + 1, grid=[8, 1, 1]),
            span("cuda_runtime", "cudaMemcpyAsync", t + 9, 4, correlation=2 * i + 2, cbid=41),
            on_stream("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", t + 60, 40, 20, 2 * i + 2, bytes=163840),
        ]  # fmt: skip
        pieces.append(json.dumps(rows)[1:-1])
        size += len(pieces[-1])
        i += 1
    return f"{head}{','.join(pieces)}]}}".encode()
