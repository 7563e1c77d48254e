"""The exercises of the notebook on the frontier: what ratio and top-k do to bytes held and read, at true size."""

from __future__ import annotations

from dataclasses import replace

from workbench import cost
from workbench.config import HybridConfig
from workbench.exercises.record import Exercise, Mistake
from workbench.presets import presets

MILLION = 2**20  # tokens, "1M" in the reports


def _flash() -> HybridConfig:
    config = presets["v4-flash"].config
    assert isinstance(config, HybridConfig)
    return config


def _coarser() -> HybridConfig:
    return replace(_flash(), csa_ratio=2 * _flash().csa_ratio)


def _ratio() -> float:
    return cost.kv_bytes(_coarser(), MILLION)["total"] / cost.kv_bytes(_flash(), MILLION)["total"]


def _ratio_mistakes() -> tuple[Mistake, ...]:
    before, after = cost.kv_bytes(_flash(), MILLION), cost.kv_bytes(_coarser(), MILLION)
    read = cost.decode_bytes(_coarser(), MILLION)["total"] / cost.decode_bytes(_flash(), MILLION)["total"]
    entries, keys = (before["total"] - before[part] + after[part] for part in ("compressed", "index"))
    return (
        Mistake(0.5, "Nearly, but only CSA layers change. Windows and the entries of HCA layers stay as they are."),
        Mistake(read, "That is what one token reads; the question is what is held."),
        Mistake(entries / before["total"], "Every entry has an index key. With fewer entries there are fewer keys, too."),
        Mistake(keys / before["total"], "Those are the index keys alone. There are fewer entries as well."),
    )


def _topk() -> float:
    config = _flash()
    return config.layer_kinds.count("csa") * config.index_topk * cost.entry_bytes(config)


def _topk_mistakes() -> tuple[Mistake, ...]:
    config = _flash()
    entry, layers = cost.entry_bytes(config), config.layer_kinds.count("csa")
    key = cost.index_key_bytes(config)
    return (
        Mistake(config.index_topk * entry, "That is one layer. Every CSA layer keeps entries of its own."),
        Mistake(len(config.layer_kinds) * config.index_topk * entry, "Only CSA layers choose; HCA layers read all they have."),
        Mistake(layers * config.index_topk * (entry + key), "The index keys are all read anyway, or nothing could be chosen."),
        Mistake(2 * layers * config.index_topk * entry, "That is all that is kept then; the question is how much more it is."),
    )


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="twice the ratio",
        notebook=11,
        question="V4-Flash, as released, at 2**20 tokens: if its CSA layers made an entry of twice as many tokens, which share"
        " of the bytes it holds would be left?",
        unit="share",
        solve=_ratio,
        mistakes=_ratio_mistakes,
        general="Count what is held with both ratios, part by part, and divide the sums.",
    ),
    Exercise(
        name="twice the top-k",
        notebook=11,
        question="V4-Flash, as released, at 2**20 tokens: if its CSA layers kept twice as many entries, how many bytes more"
        " would one decoded token read?",
        unit="bytes",
        solve=_topk,
        mistakes=_topk_mistakes,
        general="Multiply the layers that choose, the entries each keeps more, and the bytes of an entry.",
    ),
)
