"""Does a model fit on a device, how long and how many could its sequences be, and how fast would they decode? Modelled.

How a model lies on ``cards`` equal devices: ``tp`` cards are a tensor-parallel group, and the cards / tp groups share the
sequences of a batch among them. Routed experts are spread over all cards; the other weights are split over the cards of a
group, and every group has them. A single KV head, or a latent, does not split: each card of a group holds the whole cache of
the group's sequences. Several KV heads do split. Engram tables stay in host memory.

Times assume peak bandwidth and peak rate, even routing and no communication, and that the slower of reading and computing takes
the time of a step. Bytes, FLOPs and seconds are those of the fullest card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workbench.config import DenseConfig, ModelConfig
from workbench.cost.sequence import (
    config_for,
    decode_bytes,
    decode_flops,
    extrapolated,
    kv_bytes,
    kv_bytes_per_token,
    length_limit,
    terms,
)
from workbench.devices import Device, devices
from workbench.errors import InputError
from workbench.presets import Preset, presets

FORMULA = "modelled (formula)"


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step of ``sequences`` at once, a token each. Unknown weights count as nothing read."""

    sequences: int
    cards: int
    weight_bytes: float
    kv_bytes: float
    flops: float
    read_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        return max(self.read_s, self.compute_s)

    @property
    def bound(self) -> Literal["bandwidth", "compute"]:
        """What takes longer, reading memory or computing."""
        return "bandwidth" if self.read_s >= self.compute_s else "compute"

    @property
    def tokens_per_s(self) -> float:
        """Of one sequence."""
        return 1 / self.seconds

    @property
    def tokens_per_s_per_card(self) -> float:
        return self.sequences / self.seconds / self.cards


@dataclass(frozen=True, slots=True)
class Fit:
    """What ``fit`` found. Bytes are of the fullest card; ``weight_bytes`` None where unknown: then only the cache is counted.

    ``longest_context`` is for this batch, ``largest_batch`` (of one group) and ``most_sequences`` (of all groups together) for
    this length; 0 where not even the weights fit, None where a sequence holds nothing. ``rates`` are steps of 1, 2, 4, ...
    up to ``most_sequences``.
    """

    device: Device
    cards: int
    tp: int
    batch: int
    storage: Literal["released", "bf16"]
    kv_bytes: dict[str, float]  # part -> bytes, and "total"
    weight_bytes: float | None
    longest_context: int  # tokens
    at_limit: bool  # the model's limit, not the memory, ends the context
    extrapolated: bool  # it is longer than the model was made for
    largest_batch: int | None
    most_sequences: int | None
    step: Step
    rates: tuple[Step, ...]

    @property
    def fits(self) -> bool:
        return self.kv_bytes["total"] <= self.device.memory_bytes - (self.weight_bytes or 0)

    @property
    def groups(self) -> int:
        return self.cards // self.tp


@dataclass(frozen=True, slots=True)
class Layout:
    """How ``layout`` puts a model on ``cards`` devices: what of a cache a card of a group holds, and in which format."""

    preset: Preset
    device: Device
    cards: int
    tp: int
    storage: Literal["released", "bf16"]
    split: float  # of a sequence's cache, the part that one card of its group holds
    weight_bytes: float | None  # of one card; None where unknown

    @property
    def groups(self) -> int:
        return self.cards // self.tp

    @property
    def room_bytes(self) -> float:
        """What a card has left for caches; unknown weights count as nothing."""
        return self.device.memory_bytes - (self.weight_bytes or 0.0)

    def kv_bytes(self, length: int, batch: int = 1) -> dict[str, float]:
        """Part -> bytes that the fullest card holds of ``batch`` caches of ``length`` tokens, and "total"."""
        share = self.split * _ceil(batch, self.groups)
        return {part: share * nbytes for part, nbytes in kv_bytes(self.preset, length, self.storage).items()}


def layout(preset: Preset | str, device: Device | str, cards: int = 1, tp: int = 1) -> Layout:
    """The model on ``cards`` devices, ``tp`` of them in a group; InputError as for ``fit``."""
    preset = presets[preset] if isinstance(preset, str) else preset
    device = devices[device] if isinstance(device, str) else device
    check_counts(preset.config, cards, tp, 1)
    weights = preset.weights
    held = weights.always_bytes / tp + weights.expert_bytes / cards if weights else None
    if weights and held is not None and device.unified_memory:
        held += weights.host_bytes / cards
    storage: Literal["released", "bf16"] = "released" if preset.kv_format in device.kv_formats else "bf16"
    return Layout(preset, device, cards, tp, storage, _cache_share(preset.config, tp), held)


def fit(preset: Preset | str, length: int, device: Device | str, *, cards: int = 1, tp: int = 1, batch: int = 1) -> Fit:
    """How the model with ``batch`` sequences of ``length`` tokens lies on ``cards`` devices, ``tp`` of them in a group.

    A device that does not read the format a cache was released in keeps it in BF16. Where host and accelerator share one
    memory, Engram tables take room in it too. InputError for unknown names, a bad length, cards, tp or batch below 1, and a
    tp that does not divide cards or exceeds the model's heads.
    """
    preset = presets[preset] if isinstance(preset, str) else preset
    device = devices[device] if isinstance(device, str) else device
    config, weights = config_for(preset, length), preset.weights
    check_counts(config, cards, tp, batch)
    lies = layout(preset, device, cards, tp)
    storage, split, groups, room = lies.storage, lies.split, lies.groups, lies.room_bytes
    per_sequence = lies.kv_bytes(length)
    longest = _longest(preset, storage, split * _ceil(batch, groups), room)
    largest = None if not per_sequence["total"] else max(0, int(room // per_sequence["total"]))
    most = None if largest is None else largest * groups
    read = split * decode_bytes(preset, length, storage)["total"]
    fast = "fp8" in device.tflop_per_s
    flops = decode_flops(preset, length, "fp8-equivalent" if fast else "plain")["total"]

    def step(sequences: int) -> Step:
        share = _ceil(sequences, groups)
        weight_bytes = weights.always_bytes / tp + weights.expert_bytes_read(sequences) / cards if weights else 0.0
        return Step(
            sequences=sequences,
            cards=cards,
            weight_bytes=weight_bytes,
            kv_bytes=share * read,
            flops=share * flops / tp,
            read_s=(weight_bytes + share * read) / device.bandwidth_bytes_per_s,
            compute_s=share * flops / tp / (device.tflop_per_s["fp8" if fast else "bf16"] * 1e12),
        )

    return Fit(
        device=device,
        cards=cards,
        tp=tp,
        batch=batch,
        storage=storage,
        kv_bytes=lies.kv_bytes(length, batch),
        weight_bytes=lies.weight_bytes,
        longest_context=longest,
        at_limit=longest == length_limit(config),
        extrapolated=extrapolated(preset, longest),
        largest_batch=largest,
        most_sequences=most,
        step=step(batch),
        rates=tuple(step(sequences) for sequences in _doubling(batch if most is None else most)),
    )


def _cache_share(config: ModelConfig, tp: int) -> float:
    """The part of a sequence's cache that one card of its group holds: whole KV heads, and all of a single one."""
    heads = config.num_key_value_heads if isinstance(config, DenseConfig) else 1
    return _ceil(heads, tp) / heads


def _longest(preset: Preset, storage: str, share: float, room: float) -> int:
    """Tokens of the longest sequences of which ``share`` caches, or parts of one, fill no more than ``room``; 0 if none do."""

    def needed(tokens: int, tail: bool) -> float:
        by_part = kv_bytes(preset, tokens, storage)
        return share * (by_part["total"] - (0 if tail else by_part["tail"]))

    low, high = 0, length_limit(preset.config)
    while low < high:  # what a cache holds beside its tail only grows
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle, tail=False) <= room else (low, middle - 1)
    while low and needed(low, tail=True) > room:  # the tail rises and falls with the block; a few thousand tokens at most
        low -= 1
    return low


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and ``most`` itself; nothing if that is 0."""
    counts = [2**power for power in range(most.bit_length())]
    return counts if not most or counts[-1] == most else [*counts, most]


def report(
    preset: Preset | str,
    length: int,
    on: Sequence[Device | str] = (),
    *,
    cards: int = 1,
    tp: int = 1,
    batch: int = 1,
) -> dict[str, Any]:
    """All that is counted of a preset at one length, and its fit on each device ``on``, as plain values for JSON.

    Outside "devices", bytes and FLOPs are of one sequence. Every block says its ``origin``, published or modelled, and
    "sources" where the numbers come from and how certain they are. InputError as for ``fit``.
    """
    preset = presets[preset] if isinstance(preset, str) else preset
    config = config_for(preset, length)
    check_counts(config, cards, tp, batch)
    weights = preset.weights
    found: dict[str, Any] = {
        "preset": preset.name,
        "title": preset.title,
        "preset_kv_format": preset.kv_format,
        "sources": {
            "preset": {"text": preset.source.text, "certainty": preset.source.certainty},
            **{number: {"text": s.text, "certainty": s.certainty} for number, s in preset.exceptions.items()},
        },
        "length": length,
        "max_position_embeddings": config.max_position_embeddings,
        "extrapolated": extrapolated(preset, length),
        "cards": cards,
        "tp": tp,
        "groups": cards // tp,
        "batch": batch,
        "kv_heads": config.num_key_value_heads if isinstance(config, DenseConfig) else 1,
        "kv_bytes": {"origin": FORMULA, "storage": "released", **kv_bytes(preset, length)},
        "kv_terms": [f"{t.symbols} = {t.numbers} = {t.nbytes:,} B" for t in terms(preset, length)],
        "kv_bytes_per_token": {"origin": FORMULA, **kv_bytes_per_token(preset)},
        "decode_bytes": {"origin": FORMULA, **decode_bytes(preset, length)},
        "decode_flops": {"origin": FORMULA, **decode_flops(preset, length)},
        "decode_flops_fp8_equivalent": {"origin": FORMULA, **decode_flops(preset, length, "fp8-equivalent")},
        "weights": None,
        "devices": [],
    }
    if weights:
        source = preset.source_of("weights")
        found["weights"] = {
            "origin": "published" if weights.origin == "published" else FORMULA,
            "source": source.text,
            "certainty": source.certainty,
            "device_bytes": weights.device_bytes,
            "host_bytes": weights.host_bytes,
            "read_bytes_per_step": weights.bytes_read(batch),
        }
    for device in on:
        found["devices"].append(_device_report(fit(preset, length, device, cards=cards, tp=tp, batch=batch)))
    return found


def _device_report(result: Fit) -> dict[str, Any]:
    device = result.device
    used = ("memory_bytes", "bandwidth_bytes_per_s", "tflop_per_s.fp8" if "fp8" in device.tflop_per_s else "tflop_per_s.bf16")
    sources = {number: device.source_of(number) for number in used}
    return {
        "device": device.name,
        "title": device.title,
        "origin": FORMULA,
        "sources": {number: {"text": source.text, "certainty": source.certainty} for number, source in sources.items()},
        "note": device.note,
        "kv_formats": list(device.kv_formats),
        "unified_memory": device.unified_memory,
        "storage": result.storage,
        "memory_bytes": device.memory_bytes,
        "kv_bytes_per_card": result.kv_bytes,
        "weight_bytes_per_card": result.weight_bytes,
        "fits": result.fits,
        "longest_context": result.longest_context,
        "longest_context_is_the_limit": result.at_limit,
        "longest_context_is_extrapolated": result.extrapolated,
        "largest_batch_per_group": result.largest_batch,
        "most_concurrent_sequences": result.most_sequences,
        "step": _step_report(result.step),
        "rates": [_step_report(step) for step in result.rates],
    }


def _step_report(step: Step) -> dict[str, Any]:
    return {
        "sequences": step.sequences,
        "weight_bytes_read_per_card": step.weight_bytes,
        "kv_bytes_read_per_card": step.kv_bytes,
        "flops_per_card": step.flops,
        "read_s": step.read_s,
        "compute_s": step.compute_s,
        "bound": step.bound,
        "tokens_per_s_per_sequence": step.tokens_per_s,
        "tokens_per_s_per_card": step.tokens_per_s_per_card,
    }


def check_counts(config: ModelConfig, cards: int, tp: int, batch: int) -> None:
    for name, number in (("cards", cards), ("tp", tp), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"{name} must be a whole number of 1 or more, got {number!r}")
    if cards % tp:
        raise InputError(f"tp must divide cards into equal groups, got tp={tp} and cards={cards}")
    if tp > config.num_attention_heads:
        raise InputError(f"tp={tp} exceeds the model's {config.num_attention_heads} attention heads, which it splits")


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
