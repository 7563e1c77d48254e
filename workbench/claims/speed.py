"""Claims about speed: what is hidden, what limits a step, what a stack of cards gives, what low precision costs.

Rates are upper bounds by formula; what the paper and engines measured is published; two things are measured here.
(reference/engram-and-overlap.md, sections 2, 3 and 6)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workbench.claims.record import (
    CARD_DATA,
    ENGINES,
    HALF,
    MEASURED,
    MODELLED,
    PAPER,
    PUBLISHED,
    SAID,
    SSD_PORT,
    V4_REPORT,
    V41_REPORT,
    WITH_ENGRAM,
    Claim,
    Judgement,
    Number,
    Verdict,
    numbers_of,
    with_unit,
)
from workbench.cost import Step, decode_flops, fit, kv_bytes
from workbench.devices import Device, devices
from workbench.presets import Preset, presets

H800_TOKENS_PER_S = {"Dense-4B": (9031.62, 8858.28), "Dense-8B": (6315.52, 6140.02)}  # alone; with 100B in host memory
SSD_TOKENS_PER_S = {"resident": 16.65, "prefetched": 16.47, "synchronous": 9.25}
LOOKED_UP_BY = {"Engram paper's harness": "CPU", "vLLM": "GPU", "SGLang": "GPU", "ROCm ATOM": "CPU", "Rapid-MLX": "CPU"}
PREFILL_TOKENS = 8192
STACK_CARDS = 16


def fully_masked(overlap: Any) -> Claim:
    lost = {name: 1 - slower / alone for name, (alone, slower) in H800_TOKENS_PER_S.items()}
    ssd, waiting = (1 - SSD_TOKENS_PER_S[how] / SSD_TOKENS_PER_S["resident"] for how in ("prefetched", "synchronous"))
    measured: tuple[Number, ...] = ()
    if overlap is not None:
        measured = numbers_of(
            MEASURED,
            ("hidden", "lookup hidden behind compute", overlap.hidden_fraction, "%"),
            ("exposed", "exposed as a stall", overlap.exposed_ms / 1e3, "s"),
        )

    def judge(n: Mapping[str, float]) -> Judgement:
        hidden = n.get("hidden")
        verdict: Verdict = "not supported"
        if n["lost_most"] < 0.005 and (hidden is None or hidden >= 0.99):
            verdict = "supported"
        elif n["lost_most"] < 0.05 and (hidden is None or hidden >= HALF):
            verdict = "partly"
        here = "nothing was measured here yet"
        if hidden is not None:
            here = f"here {max(0.0, hidden):.0%} of the lookup was hidden and {1e3 * n['exposed']:.2f} ms stayed exposed"
        published = f"The paper's own runs lose {n['lost_least']:.1%} to {n['lost_most']:.1%} of their throughput"
        return Judgement(verdict, f"{published}; {here}.")

    return Claim(
        "delay fully masked",
        "Fetching from host memory costs no time at all.",
        "Mostly hidden on one workload (H800, a table at the second block); an SSD hides almost as well if read ahead, and "
        f"costs {waiting:.0%} if not. Small batches at an early layer are not hidden by themselves.",
        (PAPER, SSD_PORT),
        (
            *numbers_of(
                PUBLISHED,
                ("lost_least", "throughput lost on an H800, least", min(lost.values()), "%"),
                ("lost_most", "most", max(lost.values()), "%"),
                ("ssd", "lost with rows on an SSD, read ahead", ssd, "%"),
                ("waiting", "the same, read when needed", waiting, "%"),
            ),
            *measured,
        ),
        judge,
    )


def tokens_per_s(preset: Preset | str, length: int, device: Device, cards: int, *, tables_on_device: bool) -> float:
    """Of the largest batch that fits, all cards together, one tensor-parallel group: an upper bound; 0 if nothing fits."""
    if tables_on_device:  # one memory for all is what a device with unified memory has
        device = replace(device, host_link=devices["dgx-spark"].host_link)
    rates = fit(preset, length, device, cards=cards, tp=cards).rates
    return max((step.tokens_per_s_per_card * step.cards for step in rates), default=0.0)


def geometric(length: int, device: Device, cards: int) -> Claim:
    kept = [slower / alone for alone, slower in H800_TOKENS_PER_S.values()]
    moved, resident = (tokens_per_s(WITH_ENGRAM, length, device, cards, tables_on_device=on) for on in (False, True))
    bound = moved / resident if resident else float("inf")

    def judge(n: Mapping[str, float]) -> Judgement:
        verdict: Verdict = "supported" if n["kept_best"] >= 2 else "partly" if n["kept_best"] > 1 else "not supported"
        more = f"at most ×{n['bound']:.2f} by formula" if n["bound"] < float("inf") else "whether the model fits at all"
        return Judgement(
            verdict,
            f"With a table in host memory the paper measured {n['kept_worst']:.1%} to {n['kept_best']:.1%} of the throughput "
            f"without; memory that tables leave allows larger batches, worth {more} on {cards} × {device.title}.",
        )

    return Claim(
        "throughput by multiples",
        "Output per second grows by multiples.",
        "Offloading costs a little against the same model without Engram. What grows is room for a larger batch, and quality "
        "at equal compute.",
        (PAPER, V41_REPORT),
        (
            *numbers_of(
                PUBLISHED,
                ("kept_worst", "throughput with 100B in host memory / without, worst", min(kept), "x"),
                ("kept_best", "best", max(kept), "x"),
            ),
            *numbers_of(
                MODELLED,
                ("bound", f"tokens/s at the largest batch, {length:,} tokens, tables moved / resident", bound, "x"),
                ("moved", "tables on the host", moved, "tokens/s"),
                ("resident", "tables on the device", resident, "tokens/s"),
            ),
        ),
        judge,
    )


def cpu_looks_up() -> Claim:
    by_cpu = [name for name, who in LOOKED_UP_BY.items() if who == "CPU"]
    by_gpu = [name for name, who in LOOKED_UP_BY.items() if who != "CPU"]

    def judge(n: Mapping[str, float]) -> Judgement:
        share = n["cpu"] / n["engines"]
        verdict: Verdict = "supported" if share == 1 else "partly" if share > 0 else "not supported"
        who = f"A CPU does it in {n['cpu']:.0f} of {n['engines']:.0f} implementations we know of"
        return Judgement(verdict, f"{who}; in the others a GPU kernel reads the host's memory itself.")

    return Claim(
        "CPU looks up, GPU computes",
        "The CPU does the dictionary lookups while the GPU computes, fully in parallel.",
        f"The idea holds: rows depend on token ids alone. Who looks up differs: CPU in {', '.join(by_cpu)}; GPU in "
        f"{', '.join(by_gpu)}.",
        (PAPER, ENGINES),
        numbers_of(
            PUBLISHED,
            ("cpu", "implementations in which a CPU gathers the rows", len(by_cpu), "implementations"),
            ("engines", "all we know of", len(LOOKED_UP_BY), "implementations"),
        ),
        judge,
    )


def before_the_next_word() -> Claim:
    preset = presets[WITH_ENGRAM]
    engram = preset.config.engram  # type: ignore[union-attr]
    assert engram is not None

    def judge(n: Mapping[str, float]) -> Judgement:
        verdict: Verdict = "supported" if n["youngest"] >= 1 else "partly" if n["first"] > 0 else "not supported"
        newest = "the newest token, so in decoding only when that is chosen"
        if n["youngest"] >= 1:
            newest = f"the token {n['youngest']:.0f} back, so before the newest is chosen"
        return Judgement(
            verdict,
            f"Every n-gram ends with {newest} the lookup can begin, and then {n['first']:.0f} of {n['layers']:.0f} layers run "
            f"before the first Engram layer, {n['last']:.0f} before the last.",
        )

    return Claim(
        "ready before the next word",
        "When the GPU comes to the next word, the CPU has its knowledge ready.",
        "Within a step only the layers before an Engram layer can hide its lookup. A prompt's later chunks are known in "
        "advance.",
        (PAPER, V41_REPORT),
        numbers_of(
            PUBLISHED,
            ("youngest", "youngest token of an n-gram, places back", 0, "places"),
            ("first", "layers of V4.1-Flash before its first Engram layer", min(engram.layer_ids), "layers"),
            ("last", "before its last", max(engram.layer_ids), "layers"),
            ("layers", "in all", preset.config.num_hidden_layers, "layers"),
        ),
        judge,
    )


def memory_bound(length: int, device: Device, cards: int) -> Claim:
    found = fit("v4-flash", length, device, cards=cards, tp=cards)
    weights = presets["v4-flash"].weights
    assert weights is not None
    fast = "fp8" in device.tflop_per_s
    rate = device.tflop_per_s["fp8" if fast else "bf16"] * 1e12
    flops = PREFILL_TOKENS * decode_flops("v4-flash", PREFILL_TOKENS // 2, "fp8-equivalent" if fast else "plain")["total"]
    prefill = (weights.device_bytes / device.bandwidth_bytes_per_s) / (flops / rate)
    largest = found.rates[-1] if found.rates else found.step

    def judge(n: Mapping[str, float]) -> Judgement:
        bound = [n["one"] > 1, n["many"] > 1, n["prefill"] > 1]
        verdict: Verdict = "supported" if all(bound) else "partly" if any(bound) else "not supported"
        return Judgement(
            verdict,
            f"Reading takes {n['one']:.3g} times as long as computing when one sequence is decoded, {n['many']:.3g} times "
            f"with {n['sequences']:,.0f} sequences, and {n['prefill']:.2g} times in a prefill of {PREFILL_TOKENS:,} tokens; "
            f"below 1, FLOPs are the limit.",
        )

    return Claim(
        "memory, not FLOPS",
        "Memory is the bottleneck, computing power is not.",
        "True of decoding at moderate batches. Prefill and training are bound by computing.",
        (V4_REPORT, CARD_DATA),
        numbers_of(
            MODELLED,
            ("one", f"V4-Flash on {cards} × {device.title}: seconds reading / computing, 1 sequence", _ratio(found.step), "x"),
            ("many", "the same with the largest batch that fits", _ratio(largest), "x"),
            ("sequences", "largest batch", largest.sequences, "sequences"),
            ("prefill", f"the same for a prefill of {PREFILL_TOKENS:,} tokens", prefill, "x"),
        ),
        judge,
    )


def _ratio(step: Step) -> float:
    return step.read_s / step.compute_s


def fp8_is_free(storage: Mapping[str, Any] | None) -> Claim:
    wide = kv_bytes("v4-flash", 1_048_576, "bf16")["total"] / kv_bytes("v4-flash", 1_048_576)["total"]
    without = [name for name in ("ascend-910b", "ascend-910c") if "fp8" not in devices[name].kv_formats]
    numbers = numbers_of(MODELLED, ("wide", "KV cache of V4-Flash in BF16 / as released", wide, "x"))
    if storage is not None:
        kept = storage["storage"]
        numbers += numbers_of(
            MEASURED,
            ("loss", "change of loss per token", storage["loss"][kept] - storage["loss"]["fp32"], "nats"),
            ("kl", "KL from fp32, per token", storage["kl"], "nats"),
            ("changed", "likeliest next tokens that change", storage["changed"], "%"),
            ("recall_lost", "needles no longer found", storage["recall"]["fp32"] - storage["recall"][kept], "%"),
        )

    def judge(n: Mapping[str, float]) -> Judgement:
        verdict: Verdict = "not supported"
        if n["kl"] < 1e-4 and abs(n["loss"]) < 1e-4 and n["recall_lost"] <= 0:
            verdict = "supported"
        elif n["loss"] <= 0.02 and n["recall_lost"] <= 0.02:
            verdict = "partly"
        return Judgement(
            verdict,
            f"In our toy a cache as released changes the loss by {n['loss']:+.4f} nats per token, loses "
            f"{n['recall_lost']:.1%} of the needles and changes {n['changed']:.1%} of the likeliest next tokens; training in "
            f"FP8 is not tested here.",
        )

    return Claim(
        "FP8 costs nothing",
        "Low precision loses nothing.",
        "V4 and V4.1 were trained for their low-precision caches. A card that reads no FP8 "
        f"({', '.join(devices[name].title for name in without)}) keeps the cache in BF16, ×{wide:.2f} the bytes.",
        (V4_REPORT, CARD_DATA),
        numbers,
        judge,
        "" if storage is not None else "pass storage=wb.storage_cost(model)",
    )


def stacking(length: int) -> Claim:
    card, fewer, more = devices["ascend-910b"], STACK_CARDS, 2 * STACK_CARDS
    few, many = (fit("v4-flash", length, card, cards=cards, tp=cards) for cards in (fewer, more))

    def judge(n: Mapping[str, float]) -> Judgement:
        verdict: Verdict = "supported" if n["speed"] >= 1.9 else "partly" if n["speed"] >= 1.1 else "not supported"
        return Judgement(
            verdict,
            f"From {n['fewer']:.0f} to {n['more']:.0f} cards V4-Flash decodes at most {n['speed']:.2f} times as fast and "
            f"holds {n['room']:.2f} times as many sequences, because a single KV head does not split; links between cards, "
            f"not counted, cost more.",
        )

    return Claim(
        "just stack weaker cards",
        "More cards of a weaker kind make up for stronger ones.",
        "Weights and experts split over cards; V4's one KV head per layer does not, and traffic between cards grows.",
        (V4_REPORT, CARD_DATA),
        numbers_of(
            MODELLED,
            ("fewer", f"{card.title}, one tensor-parallel group", fewer, "cards"),
            ("more", "and twice as many", more, "cards"),
            ("speed", "decoding speed of one sequence, no communication counted", few.step.seconds / many.step.seconds, "x"),
            ("room", "sequences that fit", (many.most_sequences or 0) / (few.most_sequences or 1), "x"),
        ),
        judge,
    )


def rubin() -> Claim:
    said, now = devices["rubin-article"], devices["rubin-2026"]

    def judge(n: Mapping[str, float]) -> Judgement:
        ratio = n["said"] / n["now"]
        verdict: Verdict = (
            "supported" if 0.95 <= ratio <= 1.05 else "partly" if n["announced"] == n["said"] else "not supported"
        )
        return Judgement(
            verdict,
            f"{n['announced'] / 1e12:.0f} TB/s was announced in 2025, {n['now'] / 1e12:.0f} TB/s is the figure of 2026, "
            f"×{n['now'] / n['said']:.2f}; the {with_unit(n['memory'], 'B')} are right.",
        )

    return Claim(
        "Rubin's 13 TB/s",
        "Nvidia's Rubin has 288 GB and 13 TB/s.",
        "The bandwidth is that of the first announcement; later material says more.",
        (said.source_of("bandwidth_bytes_per_s"), now.source_of("bandwidth_bytes_per_s")),
        (
            *numbers_of(SAID, ("said", "bandwidth", 13e12, "B/s")),
            *numbers_of(
                PUBLISHED,
                ("announced", "announced in 2025", said.bandwidth_bytes_per_s, "B/s"),
                ("now", "material of 2026", now.bandwidth_bytes_per_s, "B/s"),
                ("memory", "memory", now.memory_bytes, "B"),
            ),
        ),
        judge,
    )
