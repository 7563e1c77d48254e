"""Claims of a news article, each beside what primary sources support and what this workbench computes or measures.

The article: "Don't overestimate Nvidia, don't underestimate DeepSeek" (April 2026). It is about Engram, and was written before
DeepSeek-V4 came out. (reference/engram-and-overlap.md, sections 0, 2 and 6)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.claims import memory, speed
from workbench.claims.record import VERDICTS as VERDICTS
from workbench.claims.record import Claim as Claim
from workbench.claims.record import Judgement as Judgement
from workbench.claims.record import Number as Number
from workbench.claims.record import with_unit as with_unit
from workbench.devices import Device, devices


def article_claims(
    *,
    length: int = 1_048_576,
    device: Device | str = "h200",
    cards: int = memory.SERVER_CARDS,
    overlap: Any = None,
    storage: Mapping[str, Any] | None = None,
) -> tuple[Claim, ...]:
    """All claims, computed for sequences of ``length`` tokens on ``cards`` cards of ``device``.

    ``overlap`` is a result of ``wb.overlap_experiment``, ``storage`` one of ``wb.storage_cost``; without them, what rests on
    them is left out or cannot be tested. InputError for a length or device there is not.
    """
    device = devices[device] if isinstance(device, str) else device
    return (
        memory.eighty_to_eight(length),
        memory.minus_ninety(),
        speed.fully_masked(overlap),
        speed.geometric(length, device, cards),
        speed.cpu_looks_up(),
        speed.before_the_next_word(),
        memory.kv_overflow(length),
        speed.memory_bound(length, device, cards),
        speed.fp8_is_free(storage),
        memory.one_910b(length),
        speed.stacking(length),
        memory.v4_adopts(),
        speed.rubin(),
    )
