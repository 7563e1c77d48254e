"""Claims: every verdict follows from its numbers, and every number from presets, formulas, published figures or a run."""

from __future__ import annotations

import math
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

import workbench as wb
from workbench.claims import VERDICTS, article_claims, memory, speed
from workbench.claims.record import Claim, Judgement, numbers_of, with_unit
from workbench.cost import fit, kv_bytes, kv_bytes_per_token
from workbench.devices import devices
from workbench.errors import InputError
from workbench.figures.claims import MARKS, METERED, WEIGHT_PARTS, claims_html, freed_html, memory_meters
from workbench.presets import presets
from workbench.sources import Source
from workbench.widgets.claims import ClaimsTable, MemoryMeters

MILLION = 1_048_576
OVERLAP = SimpleNamespace(hidden_fraction=0.96, exposed_ms=0.4)
STORAGE = {
    "storage": "released",
    "loss": {"fp32": 3.5, "released": 3.5004},
    "recall": {"fp32": 1.0, "released": 0.995},
    "kl": 2e-3,
    "changed": 0.026,
}
VERDICT_NOW = {
    "80 GB to 8 GB": "not supported",
    "minus 90 %": "not supported",
    "delay fully masked": "partly",
    "throughput by multiples": "not supported",
    "CPU looks up, GPU computes": "partly",
    "ready before the next word": "partly",
    "no flood of KV cache": "partly",
    "memory, not FLOPS": "partly",
    "FP8 costs nothing": "partly",
    "910B's 64 GB suffice": "partly",
    "just stack weaker cards": "partly",
    "V4 will adopt Engram": "wrong for V4",
    "Rubin's 13 TB/s": "partly",
}
# What each verdict would be if its numbers were others: key, numbers changed, verdict.
FLIPS = (
    ("80 GB to 8 GB", {"engram_factor": 9.5}, "supported"),
    ("80 GB to 8 GB", {"engram_factor": 5.5}, "partly"),
    ("80 GB to 8 GB", {"said_after": 50e9}, "supported"),
    ("minus 90 %", {"v41": 0.88}, "supported"),
    ("minus 90 %", {"v41": 0.5}, "partly"),
    ("delay fully masked", {"lost_most": 0.001, "hidden": 0.995}, "supported"),
    ("delay fully masked", {"hidden": 0.2}, "not supported"),
    ("delay fully masked", {"lost_most": 0.3}, "not supported"),
    ("throughput by multiples", {"kept_best": 2.5}, "supported"),
    ("throughput by multiples", {"kept_best": 1.2}, "partly"),
    ("CPU looks up, GPU computes", {"cpu": 5}, "supported"),
    ("CPU looks up, GPU computes", {"cpu": 0}, "not supported"),
    ("ready before the next word", {"youngest": 1}, "supported"),
    ("ready before the next word", {"first": 0}, "not supported"),
    ("no flood of KV cache", {"kv_saved": 700e6}, "supported"),
    ("no flood of KV cache", {"freed_tokens": 0}, "not supported"),
    ("memory, not FLOPS", {"prefill": 1.5}, "supported"),
    ("memory, not FLOPS", {"one": 0.5, "many": 0.1}, "not supported"),
    ("FP8 costs nothing", {"kl": 0, "loss": 0, "recall_lost": 0}, "supported"),
    ("FP8 costs nothing", {"loss": 0.3}, "not supported"),
    ("FP8 costs nothing", {"recall_lost": 0.2}, "not supported"),
    ("910B's 64 GB suffice", {"flash": 1}, "supported"),
    ("910B's 64 GB suffice", {"flash": 16}, "not supported"),
    ("910B's 64 GB suffice", {"flash": 0}, "not supported"),
    ("just stack weaker cards", {"speed": 1.95}, "supported"),
    ("just stack weaker cards", {"speed": 1.0}, "not supported"),
    ("V4 will adopt Engram", {"flash": 2, "pro": 2}, "supported"),
    ("V4 will adopt Engram", {"pro": 1}, "partly"),
    ("Rubin's 13 TB/s", {"now": 13e12}, "supported"),
    ("Rubin's 13 TB/s", {"announced": 8e12}, "not supported"),
)


@pytest.fixture(scope="module")
def claims() -> dict[str, Claim]:
    return {claim.key: claim for claim in article_claims(overlap=OVERLAP, storage=STORAGE)}


def value(claim: Claim, key: str) -> float:
    return next(number.value for number in claim.numbers if number.key == key)


def test_the_verdicts_of_today(claims):
    assert {key: claim.verdict for key, claim in claims.items()} == VERDICT_NOW
    assert set(VERDICT_NOW.values()) < set(VERDICTS) and set(MARKS) == set(VERDICTS)


@pytest.mark.parametrize(("key", "numbers", "verdict"), FLIPS, ids=lambda part: str(part))
def test_other_numbers_give_another_verdict_and_another_reason(claims, key, numbers, verdict):
    claim = claims[key]
    other = claim.given(**numbers)
    assert other.verdict == verdict != claim.verdict
    assert other.reason != claim.reason and other.reason.endswith(".") and claim.reason.endswith(".")
    assert claims[key].verdict == VERDICT_NOW[key]


def test_every_claim_has_a_flip():
    assert {key for key, *_ in FLIPS} == set(VERDICT_NOW)


def test_every_claim_names_sources_origins_and_an_honest_article(claims):
    for claim in claims.values():
        assert claim.said and claim.found and claim.sources and claim.numbers
        assert all(source.text and source.certainty for source in claim.sources)
        assert all(math.isfinite(number.value) and number.what and number.unit for number in claim.numbers)
        keys = [number.key for number in claim.numbers]
        assert len(keys) == len(set(keys))
    with pytest.raises(InputError, match=r"got \['nothing'\]"):
        claims["minus 90 %"].given(nothing=1)


def test_without_measurements_what_rests_on_them_cannot_be_tested_or_is_left_out():
    bare = {claim.key: claim for claim in article_claims()}
    assert (
        bare["FP8 costs nothing"].verdict == "cannot be tested here" and "wb.storage_cost" in bare["FP8 costs nothing"].reason
    )
    masked = bare["delay fully masked"]
    assert masked.verdict == "partly" and "nothing was measured here" in masked.reason
    assert not any(number.origin == "measured here" for claim in bare.values() for number in claim.numbers)


def test_measured_numbers_are_those_given(claims):
    masked, fp8 = claims["delay fully masked"], claims["FP8 costs nothing"]
    assert (value(masked, "hidden"), value(masked, "exposed")) == (0.96, pytest.approx(0.4e-3))
    assert "96% of the lookup was hidden and 0.40 ms stayed exposed" in masked.reason
    assert value(fp8, "loss") == pytest.approx(4e-4) and value(fp8, "recall_lost") == pytest.approx(0.005)
    assert "+0.0004 nats" in fp8.reason and "2.6%" in fp8.reason
    worse = article_claims(overlap=SimpleNamespace(hidden_fraction=-0.3, exposed_ms=9.0))[2]
    assert worse.verdict == "not supported" and "0% of the lookup was hidden and 9.00 ms" in worse.reason


def test_modelled_numbers_are_those_of_the_formulas(claims):
    first = claims["80 GB to 8 GB"]
    v32, pro = (kv_bytes(name, MILLION)["total"] for name in ("v3.2", "v4-pro"))
    assert value(first, "attention_factor") == pytest.approx(v32 / pro) == pytest.approx(9.55, abs=0.02)
    weights, kv = presets["v4.1-flash"].weights, kv_bytes("v4.1-flash", MILLION)["total"]
    everything = weights.device_bytes + weights.host_bytes + kv
    assert value(first, "engram_factor") == pytest.approx(everything / (everything - weights.host_bytes))
    assert value(claims["minus 90 %"], "v41") == pytest.approx(203 / 510)
    flood = claims["no flood of KV cache"]
    assert value(flood, "freed_tokens") == pytest.approx(203e9 / 890) and value(flood, "per_token") == 890
    assert [value(claims["delay fully masked"], key) for key in ("lost_least", "lost_most")] == [
        pytest.approx(0.0192, abs=1e-4),
        pytest.approx(0.0278, abs=1e-4),
    ]
    assert value(claims["V4 will adopt Engram"], "v41") == 2


def test_engram_leaves_the_kv_cache_but_for_the_ids_it_looks_back_at():
    for length in (0, 1, 5, 1000, MILLION):
        assert memory.kv_bytes_engram_saves(length) == -8 * min(length, 3)
    preset = presets["v4.1-flash"]
    bare = memory.without_engram(preset)
    assert (
        bare.config.engram is None and bare.weights.host_bytes == 0 and bare.weights.device_bytes == preset.weights.device_bytes
    )
    assert preset.config.engram is not None and kv_bytes_per_token(bare) == kv_bytes_per_token(preset)


def test_cards_needed_is_the_fewest_that_fit():
    for name, device in (("v4-flash", "ascend-910b"), ("v4-pro", "h100"), ("v4.1-flash", "b200")):
        cards = memory.cards_needed(name, 131_072, device)
        assert fit(name, 131_072, device, cards=cards, tp=cards).fits
        assert cards == 1 or not fit(name, 131_072, device, cards=cards // 2, tp=cards // 2).fits
    tiny = replace(devices["h100"], memory_bytes=1e9)
    assert memory.cards_needed("v4-pro", 131_072, tiny) == 0


def test_tables_on_the_device_take_room_for_sequences():
    card = devices["h200"]
    apart, resident = (speed.tokens_per_s("v4.1-flash", 131_072, card, 8, tables_on_device=on) for on in (False, True))
    assert apart > resident > 0
    found = fit("v4.1-flash", 131_072, card, cards=8, tp=8)
    assert apart == pytest.approx(max(step.tokens_per_s_per_card for step in found.rates) * 8)
    assert speed.tokens_per_s("v4-pro", 131_072, replace(card, memory_bytes=1e9), 8, tables_on_device=False) == 0


def test_other_devices_and_lengths_are_counted_anew():
    short = {claim.key: claim for claim in article_claims(length=8192, device="h100", cards=8)}
    assert "8 × H100" in short["throughput by multiples"].reason
    assert value(short["no flood of KV cache"], "kv") == kv_bytes("v4.1-flash", 8192)["total"]
    for wrong in ({"length": -1}, {"device": "abacus"}, {"cards": 0}):
        with pytest.raises(InputError):
            article_claims(**wrong)


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (50.4e9, "B", "50.4 GB"), (13e12, "B/s", "13 TB/s"), (24, "B", "24 B"), (-24, "B", "-24 B"), (9.546, "x", "×9.55"),
        (0.398, "%", "39.8 %"), (0.00043, "nats", "0.00043 nats"), (4e-4, "s", "0.4 ms"), (1, "cards", "1 card"),
        (4, "cards", "4 cards"), (3866.5, "tokens/s", "3,866 tokens/s"),
    ],
)  # fmt: skip
def test_numbers_are_written_with_their_unit(number, unit, text):
    assert with_unit(number, unit) == text


class Cells(HTMLParser):
    """Tags seen, and the text of the cells of each row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_table_has_a_row_for_each_claim_with_verdict_and_reason(claims):
    page = Cells(ClaimsTable(list(claims.values())).value)
    assert len(page.rows) == 1 + len(claims)
    for row, claim in zip(page.rows[1:], claims.values(), strict=True):
        assert claim.said in row[0] and row[1][2:] == claim.verdict and claim.reason in row[2] and claim.found in row[3]
        assert all(number.text in row[2] and f"[{number.origin}]" in row[2] for number in claim.numbers)
        assert all(source.text in row[3] for source in claim.sources)
    assert page.rows[0][1] == "verdict"
    with pytest.raises(InputError, match="at least one claim"):
        claims_html([])


def test_the_table_escapes_everything():
    nasty = "<script>alert(1)</script>"
    numbers = numbers_of("published", ("n", nasty, 3, nasty))
    claim = Claim(nasty, nasty, nasty, (Source(nasty, "published"),), numbers, lambda n: Judgement("partly", nasty))
    page = claims_html([claim])
    assert "<script" not in page and page.count("&lt;script&gt;") == 7


def bars(figure, axis):
    return {bar.name: list(bar.x) for bar in figure.data if bar.type == "bar" and (bar.xaxis or "x") == axis}


@pytest.mark.parametrize("length", [4096, MILLION])
def test_offloading_moves_the_engram_bar_and_leaves_kv_and_the_other_weights(length):
    there, here = (memory_meters(length, offloaded=on) for on in (True, False))
    assert bars(there, "x") == bars(here, "x")
    tables = bars(there, "x3")["Engram tables"]
    assert bars(there, "x3").keys() == {"Engram tables"} and bars(here, "x3") == {}
    assert bars(here, "x2").pop("Engram tables") == tables == [0, 0, 0, 203]
    assert {k: v for k, v in bars(here, "x2").items() if k != "Engram tables"} == bars(there, "x2")
    assert [there.layout[axis].range for axis in ("xaxis", "xaxis2", "xaxis3")] == [
        here.layout[axis].range for axis in ("xaxis", "xaxis2", "xaxis3")
    ]
    for i, name in enumerate(METERED):
        held = sum(sizes[i] for sizes in bars(there, "x").values())
        assert held == pytest.approx(kv_bytes(name, length)["total"] / 1e9)
        weights = presets[name].weights
        assert sum(sizes[i] for sizes in bars(there, "x2").values()) == pytest.approx(weights.device_bytes / 1e9)
    assert set(bars(here, "x2")) == set(WEIGHT_PARTS)
    assert "modelled" in here.layout.title.text and "published" in here.layout.title.text


def test_what_cannot_be_metered_is_one_clear_error():
    for call, message in (
        (lambda: memory_meters(4096, names=["gqa-8"]), "nobody released"),
        (lambda: memory_meters(-1), "length must be"),
        (lambda: memory_meters(4096, names=[]), "at least one preset"),
        (lambda: memory_meters(4096, storage="fp7"), "storage must be"),
        (lambda: freed_html(-1.0, "v4-pro"), "from 0 on"),
        (lambda: freed_html(float("nan"), "v4-pro"), "from 0 on"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_the_meters_follow_their_controls_and_the_calculator_counts():
    meters = MemoryMeters()
    before = meters.figure.to_json()
    meters.offloaded.value = False
    assert meters.figure.to_json() != before and "on the device" in meters.figure.layout.title.text
    meters.length.value = 8192
    assert "8,192 tokens" in meters.figure.layout.title.text
    assert meters.freed.value == 203 and "228,089,888 more tokens" in meters.worth.value
    meters.model.value, meters.storage.value, meters.freed.value = "v3.2", "bf16", 10
    tokens = 10e9 / kv_bytes_per_token("v3.2", "bf16")["total"]
    assert f"{tokens:,.0f} more tokens" in meters.worth.value
    meters.freed.value = -3
    assert "from 0 on" in meters.worth.value
    assert MemoryMeters(5000).length.value == 5000


def test_public_names_lead_here():
    assert wb.article_claims is article_claims and wb.ClaimsTable is ClaimsTable and wb.memory_meters is memory_meters
