"""Exercises on how an indexer chooses and what compressing keeps; every number is computed when asked for."""

from __future__ import annotations

import math
from dataclasses import replace

from workbench import cost
from workbench.config import HybridConfig, LatentConfig
from workbench.exercises.record import Exercise, Mistake
from workbench.presets import presets

MILLION = 2**20  # tokens, "1M" in the reports
SEEN_TOKEN, READ_TOKEN, ENTRY = 100_000, 1000, 250
SINK_LOGIT, ROWS = 1.0, 3  # a head of rows that all have logit 0


def _v4(name: str) -> HybridConfig:
    config = presets[name].config
    assert isinstance(config, HybridConfig)
    return config


def _keys() -> int:
    config = _v4("v4-pro")
    return config.layer_kinds.count("csa") * (MILLION // config.csa_ratio)


def _keys_mistakes() -> tuple[Mistake, ...]:
    config, one = _v4("v4-pro"), MILLION // _v4("v4-pro").csa_ratio
    csa, flash = config.layer_kinds.count("csa"), _v4("v4-flash").layer_kinds.count("csa")
    return (
        Mistake(one, "That is one layer. Every CSA layer has an indexer with keys of its own."),
        Mistake(config.num_hidden_layers * one, "That counts every layer. Only CSA layers choose; HCA layers have no indexer."),
        Mistake(csa * MILLION, "That is a key for every token. In V4 a key stands for a block of tokens."),
        Mistake(csa * config.index_topk, "Those are the kept entries. To find them, all keys must be read."),
        Mistake(flash * one, "That is V4-Flash, which has fewer CSA layers."),
    )


def _seen() -> int:
    return (SEEN_TOKEN + 1) // _v4("v4-flash").csa_ratio


def _left_out() -> int:
    return _seen() - _v4("v4-flash").index_topk


def _left_out_mistakes() -> tuple[Mistake, ...]:
    config, seen = _v4("v4-flash"), _seen()
    return (
        Mistake(seen, "That many are visible. Some of them are kept."),
        Mistake(config.index_topk, "That many are kept. The question is about all the others."),
        Mistake(SEEN_TOKEN + 1 - config.index_topk, "You counted tokens. A CSA entry stands for several."),
        Mistake(seen - _v4("v4-pro").index_topk, "That is V4-Pro's top-k; V4-Flash keeps fewer."),
        Mistake(
            (SEEN_TOKEN + 1) // config.hca_ratio, "Those are HCA's entries, none of which is left out: HCA does not choose."
        ),
    )


def _first_choice() -> int:
    config = _v4("v4-flash")
    return (config.index_topk + 1) * config.csa_ratio - 1


def _first_choice_mistakes() -> tuple[Mistake, ...]:
    config, pro = _v4("v4-flash"), _v4("v4-pro")
    m, k = config.csa_ratio, config.index_topk
    return (
        Mistake(k * m - 1, "There are just as many entries then as may be kept: none is left out yet."),
        Mistake(k, "That counts tokens as entries; a CSA entry takes several tokens."),
        Mistake(k + config.sliding_window, "Window and top-k do not share their places: each entry takes several tokens."),
        Mistake((pro.index_topk + 1) * m - 1, "That is V4-Pro, which keeps more entries."),
        Mistake((k + 1) * m + config.sliding_window - 1, "Tokens of the window are in entries as well: do not wait for them."),
    )


def _indexer_share(name: str, length: int = MILLION) -> float:
    work = cost.decode_flops(name, length)
    return work["indexer"] / work["total"]


def _indexer_mistakes() -> tuple[Mistake, ...]:
    work, read = cost.decode_flops("v4-pro", MILLION), cost.decode_bytes("v4-pro", MILLION)
    attention = work["indexer"] + work["core"]
    return (
        Mistake(read["index"] / read["total"], "That is its share of the bytes read; the question is about FLOPs."),
        Mistake(_indexer_share("v3.2"), "That is V3.2, which scores every token in every layer."),
        Mistake(_indexer_share("v4-flash"), "That is V4-Flash; the question is about V4-Pro."),
        Mistake(work["core"] / work["total"], "That is attention itself, which reads what the indexer chose."),
        Mistake(work["indexer"] / attention, "The projections, all weights that a token meets, belong to the whole as well."),
    )


def _without_choice() -> float:
    """How many times more FLOPs attention itself takes if every CSA entry is attended to instead of the kept ones."""
    config = _v4("v4-pro")
    everything = cost.decode_flops(replace(config, index_topk=MILLION), MILLION)["core"]
    return everything / cost.decode_flops(config, MILLION)["core"]


def _without_choice_mistakes() -> tuple[Mistake, ...]:
    config = _v4("v4-pro")
    every = cost.decode_flops(replace(config, index_topk=MILLION), MILLION)["core"]
    own = cost.decode_flops(config, MILLION)
    v32 = presets["v3.2"].config
    assert isinstance(v32, LatentConfig)
    return (
        Mistake(
            MILLION // config.csa_ratio / config.index_topk,
            "That is how many times more entries a CSA layer reads. Windows and HCA layers are part of attention, too.",
        ),
        Mistake(every / (own["core"] + own["indexer"]), "That counts the indexer's own work, too. The question leaves it out."),
        Mistake(MILLION / config.index_topk, "That takes every token for an entry, and CSA for all there is."),
        Mistake(MILLION / v32.index_topk, "That is V3.2, where an entry is a token."),
    )


def _last_reader() -> int:
    return READ_TOKEN // _v4("v4-flash").csa_ratio + 1


def _last_reader_mistakes() -> tuple[Mistake, ...]:
    config = _v4("v4-flash")
    return (
        Mistake(
            READ_TOKEN // config.csa_ratio, "That is the entry of its own block. In CSA another one reads this block, too."
        ),
        Mistake(
            READ_TOKEN // config.csa_ratio - 1, "Blocks overlap backwards: it is a later entry that reads an earlier block."
        ),
        Mistake(READ_TOKEN // config.hca_ratio, "That is HCA. CSA's blocks are shorter."),
        Mistake(READ_TOKEN, "That numbers tokens. An entry stands for several."),
        Mistake(
            (READ_TOKEN + config.sliding_window) // config.csa_ratio, "The window plays no part in which entry reads a token."
        ),
    )


def _weights() -> int:
    config = _v4("v4-flash")
    return 2 * config.csa_ratio * config.head_dim


def _weights_mistakes() -> tuple[Mistake, ...]:
    config = _v4("v4-flash")
    return (
        Mistake(2 * config.csa_ratio, "That is one weight a token. Every channel has weights of its own."),
        Mistake(config.csa_ratio * config.head_dim, "An entry reads the block before its own, too."),
        Mistake(config.head_dim, "That is how many channels the entry has; each is a weighted sum over several tokens."),
        Mistake(config.hca_ratio * config.head_dim, "That is an HCA entry."),
        Mistake(2 * config.csa_ratio * config.index_head_dim, "That is an index key, which has fewer channels than an entry."),
    )


def _position() -> int:
    return ENTRY * _v4("v4-flash").csa_ratio


def _position_mistakes() -> tuple[Mistake, ...]:
    m, heavy = _v4("v4-flash").csa_ratio, _v4("v4-flash").hca_ratio
    return (
        Mistake(ENTRY, "That is the entry's number. Positions count tokens."),
        Mistake(ENTRY * m + m - 1, "That is the last token of its block; the entry is turned as the first one."),
        Mistake((ENTRY - 1) * m, "That is the first token it reads. It is turned by the first of its own block."),
        Mistake(ENTRY * heavy, "That is an HCA entry of the same number."),
        Mistake(ENTRY * m / 2, "Blocks overlap, but a new one begins after every few tokens as before."),
    )


def _sink() -> float:
    return math.exp(SINK_LOGIT) / (ROWS + math.exp(SINK_LOGIT))


def _sink_mistakes() -> tuple[Mistake, ...]:
    e = math.exp(SINK_LOGIT)
    return (
        Mistake(1 / (ROWS + 1), "That takes the sink's logit for 0, like the others."),
        Mistake(e / ROWS, "The sink belongs to the denominator as well."),
        Mistake(SINK_LOGIT / (ROWS + SINK_LOGIT + 1), "Logits are exponentiated before they are divided."),
        Mistake(1 / (1 + e), "That is one row beside the sink."),
        Mistake(e / (1 + e), "There are several rows beside the sink, not one."),
    )


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="index keys of a token",
        notebook=2,
        question=f"V4-Pro decodes one token in a context of {MILLION:,}. How many index keys does it read, in all layers"
        " together?",
        unit="keys",
        solve=_keys,
        mistakes=_keys_mistakes,
        general="Count the layers that choose, and the entries each of them has for that many tokens.",
    ),
    Exercise(
        name="entries left out",
        notebook=2,
        question=f"V4-Flash, one CSA layer: how many visible entries does the query of token number {SEEN_TOKEN:,} not attend"
        " to?",
        unit="entries",
        solve=_left_out,
        mistakes=_left_out_mistakes,
        general="How many blocks are complete at that token, and how many of their entries may be kept?",
    ),
    Exercise(
        name="first real choice",
        notebook=2,
        question="V4-Flash, a CSA layer: what is the number of the first token whose query must leave an entry out?",
        unit="token number",
        solve=_first_choice,
        mistakes=_first_choice_mistakes,
        general="One entry more than may be kept must be complete. Which token completes it?",
    ),
    Exercise(
        name="share of choosing",
        notebook=2,
        question=f"V4-Pro decodes one token in a context of {MILLION:,}. Which share of its FLOPs is the indexer's?",
        unit="share",
        solve=lambda: _indexer_share("v4-pro"),
        mistakes=_indexer_mistakes,
        general="Take the indexer's FLOPs and divide by all: projections, attention itself and indexer. No format weighs more.",
    ),
    Exercise(
        name="without choosing",
        notebook=2,
        question=f"V4-Pro at {MILLION:,} tokens: how many times more FLOPs would attention itself take, in all layers and"
        " without the indexer's work, if CSA layers attended to every entry?",
        unit="times",
        solve=_without_choice,
        mistakes=_without_choice_mistakes,
        general="Add up the rows that all layers attend to, windows and HCA entries included, with top-k and without.",
    ),
    Exercise(
        name="last entry to read a token",
        notebook=3,
        question=f"V4-Flash, a CSA layer: what is the number of the last entry that reads token number {READ_TOKEN:,}?",
        unit="entry number",
        solve=_last_reader,
        mistakes=_last_reader_mistakes,
        general="Find the block the token stands in, and then which other entry reads that block.",
    ),
    Exercise(
        name="weights of an entry",
        notebook=3,
        question="V4-Flash, a CSA layer: how many gate weights are there in one entry, over all its tokens and channels?",
        unit="weights",
        solve=_weights,
        mistakes=_weights_mistakes,
        general="Multiply the tokens an entry reads by the channels it has.",
    ),
    Exercise(
        name="position of an entry",
        notebook=3,
        question=f"V4-Flash, a CSA layer: by which position is entry number {ENTRY} turned?",
        unit="token number",
        solve=_position,
        mistakes=_position_mistakes,
        general="An entry is turned as the first token of its own block would be. Where does that stand?",
    ),
    Exercise(
        name="the sink's share",
        notebook=3,
        question=f"A head looks at three rows whose logits are all 0, and its sink has the logit {SINK_LOGIT:g}. Which share"
        " does the sink take?",
        unit="share",
        solve=_sink,
        mistakes=_sink_mistakes,
        general="The sink is one more term of the softmax: exponentiate every logit, and divide.",
    ),
)
