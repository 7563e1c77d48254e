"""A context that grows until a card is full: how far it gets, how many cards it needs, and what can be done then. Modelled.

Built on how a model lies on devices (``capacity.layout``). Seconds are bytes over a link's assumed effective rate, or FLOPs
over a peak rate, so they are what it takes at least; waiting, scheduling and communication between cards are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.cost.capacity import FORMULA, Layout, check_counts, layout
from workbench.cost.sequence import Model, config_for, decode_flops, extrapolated, length_limit
from workbench.devices import Device, devices, link_of
from workbench.errors import InputError
from workbench.presets import Preset, presets

What = Literal["refuse", "forget", "recompute", "swap"]
CARDS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Filling:
    """``batch`` sequences that all grow through ``contexts`` tokens; bytes are of the fullest card."""

    lies: Layout
    batch: int
    contexts: tuple[int, ...]
    kv_bytes: tuple[float, ...]  # after each
    origin: str = FORMULA

    @property
    def room_bytes(self) -> float:
        return self.lies.room_bytes

    @property
    def full_at(self) -> int | None:
        """Index of the first context that no longer fits; None if all do."""
        return next((i for i, nbytes in enumerate(self.kv_bytes) if nbytes > self.room_bytes), None)


def filling(
    contexts: Sequence[int], preset: Preset | str, device: Device | str, *, cards: int = 1, tp: int = 1, batch: int = 1
) -> Filling:
    """What the fullest card holds of ``batch`` caches after each of ``contexts`` tokens.

    Contexts beyond the model's limit are left out. InputError as for ``fit``, and if none is left.
    """
    lies = layout(preset, device, cards, tp)
    check_counts(lies.preset.config, cards, tp, batch)
    known = tuple(n for n in contexts if n <= length_limit(lies.preset.config))
    if not known:
        raise InputError(f"give at least one context of up to {length_limit(lies.preset.config)} tokens, got {len(contexts)}")
    return Filling(lies, batch, known, tuple(lies.kv_bytes(n, batch)["total"] for n in known))


@dataclass(frozen=True, slots=True)
class Cards:
    """The fewest cards of a device, of 1, 2, 4, ... 64, that hold a model and its caches; ``cards`` None if 64 do not."""

    preset: Preset
    device: Device
    cards: int | None
    tp: int | None
    storage: str
    extrapolated: bool
    weights_known: bool


def cards_needed(preset: Preset | str, device: Device | str, length: int, batch: int = 1) -> Cards:
    """The fewest cards for ``batch`` sequences of ``length`` tokens, and the smallest groups they can work in.

    InputError as for ``fit``.
    """
    preset = presets[preset] if isinstance(preset, str) else preset
    config = config_for(preset, length)
    check_counts(config, 1, 1, batch)
    found, lies = None, layout(preset, device)
    for cards in CARDS:
        for tp in (n for n in CARDS if n <= min(cards, config.num_attention_heads)):
            lies = layout(preset, device, cards, tp)
            if lies.kv_bytes(length, batch)["total"] <= lies.room_bytes:
                found = (cards, tp)
                break
        if found:
            break
    many, group = found or (None, None)
    return Cards(
        preset, lies.device, many, group, lies.storage, extrapolated(preset, length), preset.weights is not None
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choice:
    """What can be done with one session when there is no room. Bytes and FLOPs are of one card of its group.

    ``seconds``: at least, until the session can go on; None where no rate is known. ``tokens`` it can still attend to;
    ``exact``: it goes on as if nothing had happened.
    """

    what: What
    tokens: int
    freed_bytes: float
    moved_bytes: float
    flops: float
    seconds: float | None
    exact: bool
    note: str
    origin: str = FORMULA


def when_full(
    preset: Preset | str, length: int, device: Device | str, *, cards: int = 1, tp: int = 1, keep: int | None = None
) -> tuple[Choice, ...]:
    """Refuse, forget, recompute or swap: each with the bytes it frees and moves and the seconds it costs at least.

    The session has ``length`` tokens; forgetting leaves its last ``keep``, half of them unless given. Recomputing reads the
    whole text again, every token through every layer, at the peak rate. Swapping copies a card's share of the cache to the host
    and back, each card over a link of its own. InputError as for ``fit``, and for a ``keep`` that is not below ``length``.
    """
    lies = layout(preset, device, cards, tp)
    config_for(lies.preset, length)
    keep = length // 2 if keep is None else keep
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep < max(1, length):
        raise InputError(f"keep must be a whole number of tokens from 0 to below {length}, got {keep!r}")
    held = lies.kv_bytes(length)["total"]
    flops, rate = _prefill(lies, length)
    seconds, said = _swap(lies.device, held)
    return (
        Choice("refuse", length, 0.0, 0.0, 0.0, 0.0, False, "the session ends here, or waits until another one does"),
        Choice(
            "forget", keep, held - lies.kv_bytes(keep)["total"], 0.0, 0.0, 0.0, False,
            "what was dropped is never seen again; what stays was computed while it was there",
        ),
        Choice(
            "recompute", length, held, 0.0, flops, flops / rate, True,
            "the text is read again when the session goes on; at the device's peak rate",
        ),
        Choice("swap", length, 0.0 if lies.device.unified_memory else held, 2 * held, 0.0, seconds, True, said),
    )  # fmt: skip


def prefill_flops(model: Model, length: int, weighting: str = "plain") -> float:
    """FLOPs of reading ``length`` tokens, every token through every layer: the sum of what each costs to decode.

    Summed between points a factor of 1.5 or less apart; between the lengths at which windows, top-k and pools fill, the costs
    are straight lines but for whole blocks. InputError as for ``decode_flops``.
    """
    config_for(model, length)
    if not length:
        return 0.0
    points = sorted({1, length, *(n for power in range(length.bit_length()) for n in (2**power, 3 * 2**power) if n <= length)})
    costs = [decode_flops(model, n, weighting)["total"] for n in points]
    total = costs[0]
    for a, b, at_a, at_b in zip(points, points[1:], costs, costs[1:], strict=False):
        total += (b - a) * (at_a + at_b) / 2 + (at_b - at_a) / 2  # of a straight line, from a + 1 to b
    return total


def _prefill(lies: Layout, length: int) -> tuple[float, float]:
    """FLOPs of one card of a group that reads the text again, and the rate of a card."""
    fast = "fp8" in lies.device.tflop_per_s
    flops = prefill_flops(lies.preset, length, "fp8-equivalent" if fast else "plain")
    return flops / lies.tp, lies.device.tflop_per_s["fp8" if fast else "bf16"] * 1e12


def _swap(device: Device, nbytes: float) -> tuple[float | None, str]:
    """Seconds there and back, and by what; None where there is no link or no rate for it."""
    if device.unified_memory:
        return None, "host and device share one memory: there is nowhere to swap to"
    try:
        link = link_of(device)
    except InputError:
        return None, f"no rate is known for its host link ({device.host_link})"
    assert link is not None
    rate = f"{link.effective_bytes_per_s / 1e9:,.0f} GB/s assumed, of {link.peak_bytes_per_s / 1e9:,.1f} at most"
    return 2 * nbytes / link.effective_bytes_per_s, f"to the host and back over {link.title}: {rate}"


def all_cards_needed(length: int, batch: int = 1) -> tuple[Cards, ...]:
    """`cards_needed` of every device for every preset; presets whose text cannot be so long are an InputError."""
    return tuple(cards_needed(preset, device, length, batch) for device in devices.values() for preset in presets.values())
