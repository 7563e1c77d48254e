"""The light recipe: a model of under 200,000 weights that a minute or two of one core teaches to recall, on made-up text.

The text is symbols, not words, so nothing is read or tokenised first: *records* "! key value", *questions* "? key value" whose
value must be recalled, and between them filler, in which two symbols in a row nearly always decide the third, so that there is
something for an n-gram memory to know. (reference/tiny-model.md, sections 2 and 9: the recall stream and the fast variant)
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from workbench.config import EngramConfig, HybridConfig, RopeConfig
from workbench.config.hybrid import LayerKind
from workbench.training.tasks import RecallBatch, stack

KEYS, VALUES, FILLERS = 32, 32, 32
RECORD, QUESTION = 0, 1
FIRST_KEY, FIRST_VALUE = 2, 2 + KEYS
FIRST_FILLER = FIRST_VALUE + VALUES
VOCAB = FIRST_FILLER + FILLERS
SLOT = 6  # symbols: a record or question and three of filler, or filler alone
WRITE, READ = 0.3, 0.5  # shares of slots that hold a record or a question
RULED = 0.9  # share of filler that follows the rule, the rest is drawn at random
FAR = 32  # symbols back; what two layers of windows of 16 hand on ends before
_RULES_SEED = 20260424


def rules() -> np.ndarray:
    """What follows each pair of filler symbols when the rule holds, [FILLERS, FILLERS]; the same for every model."""
    return np.random.default_rng(_RULES_SEED).integers(FILLERS, size=(FILLERS, FILLERS))


def best_text_loss() -> float:
    """Nats per filler symbol that remain to a reader who knows the rules."""
    other = (1 - RULED) / FILLERS
    right = RULED + other
    return float(-right * np.log(right) - (FILLERS - 1) * other * np.log(other))


def config(kinds: tuple[LayerKind, ...], *, csa_ratio: int, hca_ratio: int, topk: int, engram: bool) -> HybridConfig:
    """The light V4 model: width 64, 2 heads of 64, a window of 16, four experts of which a symbol sees one, one stream."""
    routed: tuple[Literal["hash", "score"], ...] = tuple("score" for _ in kinds)
    memory = EngramConfig(layer_ids=(1,), vocab_size=2048, compressed_vocab_size=VOCAB, n_heads=2, head_dim=16)
    return HybridConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_attention_heads=2,
        head_dim=64,
        qk_rope_head_dim=8,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=32,
        layer_kinds=kinds,
        mlp_kinds=routed,
        n_routed_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        index_n_heads=2,
        index_head_dim=32,
        index_topk=topk,
        csa_ratio=csa_ratio,
        hca_ratio=hca_ratio,
        sliding_window=16,
        hc_mult=1,
        hc_sinkhorn_iters=5,
        compress_rope=RopeConfig(theta=160000.0, factor=16.0, original_max_position_embeddings=8192),
        max_position_embeddings=131072,
        engram=memory if engram else None,
    )


def batch(rng: np.random.Generator, size: int, length: int) -> RecallBatch:
    """``size`` sequences of ``length`` symbols; everything follows from ``rng``."""
    following = rules()
    return stack([_sequence(rng, length, following) for _ in range(size)])


def _sequence(rng: np.random.Generator, length: int, following: np.ndarray) -> tuple[np.ndarray, ...]:
    slots = -(-length // SLOT)
    filler = _filler(rng, slots * SLOT, following)
    ids, text = filler.copy(), np.ones(slots * SLOT, bool)
    read, twin = np.zeros(slots * SLOT, bool), np.full(slots * SLOT, -1, np.int64)
    keys, kinds, picks = rng.permutation(KEYS), rng.random(slots), rng.random(slots)
    values = rng.integers(VALUES, size=slots)
    written: list[list[int]] = []  # key, value, where the value stood last
    for slot in range(slots):
        at = slot * SLOT
        if kinds[slot] < WRITE and len(written) < KEYS:
            record, mark = [FIRST_KEY + int(keys[len(written)]), FIRST_VALUE + int(values[slot]), -1], RECORD
            written.append(record)
        elif WRITE <= kinds[slot] < WRITE + READ and written:
            record, mark = written[int(picks[slot] * len(written))], QUESTION
            read[at + 1], twin[at + 1] = True, record[2]
        else:
            continue
        ids[at : at + 3], text[at : at + 3] = (mark, *record[:2]), False
        record[2] = at + 2
    known_pair = np.append(False, text[:-1]) & text  # two filler symbols in a row, on which the next depends
    text_pairs = np.append(known_pair[:-1] & text[1:], False)
    read[length - 1 :] = text_pairs[length - 1 :] = False  # nothing comes after the last symbol
    return ids[:length], text_pairs[:length], read[:length], np.where(read, twin, -1)[:length]


def _filler(rng: np.random.Generator, count: int, following: np.ndarray) -> np.ndarray:
    """A line of filler symbols; records are laid over it, so a rule may reach across one."""
    drawn, ruled = rng.integers(FILLERS, size=count), rng.random(count) < RULED
    for t in range(2, count):
        if ruled[t]:
            drawn[t] = following[drawn[t - 2], drawn[t - 1]]
    return drawn + FIRST_FILLER
