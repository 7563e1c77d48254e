"""One true-size attention layer of each design, its cache filled for real: bytes held and read, and ms per decoded token.

Each layer is filled once, stopping to decode at every length. A step is held against the bytes it must read, cache and
weights, over the machine's copy bandwidth. The measurements go into a file under benchmarks/results/ with the machine's name.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import _record
from workbench import runtime
from workbench.cli import token_count
from workbench.errors import InputError
from workbench.measurements import LayerMeasurement
from workbench.progress import Progress
from workbench.true_size import MAX_LENGTH, TrueSizeLayer, true_size_layer

LENGTHS = "8K,64K,512K,1M"
LAYERS = "v4-flash:csa,v4-flash:hca,v4.1-flash:csa2-full,v3.2:mla-dsa,gqa-8:gqa"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROW = "{:24} {:>9} {:>14} {:>14} {:>12} {:>10} {:>10} {:>8}"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `workbench bench layer --help`")


def main(arguments: Sequence[str] = ()) -> None:
    options = read_options(arguments)
    runtime.use_threads(options.threads)
    bar, began = Progress(), _record.begin("layer", threads=options.threads)
    found: dict[str, list[dict[str, Any]]] = {"measured": [], "fills": [], "refused": []}
    print(f"{runtime.device_name(runtime.pick_device(options.device))}, {options.dtype}, {options.threads} threads")
    if (began["machine"]["load_average"] or 0) > runtime.cores():
        print("other processes keep this machine busy: the times below say more about them than about the layers")
    print("one layer, measured: random weights, real cache; floor = (bytes read + weights) / copy bandwidth")
    print(ROW.format("layer", "tokens", "held, B", "read, B", "weights, B", "ms/token", "floor, ms", "x floor"))
    try:
        for preset, kind in options.layers:
            measure(preset, kind, options, bar, found)
    finally:  # what was measured before an interruption is kept
        bar.clear()
        if found["measured"]:
            device = found["measured"][0]["device"]
            _record.store(began | {"device": device} | found, device, options.out)


def measure(preset: str, kind: str, options: argparse.Namespace, bar: Progress, found: dict[str, list[dict[str, Any]]]) -> None:
    """Fill one layer up to the longest length that fits, and print a row for each length."""
    settings = {"device": options.device, "dtype": DTYPES[options.dtype], "seed": options.seed, "storage": options.storage}
    layer, name = true_size_layer(preset, kind, **settings), f"{preset} {kind}"
    longest = layer.longest_fit()
    lengths = [length for length in options.lengths if length <= longest]
    start = time.perf_counter()
    try:
        for length in lengths[-1:]:
            layer.fill(length, measure_at=lengths, progress=lambda held, goal: bar.show(held / goal, f"{name} {held:,}"))
    finally:
        bar.clear()
        seconds = time.perf_counter() - start - sum(m.step_s * m.steps for m in layer.measurements)
        found["measured"] += [m.to_dict() for m in layer.measurements]
        for m in layer.measurements:
            print(row(name, m), flush=True)
    if lengths:
        rate = layer.cache.length / seconds
        found["fills"].append({"preset": preset, "kind": kind, "tokens": layer.cache.length, "seconds": seconds})
        found["fills"][-1]["load_average"] = runtime.machine()["load_average"]
        print(f"{'':24} filled in {seconds:,.1f} s, {rate:,.0f} tokens/s", flush=True)
        total = layer.measurements[-1].over_layers(layer.layers)
        print(row(f"  x {layer.layers}", total) + f"  ({total.label})", flush=True)
    for length in options.lengths:
        if length > longest:
            refused(layer, length, found)


def refused(layer: TrueSizeLayer, length: int, found: dict[str, list[dict[str, Any]]]) -> None:
    """Say what a length that does not fit would need."""
    needed, longest = layer.bytes_needed(length), layer.longest_fit()
    entry = {"preset": layer.preset.name, "kind": layer.kind, "length": length, "bytes_needed": needed, "longest_fit": longest}
    found["refused"].append(entry)
    name = f"{layer.preset.name} {layer.kind}"
    print(f"{name:24} {length:>9,} refused: needs {needed:,} B, beyond what is free; up to {longest:,} tokens fit", flush=True)


def row(name: str, m: LayerMeasurement) -> str:
    numbers = (f"{m.length:,}", f"{m.held_bytes:,}", f"{m.read_bytes:,}", f"{m.weight_bytes:,}")
    times = (f"{1e3 * m.step_s:,.2f}", f"{1e3 * m.floor_s:,.2f}", f"{m.over_floor:.2f}")
    return ROW.format(name, *numbers, *times)


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="workbench bench layer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default=LENGTHS, metavar="N[K|M],...", help="tokens to measure at (default %(default)s)")
    parser.add_argument("--layers", default=LAYERS, metavar="PRESET:KIND,...", help="what to measure (default %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of weights and cache (default %(default)s)")
    parser.add_argument("--storage", choices=("released", "bf16", "fp32"), help="of the cache, if not as --dtype")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=runtime.cores(), metavar="N", help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the result is written (default: benchmarks/results/)")
    options = parser.parse_args(list(arguments))
    try:
        options.lengths = sorted({token_count(text) for text in options.lengths.split(",")} - {0})
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if options.lengths[-1:] > [MAX_LENGTH]:
        parser.error(f"lengths go up to {MAX_LENGTH:,} tokens, got {options.lengths[-1]:,}")
    options.layers = [(preset, kind) for preset, _, kind in (text.partition(":") for text in options.layers.split(","))]
    return options


if __name__ == "__main__":
    main()
