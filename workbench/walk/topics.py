"""What is walked: the operations of each topic, in the order in which the code does them."""

from __future__ import annotations

from workbench.errors import InputError
from workbench.model.language_model import LanguageModel
from workbench.walk import attention, csa2, layers
from workbench.walk.run import Operation


def operations(topic: str, model: LanguageModel, layer: int) -> tuple[Operation, ...]:
    """The operations of ``topic`` in this layer. Raises InputError for a topic nobody has written down."""
    block = model.blocks[layer]
    if topic in ("csa", "hca"):
        return attention.hybrid(block.attn)
    if topic == "indexer":
        return attention.indexer()
    if topic == "csa2":
        return csa2.shared_stream(block.attn)
    if topic == "mhc":
        return layers.streams(block)
    if topic == "moe":
        return layers.routing(block.ffn)
    if topic == "engram":
        return layers.engram(block.engram)
    raise InputError(f"there is no walk through {topic!r}")
