"""What V4.1's layers share: whose stream a layer reads, whose choice, whose pool, and how much two layers' choices agree.

From a configuration, or from a recording. Letters: K entries kept, S complete entries. (reference/deepseek-v41.md, sections
1.1, 4 and 10)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.config import SharedStreamConfig, read_config
from workbench.errors import InputError
from workbench.trace import Trace


@dataclass(frozen=True, slots=True)
class SharedLayer:
    """One layer: the layer whose stream it reads, the layer that chose for it, the one that made its pool; None where none."""

    layer: int
    kind: str
    ratio: int
    stream_of: int | None
    choice_of: int | None
    pool_of: int | None


def shared_layers(config: Any) -> tuple[SharedLayer, ...]:
    """Every layer of a V4.1 configuration, first layer first. InputError for another family, whose layers share nothing."""
    if not isinstance(config, SharedStreamConfig):
        raise InputError(f"only V4.1's layers share streams; expected its configuration, got {type(config).__name__}")
    found = []
    for layer, (kind, ratio) in enumerate(zip(config.layer_kinds, config.compress_ratios, strict=True)):
        stream = max((s for s in config.kv_source_layer_ids if s <= layer), default=None) if ratio else None
        choice = max((s for s in config.index_source_layer_ids if s <= layer), default=None) if ratio else None
        pool = config.candidate_source_layer_id if kind == "csa2-reindex" and config.candidate_pool(layer) else None
        found.append(SharedLayer(layer, kind, ratio, stream, choice, pool))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class CommonChoices:
    """Of ``kept`` entries, how many two layers both kept, on average over ``queries``, and by chance.

    Counted where more was there to choose from than is kept.
    """

    first: int
    second: int
    kept: int
    common: float
    by_chance: float
    queries: int


def common_choices(trace: Trace, first: int, second: int) -> CommonChoices:
    """How alike two layers of a recording chose among the same entries; by chance means drawn from what the second could see.

    Of a layer with a candidate pool that is its pool. InputError for layers that choose nothing or read other entries, for
    another family than V4.1, and for a recording too short to leave anything out.
    """
    layers = {record.layer: record for record in trace.layers}
    for number in (first, second):
        if number not in layers or layers[number].selected is None:
            raise InputError(f"layer {number} chooses no entries; choose among {[n for n in layers if layers[n].selects]}")
    config = read_config(trace.config)
    streams = [shared.stream_of for shared in shared_layers(config)]
    if streams[first] != streams[second]:
        raise InputError(f"layers {first} and {second} read the streams of layers {streams[first]} and {streams[second]}")
    pool = config.candidate_pool(second)
    ours, theirs = (np.asarray(layers[n].selected) for n in (first, second))
    kept = ours.shape[1]
    visible = np.array([layers[second].visible_entries(t) for t in range(len(ours))])
    reach = np.minimum(visible, pool) if pool else visible
    rows = np.flatnonzero((visible > max(kept, pool)) & (ours >= 0).all(1) & (theirs >= 0).all(1))
    if not len(rows):
        raise InputError(
            f"no query of this recording left an entry out; read more than {max(kept, pool)} entries' worth of tokens"
        )
    common = np.array([len(np.intersect1d(ours[t], theirs[t])) for t in rows])
    return CommonChoices(first, second, kept, float(common.mean()), float((kept * kept / reach[rows]).mean()), len(rows))


def replay_share(config: Any, tokens: int) -> float:
    """Of an exact prefill's work, each token in each layer being one piece, the share that a bounded replay does.

    The encoder, the layers before the last KV source, runs on all tokens, the rest on the last window of them. InputError for
    another family, no stream to replay on, and fewer than one token.
    """
    layers = shared_layers(config)
    if not config.kv_source_layer_ids:
        raise InputError("replay needs a shared stream, and this configuration has no KV source")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"a prompt has a whole number of tokens from 1 up, got {tokens!r}")
    split = config.kv_source_layer_ids[-1]
    replayed = (len(layers) - split) * min(tokens, config.sliding_window)
    return (split * tokens + replayed) / (len(layers) * tokens)
