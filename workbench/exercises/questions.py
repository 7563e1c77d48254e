"""The exercises of the notebooks. Every number is computed from presets, our accounting and a recorded trace when asked for."""

from __future__ import annotations

from workbench import cost
from workbench.config import DenseConfig, HybridConfig
from workbench.exercises import choosing, fitting, frontier, mechanisms
from workbench.exercises.record import Exercise, Mistake
from workbench.presets import presets
from workbench.trace import OVERLAPPING, Trace
from workbench.weights import Weights

MILLION = 2**20  # tokens, "1M" in the reports
LUCK_TOKENS = 4096  # the largest text of the first notebook's needle
SLOT_TOKEN, TAIL_LENGTH, WINDOW_LENGTH, ENTRY = 1000, 100_000, 32_768, 9


def _total(model: cost.Model, storage: str = "released") -> float:
    return cost.kv_bytes(model, MILLION, storage)["total"]


def _hybrid(name: str) -> HybridConfig:
    config = presets[name].config
    assert isinstance(config, HybridConfig)
    return config


def _dense(name: str) -> DenseConfig:
    config = presets[name].config
    assert isinstance(config, DenseConfig)
    return config


def _weights() -> Weights:
    weights = presets["v4.1-flash"].weights
    assert weights is not None
    return weights


def _recorded() -> tuple[Trace, int, int]:
    """The needle's recording, and of its first layer that chooses: tokens an entry, entries kept."""
    trace = Trace.load("needle")
    layer = next(layer for layer in trace.layers if layer.kind == OVERLAPPING)
    return trace, layer.ratio, int(trace.config["index_topk"])


def _kept_by_luck(entries: int, right: int, queries: int) -> float:
    return 1 - (1 - right / entries) ** queries


def _luck() -> float:
    return _kept_by_luck(LUCK_TOKENS // _recorded()[1], 2, 2)


def _luck_mistakes() -> tuple[Mistake, ...]:
    entries = LUCK_TOKENS // _recorded()[1]
    return (
        Mistake(2 / entries, "You counted one entry, or one query. A value lies in two entries, and two queries look for it."),
        Mistake(
            _kept_by_luck(LUCK_TOKENS, 2, 2),
            "Either every token counted as an entry, though an entry stands for several; or one entry met one query, though"
            " there are two of each.",
        ),
        Mistake(1 - _luck(), "That is the chance that no query keeps it; the question asks for the opposite."),
        Mistake(_kept_by_luck(LUCK_TOKENS // 128, 2, 2), "That divides by the tokens of an HCA entry; only CSA layers choose."),
    )


def _choice() -> float:
    trace, ratio, _ = _recorded()
    return trace.length // ratio


def _choice_mistakes() -> tuple[Mistake, ...]:
    trace, ratio, kept = _recorded()
    window, asked = int(trace.config["sliding_window"]), int(trace.notes["look_at"]["token"])
    return (
        Mistake(trace.length, "Those are tokens. A compressed entry stands for several of them."),
        Mistake(kept, "That many are kept. The question is how many there are to choose among."),
        Mistake(trace.length // 128, "That is an HCA layer's number, where an entry stands for many more tokens."),
        Mistake((trace.length - window) // ratio, "Tokens of the window are in entries as well: do not take them off."),
        Mistake((asked + 1) // ratio, "The table's row is of the token before: with the last token one block more is full."),
    )


def _gqa() -> float:
    return cost.kv_bytes_per_token("gqa-8")["total"]


def _gqa_mistakes() -> tuple[Mistake, ...]:
    config, right = _dense("gqa-8"), _gqa()
    heads = config.num_attention_heads / config.num_key_value_heads
    return (
        Mistake(right / config.num_hidden_layers, "That is one layer. Every layer has a cache of its own."),
        Mistake(right / 2, "A factor of two is missing: a token has a key and a value, and a BF16 number takes two bytes."),
        Mistake(right / 4, "A token has a key and a value, and a BF16 number takes two bytes; both are missing."),
        Mistake(right * heads, "You counted query heads. They share KV heads, and only those are stored."),
        Mistake(right / config.num_key_value_heads, "That is a single KV head; count them all."),
    )


def _v32_mistakes() -> tuple[Mistake, ...]:
    parts, config = cost.kv_bytes("v3.2", MILLION), presets["v3.2"].config
    return (
        Mistake(parts[cost.KV_PART] / 1e9, "The indexer's keys are missing: a lightning indexer needs one for every token."),
        Mistake(_total("v3.2", "bf16") / 1e9, "That is all in BF16. The release stores latents and index keys in FP8."),
        Mistake(_total("v3.2") / config.num_hidden_layers / 1e9, "That is one layer. Every layer has a cache of its own."),
        Mistake(parts["index"] / 1e9, "Those are the index keys alone; what attention reads is missing."),
    )


def _smaller() -> float:
    return _total("v3.2") / _total("v4-pro")


def _smaller_mistakes() -> tuple[Mistake, ...]:
    no_keys = [cost.kv_bytes(name, MILLION) for name in ("v3.2", "v4-pro")]
    without = [parts["total"] - parts["index"] for parts in no_keys]
    return (
        Mistake(_total("v3.2") / _total("v4-pro", "bf16"), "That compares V3.2 as released with V4 in BF16: two storages."),
        Mistake(_total("v3.2", "bf16") / _total("v4-pro", "bf16"), "That is both in BF16; the question is as released."),
        Mistake(_total("v3.2", "bf16") / _total("v4-pro"), "That compares V3.2 in BF16 with V4 as released: two storages."),
        Mistake(_total("v3.2") / _total("v4-flash"), "That is V4-Flash, which has fewer layers; the question is about V4-Pro."),
        Mistake(without[0] / without[1], "The indexers' keys are missing on both sides; both models hold them."),
    )


def _scan() -> float:
    read = cost.decode_bytes("v4-pro", MILLION)
    return read["index"] / read["total"]


def _scan_mistakes() -> tuple[Mistake, ...]:
    held = cost.kv_bytes("v4-pro", MILLION)
    read, flash = cost.decode_bytes("v4-pro", MILLION), cost.decode_bytes("v4-flash", MILLION)
    return (
        Mistake(held["index"] / held["total"], "That is the share of what is held. Only the kept entries are read."),
        Mistake(flash["index"] / flash["total"], "That is V4-Flash; the question is about V4-Pro."),
        Mistake(
            read["compressed"] / read["total"], "That is the entries' share; the question is about the keys they are chosen by."
        ),
    )


def _window() -> int:
    return _hybrid("v4-flash").sliding_window


def _slot_mistakes() -> tuple[Mistake, ...]:
    window = _window()
    return (
        Mistake(SLOT_TOKEN // window, "That is how often the ring went round. The slot is what the division leaves over."),
        Mistake(SLOT_TOKEN % (window - 1), "You divided by one slot too few: the query itself is in the window, too."),
        Mistake(SLOT_TOKEN, "A ring has only as many slots as the window is long; then it starts again at the first."),
        Mistake(window - 1, "The newest token is not always in the last slot: nothing is moved, the oldest is overwritten."),
    )


def _tail_mistakes() -> tuple[Mistake, ...]:
    config = _hybrid("v4-flash")
    heavy = config.hca_ratio
    return (
        Mistake(TAIL_LENGTH // heavy, "Those are the entries that are finished; the question is what is left over."),
        Mistake(heavy - TAIL_LENGTH % heavy, "That is how many tokens the open block still waits for."),
        Mistake(TAIL_LENGTH % config.csa_ratio, "That is a CSA layer's block; an HCA block has more tokens."),
        Mistake(heavy, "A full block is no tail any more: it has just become an entry."),
    )


def _seen() -> float:
    return (ENTRY + 1) * _hybrid("v4-flash").csa_ratio - 1


def _seen_mistakes() -> tuple[Mistake, ...]:
    config = _hybrid("v4-flash")
    return (
        Mistake(ENTRY * config.csa_ratio, "That token begins the entry's block. An entry exists once its block is full."),
        Mistake((ENTRY + 1) * 2 * config.csa_ratio - 1, "Blocks overlap in what they read, not in where they end."),
        Mistake((ENTRY + 1) * config.hca_ratio - 1, "That is an HCA layer's block; a CSA block has fewer tokens."),
        Mistake(ENTRY * config.csa_ratio - 1, "That is the entry before: the first entry has number 0."),
    )


def _burst(csa: bool = True, hca: bool = True, keys: bool = True) -> float:
    config = _hybrid("v4-flash")
    entry, key = cost.entry_bytes(config), cost.index_key_bytes(config) if keys else 0
    kinds = config.layer_kinds
    return csa * kinds.count("csa") * (entry + key) + hca * kinds.count("hca") * entry


def _burst_mistakes() -> tuple[Mistake, ...]:
    config = _hybrid("v4-flash")
    entry, key = cost.entry_bytes(config), cost.index_key_bytes(config)
    return (
        Mistake(2 * entry + key, "That is one CSA and one HCA layer. Every layer closes a block of its own."),
        Mistake(_burst(keys=False), "A CSA entry comes with an index key, or nobody could choose it."),
        Mistake(_burst(hca=False), "At such a token the HCA layers close a block as well."),
        Mistake(_burst(csa=False), "The CSA layers close a block at this token, too: their blocks are shorter."),
        Mistake(cost.kv_bytes_per_token(config)["total"], "That is the average token; at this one it comes all at once."),
        Mistake(config.num_hidden_layers * (entry + key), "Only CSA layers have index keys, and window layers add no entry."),
    )


def _windows() -> float:
    return cost.kv_bytes("v4-flash", WINDOW_LENGTH)["window"]


def _windows_mistakes() -> tuple[Mistake, ...]:
    config, entry, right = _hybrid("v4-flash"), cost.entry_bytes(_hybrid("v4-flash")), _windows()
    compressing = len([kind for kind in config.layer_kinds if kind != "window"])
    return (
        Mistake(right / config.num_hidden_layers, "That is one layer. Every layer has a window of its own."),
        Mistake(config.num_hidden_layers * WINDOW_LENGTH * entry, "A window holds no more tokens than it is long."),
        Mistake(right * compressing / config.num_hidden_layers, "Layers without compressed entries have a window, too."),
        Mistake(right * 2, "Key and value are one and the same row in V4: count it once."),
    )


def _ninety_mistakes() -> tuple[Mistake, ...]:
    weights = _weights()
    stays = weights.device_bytes / 1e9
    return (
        Mistake(10 * stays, "That is tables and device together. The question asks for the tables alone."),
        Mistake(0.9 * stays, "That takes ninety percent of what stays. Ninety percent of the whole must be outside."),
        Mistake(weights.host_bytes / 1e9, "That is what the tables of V4.1-Flash are; how large would they have to be?"),
        Mistake(9 * weights.host_bytes / 1e9, "You multiplied the tables; start from what stays on the device."),
        Mistake(9 * (weights.device_bytes + weights.host_bytes) / 1e9, "Start from what stays, without any tables."),
    )


def _outside() -> float:
    weights = _weights()
    return weights.host_bytes / (weights.host_bytes + weights.device_bytes)


def _outside_mistakes() -> tuple[Mistake, ...]:
    weights = _weights()
    return (
        Mistake(weights.host_bytes / weights.device_bytes, "You divided by what stays; divide by all weights."),
        Mistake(1 + weights.host_bytes / weights.device_bytes, "That is the whole over what stays. A share is asked for."),
        Mistake(weights.host_bytes / weights.expert_bytes, "You divided by the experts alone; there is more on the device."),
    )


EXERCISES: dict[str, Exercise] = {
    exercise.name: exercise
    for exercise in (
        *choosing.EXERCISES,
        *fitting.EXERCISES,
        Exercise(
            name="kept by luck",
            notebook=0,
            question=f"In a text of {LUCK_TOKENS:,} tokens every query keeps one entry, drawn at random. How likely is it that"
            " the needle is kept? Its value lies in two entries, and two queries look for it.",
            unit="share",
            solve=_luck,
            mistakes=_luck_mistakes,
            general="First count the entries a CSA layer has for that many tokens; then the chance of one query to miss.",
        ),
        Exercise(
            name="entries to choose from",
            notebook=0,
            question="The needle's recording: among how many entries does its last token choose in the first CSA layer?",
            unit="entries",
            solve=_choice,
            mistakes=_choice_mistakes,
            general="Take the tokens of the recording and those that one CSA entry stands for; both are printed in section 1.",
        ),
        Exercise(
            name="gqa bytes per token",
            notebook=1,
            question="How many bytes does the baseline with GQA, 8 KV heads of 128 in each of its 61 layers, keep for one token"
            " in BF16?",
            unit="bytes",
            solve=_gqa,
            mistakes=_gqa_mistakes,
            general="Multiply: layers, KV heads, numbers a head, keys and values, bytes a number.",
        ),
        Exercise(
            name="v3.2 at a million",
            notebook=1,
            question=f"How many GB does DeepSeek-V3.2 hold for {MILLION:,} tokens, stored as it was released?",
            unit="GB",
            solve=lambda: _total("v3.2") / 1e9,
            mistakes=_v32_mistakes,
            general="A layer holds, for every token, a latent and an index key. Multiply by tokens and layers.",
        ),
        Exercise(
            name="smaller than v3.2",
            notebook=1,
            question=f"At {MILLION:,} tokens, how many times smaller is V4-Pro's cache than V3.2's, both as released?",
            unit="times",
            solve=_smaller,
            mistakes=_smaller_mistakes,
            general="Take both totals at the same length and in the storage of their release, and divide.",
        ),
        Exercise(
            name="index share of reading",
            notebook=1,
            question=f"V4-Pro decodes one token in a context of {MILLION:,}. Which share of what it reads are index keys?",
            unit="share",
            solve=_scan,
            mistakes=_scan_mistakes,
            general="All index keys are read, but of the entries only the kept ones. Divide the former by all that is read.",
        ),
        Exercise(
            name="ring slot",
            notebook=4,
            question=f"V4-Flash: in which slot of the window's ring does token number {SLOT_TOKEN:,} lie?",
            unit="slot",
            solve=lambda: SLOT_TOKEN % _window(),
            mistakes=_slot_mistakes,
            general="The ring has one slot for each token of the window, and goes round and round.",
        ),
        Exercise(
            name="tokens in the tail",
            notebook=4,
            question=f"V4-Flash holds {TAIL_LENGTH:,} tokens. How many of them wait in the open block of an HCA layer?",
            unit="tokens",
            solve=lambda: TAIL_LENGTH % _hybrid("v4-flash").hca_ratio,
            mistakes=_tail_mistakes,
            general="Blocks follow each other without a gap, and a full block is closed at once. What is left over?",
        ),
        Exercise(
            name="first to see an entry",
            notebook=4,
            question=f"V4-Flash, a CSA layer: what is the number of the first token that can choose entry number {ENTRY}?",
            unit="token number",
            solve=_seen,
            mistakes=_seen_mistakes,
            general="An entry is made the moment its block is full, and the token that fills it may use it already.",
        ),
        Exercise(
            name="bytes at a block's end",
            notebook=4,
            question="V4-Flash, as released: one token closes a block in every CSA and in every HCA layer. How many bytes of"
            " entries and index keys are added at that token?",
            unit="bytes",
            solve=_burst,
            mistakes=_burst_mistakes,
            general="Count the CSA and the HCA layers, and what each of them adds when a block closes.",
        ),
        Exercise(
            name="bytes of all windows",
            notebook=4,
            question=f"V4-Flash, as released: how many bytes do the windows of all layers hold at {WINDOW_LENGTH:,} tokens?",
            unit="bytes",
            solve=_windows,
            mistakes=_windows_mistakes,
            general="Multiply the layers, the tokens a window holds, and the bytes of a row.",
        ),
        Exercise(
            name="ninety percent outside",
            notebook=10,
            question="How many GB of tables would V4.1-Flash need, beside the weights on its device, for ninety percent"
            " of all its weights to be outside?",
            unit="GB",
            solve=lambda: 9 * _weights().device_bytes / 1e9,
            mistakes=_ninety_mistakes,
            general="What stays on the device must be ten percent of the whole. How many times that is the rest?",
        ),
        Exercise(
            name="share outside",
            notebook=10,
            question="Which share of all weights of V4.1-Flash, its tables included, lies in host memory?",
            unit="share",
            solve=_outside,
            mistakes=_outside_mistakes,
            general="Divide the bytes of the tables by the bytes of all weights.",
        ),
        *mechanisms.EXERCISES,
        *frontier.EXERCISES,
    )
}
