"""The exercises of two notebooks: what V4.1 shares, and whether a context fits. Every number is computed when asked for."""

from __future__ import annotations

from workbench import cost
from workbench.config import DenseConfig, SharedStreamConfig
from workbench.devices import devices
from workbench.exercises.record import Exercise, Mistake
from workbench.presets import presets

MILLION = 2**20  # tokens, "1M" in the reports
ROOM_GB, GROUP = 80, 16
LAYER = 34
PROMPT = 1024


def _shared() -> SharedStreamConfig:
    config = presets["v4.1-flash"].config
    assert isinstance(config, SharedStreamConfig)
    return config


def _dense() -> DenseConfig:
    config = presets["gqa-8"].config
    assert isinstance(config, DenseConfig)
    return config


def _sessions(name: str = "v4-flash", storage: str = "released") -> int:
    return int(ROOM_GB * 1e9 // cost.kv_bytes(name, MILLION, storage)["total"])


def _sessions_mistakes() -> tuple[Mistake, ...]:
    return (
        Mistake(_sessions() + 1, "A part of a cache is of no use: round down."),
        Mistake(_sessions(storage="bf16"), "That is all in BF16; the question is as released."),
        Mistake(_sessions("v4-pro"), "That is V4-Pro, which has more layers; the question is about V4-Flash."),
        Mistake(_sessions("v4.1-flash"), "That is V4.1-Flash; the question is about V4-Flash."),
        Mistake(int(ROOM_GB * 2**30 // cost.kv_bytes("v4-flash", MILLION)["total"]), "GB are 1e9 bytes here, not 2**30."),
    )


def _row() -> int:
    return cost.entry_bytes(_dense())


def _tokens() -> int:
    return int(ROOM_GB * 1e9 // (_dense().num_hidden_layers * _row()))


def _tokens_mistakes() -> tuple[Mistake, ...]:
    config, layers = _dense(), _dense().num_hidden_layers
    room = ROOM_GB * 1e9
    return (
        Mistake(room // _row(), "That is one layer. Every layer keeps a key and a value of its own."),
        Mistake(room // (layers * _row() / 2), "A factor of two is missing: key and value, and two bytes a BF16 number."),
        Mistake(
            room // (layers * _row() * config.num_attention_heads / config.num_key_value_heads),
            "You counted query heads. They share KV heads, and only those are stored.",
        ),
        Mistake(ROOM_GB * 2**30 // (layers * _row()), "GB are 1e9 bytes here, not 2**30."),
    )


def _swap(name: str = "v4-flash", storage: str = "released") -> float:
    rate = devices["h100"].host_link_bytes_per_s
    assert rate is not None
    return cost.kv_bytes(name, MILLION, storage)["total"] / rate


def _swap_mistakes() -> tuple[Mistake, ...]:
    return (
        Mistake(2 * _swap(), "That is there and back; the question is about one way."),
        Mistake(_swap(storage="bf16"), "That is all in BF16; the question is as released."),
        Mistake(_swap("v4-pro"), "That is V4-Pro, which has more layers; the question is about V4-Flash."),
        Mistake(
            cost.kv_bytes("v4-flash", MILLION)["total"] / devices["h100"].bandwidth_bytes_per_s,
            "That is the bandwidth of the card's own memory. The way to the host is far narrower.",
        ),
    )


def _on_a_card(heads: int) -> float:
    """GB of a million tokens on one card of the group that holds so many KV heads."""
    return cost.kv_bytes("gqa-8", MILLION)["total"] * heads / _dense().num_key_value_heads / 1e9


def _on_a_card_mistakes() -> tuple[Mistake, ...]:
    return (
        Mistake(_on_a_card(1) / 2, "You divided by the cards, but a card holds whole KV heads, and there are fewer of those."),
        Mistake(_on_a_card(8), "That is the whole cache. Several KV heads do split over the cards of a group."),
        Mistake(_on_a_card(1) * _dense().num_key_value_heads / _dense().num_attention_heads, "Query heads are not stored."),
        Mistake(_on_a_card(1) / _dense().num_hidden_layers, "That is one layer; a card works on every layer."),
    )


def _entry() -> int:
    return cost.entry_bytes(_shared()) + cost.index_key_bytes(_shared())


def _per_token_mistakes() -> tuple[Mistake, ...]:
    config, entry = _shared(), _entry()
    per_layer = sum(1 / ratio for ratio in config.compress_ratios if ratio)
    streams = sum(1 / ratio for ratio in config.stream_ratios)
    return (
        Mistake(per_layer * entry, "Not every layer makes entries: most read those of a layer before them."),
        Mistake(streams * cost.entry_bytes(config), "An entry comes with an index key, or nobody could choose it."),
        Mistake(len(config.stream_ratios) * entry, "In a stream of ratio two, only every other token makes an entry."),
        Mistake(entry, "There is more than one stream; add what each of them grows by."),
        Mistake(cost.kv_bytes_per_token("v4-flash")["total"], "That is V4-Flash; the question is about V4.1-Flash."),
    )


def _chooser() -> int:
    return max(layer for layer in _shared().index_source_layer_ids if layer <= LAYER)


def _chooser_mistakes() -> tuple[Mistake, ...]:
    config = _shared()
    owner = max(layer for layer in config.kv_source_layer_ids if layer <= LAYER)
    return (
        Mistake(owner, "That layer made the stream. The choice among its entries was made anew since then."),
        Mistake(LAYER, "This layer runs no indexer: it is not among the index sources."),
        Mistake(LAYER - 1, "The layer just before it made no choice either; go further back."),
        Mistake(
            min(s for s in config.index_source_layer_ids if s > LAYER), "That layer comes later; its choice is not made yet."
        ),
        Mistake(config.index_source_layer_ids[-2] - 4, "There is a later layer that chooses, and still before this one."),
    )


def _pool_bytes() -> int:
    return _shared().candidate_pool(_chooser()) * cost.index_key_bytes(_shared())


def _pool_mistakes() -> tuple[Mistake, ...]:
    config, key = _shared(), cost.index_key_bytes(_shared())
    return (
        Mistake(MILLION * key, "That is every key of the stream; a Reindex layer looks at the candidate pool only."),
        Mistake(config.candidate_topk_blocks * key, "The pool keeps blocks, and each block has several entries."),
        Mistake(config.index_topk * key, "That many are kept at the end; more are looked at."),
        Mistake(4 * _pool_bytes(), "That is all Reindex layers together; the question is about one."),
        Mistake(
            _pool_bytes() // key * cost.entry_bytes(config), "Those are entries; choosing reads index keys, which are smaller."
        ),
    )


def _replayed(encoder: float = 1.0, last: int | None = None) -> float:
    """Share of the work of an exact prefill: the encoder on so much of the prompt, the decoder on its last tokens."""
    config = _shared()
    split, layers = config.kv_source_layer_ids[-1], config.num_hidden_layers
    last = config.sliding_window if last is None else last
    return (split * encoder * PROMPT + (layers - split) * last) / (layers * PROMPT)


def _replayed_mistakes() -> tuple[Mistake, ...]:
    return (
        Mistake(_replayed(last=0), "The decoder is not left out: it runs on the last window of the prompt."),
        Mistake(_replayed(encoder=0), "That is the decoder's part alone; the encoder runs on all tokens."),
        Mistake(
            _shared().sliding_window / PROMPT, "That would be all layers on the last window; the encoder reads everything."
        ),
        Mistake(1.0, "That is exact prefill. In the decoder the replay leaves tokens out."),
    )


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="v4.1 bytes per token",
        notebook=8,
        question="V4.1-Flash, as released, in a long context: how many bytes does each further token add to the shared streams,"
        " on average?",
        unit="bytes",
        solve=lambda: cost.kv_bytes_per_token("v4.1-flash")["total"],
        mistakes=_per_token_mistakes,
        general="Count the streams, how many entries each gets for a token, and what an entry and its index key take.",
    ),
    Exercise(
        name="whose choice",
        notebook=8,
        question=f"V4.1-Flash: which layer chose the entries that layer {LAYER} attends to?",
        unit="layer",
        solve=_chooser,
        mistakes=_chooser_mistakes,
        general="A Reuse layer takes the latest choice: look for the last Full or Reindex layer before it.",
    ),
    Exercise(
        name="keys of one reindex",
        notebook=8,
        question=f"V4.1-Flash decodes a token in a context of {MILLION:,}. How many bytes of index keys does one Reindex layer"
        " have to look at, as released?",
        unit="bytes",
        solve=_pool_bytes,
        mistakes=_pool_mistakes,
        general="Multiply the blocks of the candidate pool, the entries of a block, and the bytes of an index key.",
    ),
    Exercise(
        name="work of a replay",
        notebook=8,
        question=f"V4.1-Flash reads a prompt of {PROMPT:,} tokens with bounded replay. Counting each token in each layer as one"
        " piece of work: which share of an exact prefill's work is that?",
        unit="share",
        solve=_replayed,
        mistakes=_replayed_mistakes,
        general="The encoder's layers run on all tokens, the decoder's on the last window; divide by all layers on all tokens.",
    ),
    Exercise(
        name="sessions in the room",
        notebook=9,
        question=f"Beside the weights a card has {ROOM_GB} GB left. How many sessions of {MILLION:,} tokens of V4-Flash, stored"
        " as released, does it hold?",
        unit="sessions",
        solve=_sessions,
        mistakes=_sessions_mistakes,
        general="Divide the room by what one cache of that length holds, and keep the whole number.",
    ),
    Exercise(
        name="tokens in the room",
        notebook=9,
        question=f"The same {ROOM_GB} GB, but a single session of the baseline with GQA: how many tokens can it have in BF16?",
        unit="tokens",
        solve=_tokens,
        mistakes=_tokens_mistakes,
        general="Work out what one token adds in all layers, divide the room by it, and keep the whole number.",
    ),
    Exercise(
        name="cache on one card of sixteen",
        notebook=9,
        question=f"The baseline with GQA works on {GROUP} cards as one group. How many GB of a cache of {MILLION:,} tokens, in"
        " BF16, does one card hold?",
        unit="GB",
        solve=lambda: _on_a_card(1),
        mistakes=_on_a_card_mistakes,
        general="Cards of a group share out whole KV heads. How many heads are there, and how many does a card get at least?",
    ),
    Exercise(
        name="seconds of a swap",
        notebook=9,
        question=f"V4-Flash, as released: how many seconds does it take to copy a cache of {MILLION:,} tokens to the host, one"
        " way, at the peak rate of an H100's link?",
        unit="seconds",
        solve=_swap,
        mistakes=_swap_mistakes,
        general='Divide the bytes of the cache by wb.devices["h100"].host_link_bytes_per_s.',
    ),
)
