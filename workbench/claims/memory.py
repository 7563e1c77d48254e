"""Claims about memory: what Engram moves, what it leaves where it is, and what fits on a card. All by formula.

(reference/engram-and-overlap.md, sections 0 and 6)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from workbench.claims.record import (
    ANCESTOR,
    CARD_DATA,
    ENGINES,
    HALF,
    MODELLED,
    NO_SOURCE,
    PAPER,
    PUBLISHED,
    SAID,
    V4_MODELS,
    V4_REPORT,
    V41_REPORT,
    WITH_ENGRAM,
    Claim,
    Judgement,
    Verdict,
    against,
    numbers_of,
    with_unit,
)
from workbench.cost import fit, kv_bytes, kv_bytes_per_token
from workbench.devices import Device, devices
from workbench.presets import Preset, presets

PAPER_PARAMETERS = {"Engram-27B": (26.7e9, 5.7e9), "Engram-40B": (39.5e9, 18.5e9)}  # all, of them Engram; published
SPEED_TEST_PARAMETERS = 8e9, 100e9  # of the model, and of the table added to it; published
SERVER_CARDS = 8
MOST_CARDS, MOST_TP = 128, 64


def without_engram(preset: Preset) -> Preset:
    """The same model with neither Engram layers nor tables."""
    weights = preset.weights and replace(preset.weights, host_bytes=0.0)
    return replace(preset, config=replace(preset.config, engram=None), weights=weights)  # type: ignore[arg-type,type-var]


def kv_bytes_engram_saves(length: int) -> int:
    """KV bytes of V4.1-Flash without Engram less those with it: below 0 by the ids a lookup looks back at."""
    preset = presets[WITH_ENGRAM]
    return kv_bytes(without_engram(preset), length)["total"] - kv_bytes(preset, length)["total"]


def freed_tokens(preset: Preset | str, storage: str = "released") -> float:
    """Tokens of KV cache, so stored, that fit into the bytes which moving a preset's Engram tables to the host frees."""
    preset = presets[preset] if isinstance(preset, str) else preset
    return preset.weights.host_bytes / kv_bytes_per_token(preset, storage)["total"] if preset.weights else 0.0


def _tables() -> tuple[float, float]:
    """Bytes of V4.1-Flash's weights that stay on the device, and of its Engram tables."""
    weights = presets[WITH_ENGRAM].weights
    assert weights is not None
    return weights.device_bytes, weights.host_bytes


def eighty_to_eight(length: int) -> Claim:
    stays, tables = _tables()
    kv = kv_bytes(WITH_ENGRAM, length)["total"]
    before, after = (kv_bytes(name, length)["total"] for name in (ANCESTOR, "v4-pro"))

    def judge(n: Mapping[str, float]) -> Judgement:
        claimed = n["said_before"] / n["said_after"]
        return Judgement(
            against(claimed, n["engram_factor"]),
            f"Moving all Engram tables of V4.1-Flash to the host divides what the device holds by {n['engram_factor']:.2f}, "
            f"not by {claimed:.3g}, and {_kv_change(n['kv_saved'])}; {n['attention_factor']:.1f} is what V4-Pro's attention "
            f"divides V3.2's KV cache by, and V4-Pro has no Engram.",
        )

    return Claim(
        "80 GB to 8 GB",
        "With Engram a task that needs 80 GB of accelerator memory needs 8 GB.",
        "Neither paper nor code says so. A factor near ten is published for the KV cache alone, from V3.2 to V4-Pro at a "
        "million tokens.",
        (NO_SOURCE, V4_REPORT),
        (
            *numbers_of(SAID, ("said_before", "before", 80e9, "B"), ("said_after", "after", 8e9, "B")),
            *numbers_of(
                MODELLED,
                ("engram_factor", "device bytes of V4.1-Flash before / after", (stays + tables + kv) / (stays + kv), "x"),
                ("kv_saved", "KV bytes that Engram saves", kv_bytes_engram_saves(length), "B"),
                ("attention_factor", f"KV bytes of V3.2 / V4-Pro at {length:,} tokens", before / after, "x"),
                ("kv_before", "KV cache of V3.2", before, "B"),
                ("kv_after", "KV cache of V4-Pro", after, "B"),
            ),
        ),
        judge,
    )


def _kv_change(saved: float) -> str:
    """What Engram does to the KV cache, in words."""
    if saved > 0:
        return f"saves {with_unit(saved, 'B')} of its KV cache"
    return f"adds {with_unit(-saved, 'B')} to its KV cache" if saved else "leaves its KV cache as it is"


def minus_ninety() -> Claim:
    stays, tables = _tables()
    shares = {name: engram / total for name, (total, engram) in PAPER_PARAMETERS.items()}
    test = SPEED_TEST_PARAMETERS[1] / sum(SPEED_TEST_PARAMETERS)

    def judge(n: Mapping[str, float]) -> Judgement:
        return Judgement(
            against(n["said"], n["v41"]),
            f"In V4.1-Flash {n['v41']:.0%} of the weight bytes may leave the device, in the paper's models {n['27b']:.0%} and "
            f"{n['40b']:.0%} of the parameters, and of the KV cache nothing.",
        )

    return Claim(
        "minus 90 %",
        "Engram lowers the demand for accelerator memory by 90 %.",
        f"Only the paper's speed test has such a share outside ({test:.0%}: 100B parameters beside an 8B model), and those "
        "parameters were added to the model, not taken out of it.",
        (PAPER, V41_REPORT),
        (
            *numbers_of(SAID, ("said", "less memory", 0.9, "%")),
            *numbers_of(PUBLISHED, ("v41", "Engram's share of V4.1-Flash's checkpoint bytes", tables / (stays + tables), "%")),
            *numbers_of(
                PUBLISHED,
                ("27b", "Engram's share of the parameters of Engram-27B", shares["Engram-27B"], "%"),
                ("40b", "the same of Engram-40B", shares["Engram-40B"], "%"),
            ),
        ),
        judge,
    )


def kv_overflow(length: int) -> Claim:
    _, tables = _tables()
    per_token = kv_bytes_per_token(WITH_ENGRAM)["total"]

    def judge(n: Mapping[str, float]) -> Judgement:
        fewer = n["kv_saved"] / n["kv"]
        verdict: Verdict = "supported" if fewer >= HALF else "partly" if n["freed_tokens"] > 0 else "not supported"
        return Judgement(
            verdict,
            f"Engram {_kv_change(n['kv_saved'])}, which is {with_unit(n['kv'], 'B')}; but the {with_unit(n['freed'], 'B')} "
            f"that its tables free would hold {n['freed_tokens'] / 1e6:,.0f} million more tokens of {n['per_token']:,.0f} B.",
        )

    return Claim(
        "no flood of KV cache",
        "Engram keeps accelerator memory from being swamped by the KV cache.",
        "Only indirectly: weight bytes that leave make room. The cache itself was made smaller by attention.",
        (V41_REPORT, ENGINES),
        numbers_of(
            MODELLED,
            ("kv", f"KV cache of V4.1-Flash at {length:,} tokens", kv_bytes(WITH_ENGRAM, length)["total"], "B"),
            ("kv_saved", "KV bytes that Engram saves", kv_bytes_engram_saves(length), "B"),
            ("freed", "bytes of its tables", tables, "B"),
            ("per_token", "KV bytes a token adds", per_token, "B"),
            ("freed_tokens", "tokens of KV cache in the bytes freed", freed_tokens(WITH_ENGRAM), "tokens"),
        ),
        judge,
    )


def cards_needed(preset: Preset | str, length: int, device: Device | str) -> int:
    """The smallest power of two of cards, up to 128, on which one sequence of ``length`` tokens fits; 0 if none does."""
    cards = 1
    while cards <= MOST_CARDS and not fit(preset, length, device, cards=cards, tp=min(cards, MOST_TP)).fits:
        cards *= 2
    return cards if cards <= MOST_CARDS else 0


def one_910b(length: int) -> Claim:
    card = devices["ascend-910b"]
    needed = {name: cards_needed(name, length, card) for name in V4_MODELS}
    weights = presets["v4-flash"].weights
    assert weights is not None
    cards = max(1, needed["v4-flash"])
    own, h100 = (fit("v4-flash", length, on, cards=cards, tp=min(cards, MOST_TP)).step.tokens_per_s for on in (card, "h100"))

    def judge(n: Mapping[str, float]) -> Judgement:
        verdict: Verdict = "supported" if n["flash"] == 1 else "partly" if 0 < n["flash"] <= SERVER_CARDS else "not supported"
        return Judgement(
            verdict,
            f"V4-Flash's weights alone are {with_unit(n['weights'], 'B')} against {with_unit(n['memory'], 'B')}, so it takes "
            f"{n['flash']:.0f} cards and V4-Pro {n['pro']:.0f}; as many H100 have a bound {n['h100'] / n['own']:.1f} times as "
            f"high on tokens per second.",
        )

    return Claim(
        "910B's 64 GB suffice",
        "The 64 GB of an Ascend 910B are enough.",
        "The 64 GB agree with public data. Whether they suffice depends on weights, of which Engram's tables are a part only "
        "in V4.1.",
        (CARD_DATA,),
        (
            *numbers_of(
                MODELLED,
                ("memory", "memory of a card", card.memory_bytes, "B"),
                ("weights", "weights of V4-Flash", weights.device_bytes, "B"),
                ("flash", f"cards for V4-Flash with one sequence of {length:,} tokens", needed["v4-flash"], "cards"),
                ("pro", "for V4-Pro", needed["v4-pro"], "cards"),
                ("own", "decoding one sequence on them, at most", own, "tokens/s"),
                ("h100", "on as many H100", h100, "tokens/s"),
            ),
        ),
        judge,
    )


def v4_adopts() -> Claim:
    def layers(name: str) -> int:
        engram = presets[name].config.engram  # type: ignore[union-attr]
        return len(engram.layer_ids) if engram else 0

    def judge(n: Mapping[str, float]) -> Judgement:
        has = [n["flash"] > 0, n["pro"] > 0]
        verdict: Verdict = "supported" if all(has) else "partly" if any(has) else "wrong for V4"
        return Judgement(
            verdict,
            f"V4-Flash has {n['flash']:.0f} Engram layers and V4-Pro {n['pro']:.0f}; V4.1-Flash, the next model, has "
            f"{n['v41']:.0f}.",
        )

    return Claim(
        "V4 will adopt Engram",
        "DeepSeek-V4 is likely to adopt Engram.",
        "V4 (24 April 2026) has none: CSA, HCA and mHC instead. V4.1-Flash (10 September 2026) is the first with Engram.",
        (V4_REPORT, V41_REPORT),
        numbers_of(
            PUBLISHED,
            ("flash", "Engram layers of V4-Flash", layers("v4-flash"), "layers"),
            ("pro", "of V4-Pro", layers("v4-pro"), "layers"),
            ("v41", "of V4.1-Flash", layers(WITH_ENGRAM), "layers"),
        ),
        judge,
    )
