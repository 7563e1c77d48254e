"""What ``report`` returns as lines to read, at most 120 characters wide. GB is 1e9 bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from workbench.config.parts import KV_PART, PARTS

LABEL, COLUMN, DEVICES = 32, 20, 4  # widths, and devices side by side
NUMBERS = {"memory_bytes": "memory", "bandwidth_bytes_per_s": "bandwidth", "tflop_per_s": "FLOP rate"}


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """What one sequence holds, reads and computes, what the weights come to, and a column for each device."""
    length, limit = report["length"], report["max_position_embeddings"]
    lines = [f"{report['title']}, one sequence of {length:,} tokens; modelled (formula) unless marked published"]
    if report["extrapolated"]:
        lines.append(f"  EXTRAPOLATED beyond the model's max_position_embeddings of {limit:,}: the formula goes on")
    lines += ["", *_sequence_lines(report), "", *_weight_lines(report)]
    shown = list({found["device"]: found for found in report["devices"]}.values())  # each once, however often it was named
    for first in range(0, len(shown), DEVICES):
        lines += ["", *_device_lines(report, shown[first : first + DEVICES])]
    return lines + (["", *_notes(report, shown)] if shown else [])


def _sequence_lines(report: Mapping[str, Any]) -> list[str]:
    kv, read = report["kv_bytes"], report["decode_bytes"]
    lines = [_row("KV cache, stored as released", ("held", "read per token"))]
    lines += [_row(f"  {part}", (_size(kv[part]), _size(read[part]))) for part in _parts(kv)]
    lines.append(_row("  each further token", (f"{report['kv_bytes_per_token']['total']:,.0f} B",)))
    if kv["tail"]:
        lines.append(_row("  without tail, as published", (_size(kv["total"] - kv["tail"]),)))
    lines += ["", *(f"  {line}" for line in report["kv_terms"])]
    lines += ["", _row("FLOPs of one decoded token", ("plain", "fp8-equivalent"))]
    plain, weighted = report["decode_flops"], report["decode_flops_fp8_equivalent"]
    for part in ("projections", "core", "indexer", "total"):
        lines.append(_row(f"  {part}", (f"{plain[part] / 1e9:,.1f} G", f"{weighted[part] / 1e9:,.1f} G")))
    return lines


def _weight_lines(report: Mapping[str, Any]) -> list[str]:
    weights = report["weights"]
    if weights is None:
        return ["weights: unknown (no such model was released); devices hold and read the cache alone"]
    host = f", and {_size(weights['host_bytes'])} of Engram tables in host memory" if weights["host_bytes"] else ""
    lines = [f"weights, {weights['origin']}: {_size(weights['device_bytes'])}{host}", f"  {weights['source']}"]
    if weights["origin"] != "published":
        lines.append("  bytes of the published checkpoint: unknown")
    step = f"read in a step of {_plural(report['batch'], 'sequence')}"
    return [*lines, f"  {step}: {_size(weights['read_bytes_per_step'])}, if routing is even"]


def _device_lines(report: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a card holds, how much would fit, what a step takes, and how fast more sequences decode."""
    batch = _plural(report["batch"], "sequence")
    how = f"{_plural(report['cards'], 'card')} in {_plural(report['groups'], 'group')} of {report['tp']}"
    lines = [f"{how}, {batch} of {report['length']:,} tokens; of one card (the fullest), modelled (formula)"]

    def add(label: str, cell: Callable[[Mapping[str, Any]], str]) -> None:
        lines.append(_row(label, [cell(found) for found in shown]))

    add("", lambda found: found["device"])
    add("memory", lambda found: _size(found["memory_bytes"]))
    add("weights", lambda found: _maybe(found["weight_bytes_per_card"], _size, "unknown"))
    add("KV cache, stored as", lambda found: "BF16" if found["storage"] == "bf16" else "released")
    for part in _parts(report["kv_bytes"]):
        lines.append(_row(f"  {part}", [_size(found["kv_bytes_per_card"][part]) for found in shown]))
    add("fits", lambda found: "yes" if found["fits"] else "NO")
    add("longest context, this batch", _longest)
    add("largest batch of a group", lambda found: _maybe(found["largest_batch_per_group"], "{:,}".format, "no limit"))
    add("most concurrent sequences", lambda found: _maybe(found["most_concurrent_sequences"], "{:,}".format, "no limit"))
    lines.append(f"a step of {batch}")
    known = report["weights"] is not None
    add("  weights read", lambda found: _size(found["step"]["weight_bytes_read_per_card"]) if known else "unknown")
    add("  cache read", lambda found: _size(found["step"]["kv_bytes_read_per_card"]))
    add("  FLOPs", lambda found: f"{found['step']['flops_per_card'] / 1e9:,.1f} G")
    add("  reading", lambda found: f"{1e3 * found['step']['read_s']:,.3f} ms")
    add("  computing", lambda found: f"{1e3 * found['step']['compute_s']:,.3f} ms")
    add("  bound by", lambda found: found["step"]["bound"])
    counts = sorted({rate["sequences"] for found in shown for rate in found["rates"]})
    if not counts:
        return [*lines, "", "not one sequence fits: no rates"]
    lines += ["", "tokens/s per card by concurrent sequences, modelled; c: bound by computing, else by bandwidth"]
    for count in counts:
        at = [next((rate for rate in found["rates"] if rate["sequences"] == count), None) for found in shown]
        lines.append(_row(f"  {count:,}", [_maybe(rate, _rate, "-  ") for rate in at]))
    return lines


def _notes(report: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the columns take for granted, and where the figures of each device come from."""
    heads, tp, weights = report["kv_heads"], report["tp"], report["weights"]
    if heads > 1:
        repeated = ", each head on several" if tp > heads else ""
        lines = [f"cache: the {heads} KV heads split over the cards of a group{repeated}"]
    else:
        lines = ["cache: a single KV head (a latent) does not split; each card of a group holds all of its group's sequences"]
    if weights:
        lines.append("weights: routed experts are spread over all cards; each group holds all others, split over its cards")
    lines.append(f"rates: peak bandwidth and FLOP rate, even routing, no communication{'' if weights else ', no weights'}")
    lines.append("FLOPs: fp8-equivalent on a device with FP8 units, plain without")
    if any(found["longest_context_is_extrapolated"] for found in shown):
        lines.append(f"*: beyond the model's max_position_embeddings of {report['max_position_embeddings']:,}, extrapolated")
    for found in shown:
        lacking = found["storage"] == "bf16" and report["preset_kv_format"] != "bf16"
        instead = f", not {report['preset_kv_format'].upper()}: cache kept in BF16" if lacking else ""
        lines.append(f"{found['device']}: supports {', '.join(found['kv_formats']).upper()} caches{instead}")
        named: dict[tuple[str, str], list[str]] = {}
        for number, source in found["sources"].items():
            named.setdefault((source["certainty"], source["text"]), []).append(NUMBERS[number.partition(".")[0]])
        for (certainty, text), numbers in named.items():
            lines.append(f"  {', '.join(numbers) if len(named) > 1 else 'figures'} {certainty}: {text}")
        if found["unified_memory"] and weights and weights["host_bytes"]:
            lines.append("  host and accelerator share one memory, so Engram tables count as weights")
        if found["note"]:
            lines.append(f"  {found['note']}")
    return lines


def _longest(found: Mapping[str, Any]) -> str:
    mark = " (limit)" if found["longest_context_is_the_limit"] else " *" if found["longest_context_is_extrapolated"] else ""
    return f"{found['longest_context']:,}{mark}"


def _parts(kv: Mapping[str, Any]) -> list[str]:
    """The parts a cache has, and "total"."""
    return [part for part in (*PARTS, KV_PART) if kv.get(part)] + ["total"]


def _row(label: str, cells: Iterable[str]) -> str:
    return f"{label:<{LABEL}}{''.join(f'{cell:>{COLUMN}}' for cell in cells)}".rstrip()


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{rate['tokens_per_s_per_card']:,.1f} {'c' if rate['bound'] == 'compute' else ' '}"


def _maybe(value: Any, shown: Callable[[Any], str], otherwise: str) -> str:
    return otherwise if value is None else shown(value)


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _size(number: float) -> str:
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if number >= 0.1 * s), ("B", 1.0))
    return f"{number / scale:,.3f} {unit}" if scale > 1 else f"{number:,.0f} B"
