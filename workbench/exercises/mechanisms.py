"""Exercises about mechanisms: Engram's overlap, mHC's streams, FP8 and FP4. Every number is computed when asked for."""

from __future__ import annotations

from dataclasses import replace

from workbench.cost.fetch import Setting, engram_models, required_bandwidth
from workbench.devices import devices, links
from workbench.exercises.record import Exercise, Mistake
from workbench.schedule import Fetch, plan

BLOCK_MS, BLOCKS, FETCH_MS = 2.5, 3, 12.0  # one Engram layer
QUEUE_BLOCK_MS, QUEUE_FETCH_MS, QUEUE_LAYERS = 6.0, 18.0, (1, 3)  # two
CHUNK = 8192


def _hidden(block_ms: float, fetch_ms: float, layers: tuple[int, ...]) -> float:
    fetches = [Fetch(layer=layer, gather_s=fetch_ms / 1e3) for layer in layers]
    return plan([block_ms / 1e3] * (max(layers) + 1), fetches).hidden_fraction


def _share() -> float:
    return _hidden(BLOCK_MS, FETCH_MS, (BLOCKS,))


def _share_mistakes() -> tuple[Mistake, ...]:
    return (
        Mistake((BLOCKS + 1) * BLOCK_MS / FETCH_MS, "The layer that needs the rows cannot hide them; count those before it."),
        Mistake((BLOCKS - 1) * BLOCK_MS / FETCH_MS, "A block is missing: blocks are counted from 0."),
        Mistake(BLOCK_MS / FETCH_MS, "That is a single block; all blocks before the layer hide rows that are fetched ahead."),
        Mistake(FETCH_MS / (BLOCKS * BLOCK_MS), "That is the fetch over the window; the share hidden is the other way round."),
    )


def _queue() -> float:
    return _hidden(QUEUE_BLOCK_MS, QUEUE_FETCH_MS, QUEUE_LAYERS)


def _queue_mistakes() -> tuple[Mistake, ...]:
    first, later = (layer * QUEUE_BLOCK_MS for layer in QUEUE_LAYERS)  # when compute would reach them without stalls
    whole = 2 * QUEUE_FETCH_MS
    alone = QUEUE_FETCH_MS - first + max(0.0, QUEUE_FETCH_MS - later)
    unmoved = QUEUE_FETCH_MS - first + whole - later
    return (
        Mistake(
            1 - alone / whole,
            "The second fetch begins when the first is done; you gave each the queue to itself, or only the first a stall.",
        ),
        Mistake(1 - unmoved / whole, "The first stall moves the second layer: when does compute reach it then?"),
        Mistake(0.0, "That is what fetching at the layer hides. Here both are fetched ahead."),
    )


def _chunk_bytes() -> float:
    return CHUNK * engram_models["v4.1-flash"].bytes_per_token


def _chunk_mistakes() -> tuple[Mistake, ...]:
    model, right = engram_models["v4.1-flash"], _chunk_bytes()
    values = model.row_bytes * 32 // 33  # a scale byte for each 32 of them
    return (
        Mistake(CHUNK * model.rows_per_token * values, "The scales are missing: a byte for each 32 values of a row."),
        Mistake(len(model.engram_layers) * right, "That is both Engram layers; one is asked about."),
        Mistake(CHUNK * model.row_bytes, "That is one row a token; it reads one for each order of n-gram and each head."),
        Mistake(2 * CHUNK * model.rows_per_token * values, "That is two bytes a value; these rows are stored in FP8."),
        Mistake(model.bytes_per_token, "That is one token; the chunk has more."),
    )


def _spare(link: str = "pcie4", layer: int = 1, **changes: object) -> float:
    setting = Setting(model=engram_models["v4.1-flash"], device=devices["h100"], tokens=CHUNK)
    return links[link].effective_bytes_per_s / required_bandwidth(replace(setting, **changes), layer)  # type: ignore[arg-type]


def _spare_mistakes() -> tuple[Mistake, ...]:
    pcie4 = links["pcie4"]
    return (
        Mistake(_spare() * pcie4.peak_bytes_per_s / pcie4.effective_bytes_per_s, "That is the peak; a copy gets less of it."),
        Mistake(_spare("pcie5"), "That is PCIe 5.0; the question is about PCIe 4.0."),
        Mistake(_spare(layer=14), "That is layer 14, which has a longer window; the question is about layer 1."),
        Mistake(_spare(phase="decode", tokens=64), "That is a line about decoding; the question is about prefill."),
    )


EXERCISES = (
    Exercise(
        name="hidden share",
        notebook=5,
        question=f"Rows are fetched ahead and take {FETCH_MS:g} ms. Block 0 and those after it compute for {BLOCK_MS:g} ms"
        f" each, and block {BLOCKS} needs the rows. Which share of the fetch is hidden?",
        unit="share",
        solve=_share,
        mistakes=_share_mistakes,
        general="The window is the compute of the blocks before the one that needs the rows. Divide it by the fetch.",
    ),
    Exercise(
        name="hidden in a queue",
        notebook=5,
        question=f"Two Engram layers, {QUEUE_LAYERS[0]} and {QUEUE_LAYERS[1]}; each fetch takes {QUEUE_FETCH_MS:g} ms and each"
        f" block computes for {QUEUE_BLOCK_MS:g} ms. Both are fetched ahead, in one queue. Which share of both fetches together"
        " is hidden?",
        unit="share",
        solve=_queue,
        mistakes=_queue_mistakes,
        general="Write down when each fetch is done and when compute reaches each layer, the stalls before it included.",
    ),
    Exercise(
        name="bytes of a chunk",
        notebook=5,
        question=f"How many bytes does one Engram layer of V4.1-Flash fetch for a chunk of {CHUNK:,} tokens? A token reads 24"
        " rows of 256 FP8 values, each row with a scale byte for every 32 values.",
        unit="bytes",
        solve=_chunk_bytes,
        mistakes=_chunk_mistakes,
        general="Multiply the tokens, the rows a token reads, and the bytes of a row.",
    ),
    Exercise(
        name="link to spare",
        notebook=5,
        question="V4.1-Flash on one H100, prefill, Engram in layer 1: how many times the bandwidth that the copy alone needs"
        f" does PCIe 4.0 x16 give? An actual copy is taken to get {links['pcie4'].effective_bytes_per_s / 1e9:g} GB/s of it.",
        unit="times",
        solve=_spare,
        mistakes=_spare_mistakes,
        general="Section 6 has what the copy alone needs, in the last column. Divide what the link gives by that.",
    ),
)
