"""Exercises about mechanisms: Engram's overlap, mHC's streams, FP8 and FP4. Every number is computed when asked for."""

from __future__ import annotations

from dataclasses import replace

from workbench import cost
from workbench.config import HybridConfig
from workbench.cost.fetch import Setting, engram_models, required_bandwidth
from workbench.devices import devices, links
from workbench.exercises.record import Exercise, Mistake
from workbench.presets import presets
from workbench.schedule import Fetch, plan

BLOCK_MS, BLOCKS, FETCH_MS = 2.5, 3, 12.0  # one Engram layer
QUEUE_BLOCK_MS, QUEUE_FETCH_MS, QUEUE_LAYERS = 6.0, 18.0, (1, 3)  # two
CHUNK = 8192
MATRIX = ((0.6, 0.4), (0.2, 0.8))  # rows sum to one, columns do not
GROWTH = 1.1
LARGEST = 22.0  # of a run of 32 values
MILLION = 2**20  # tokens, "1M" in the reports


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


def _first_row(divide_by_columns: bool = True) -> float:
    (a, b), (c, d) = MATRIX
    divisors = (a + c, b + d) if divide_by_columns else (a + c, a + c)
    return abs(a / divisors[0] + b / divisors[1] - 1)


def _first_row_mistakes() -> tuple[Mistake, ...]:
    (a, _), (c, d) = MATRIX
    return (
        Mistake(1 + _first_row(), "That is the sum itself. By how much does it miss one?"),
        Mistake(_first_row(False), "You divided the whole row by one sum. Each entry is divided by the sum of its own column."),
        Mistake(abs(1 - a - c), "That is by how much the first column missed one before the step."),
        Mistake(0.0, "The rows summed to one before the step; dividing columns moves them. Add the first row up again."),
    )


def _hybrid(name: str) -> HybridConfig:
    config = presets[name].config
    assert isinstance(config, HybridConfig)
    return config


def _growth() -> float:
    return float(GROWTH ** (2 * _hybrid("v4-pro").num_hidden_layers))


def _growth_mistakes() -> tuple[Mistake, ...]:
    layers = _hybrid("v4-pro").num_hidden_layers
    return (
        Mistake(GROWTH**layers, "A layer has two sublayers, attention and MoE, and each mixes the streams."),
        Mistake(1 + 2 * layers * (GROWTH - 1), "You added the growth of the sublayers; each multiplies what came before."),
        Mistake(GROWTH * 2 * layers, "You multiplied by the number of sublayers; the factor applies again and again."),
        Mistake(GROWTH ** (2 * _hybrid("v4-flash").num_hidden_layers), "That is V4-Flash; the question is about V4-Pro."),
    )


def _mixing_bytes() -> float:
    config = _hybrid("v4-flash")
    weights = config.hc_mult**2 + 2 * config.hc_mult
    return 2 * config.num_hidden_layers * weights * config.hc_mult * config.hidden_size * 4


def _mixing_mistakes() -> tuple[Mistake, ...]:
    config, right = _hybrid("v4-flash"), _mixing_bytes()
    m = config.hc_mult
    return (
        Mistake(
            right / 2, "Either you counted one sublayer a layer, where there are two, or two bytes a number instead of four."
        ),
        Mistake(right * m**2 / (m**2 + 2 * m), "That is the mixing matrix alone; the weights to read and write are made, too."),
        Mistake(right / m, "The projection reads all streams at once, not one of them."),
        Mistake(right / (2 * config.num_hidden_layers), "That is one sublayer; every sublayer of every layer has its own."),
    )


def _key_bytes() -> float:
    return cost.index_key_bytes(_hybrid("v4-flash"))


def _key_mistakes() -> tuple[Mistake, ...]:
    values = _hybrid("v4-flash").index_head_dim
    return (
        Mistake(values / 2, "The scales are missing: a byte for each 32 values."),
        Mistake(values + values // 32, "You gave each value a byte; FP4 takes half of one."),
        Mistake(values // 2 + 1, "There are several runs of 32 values, and each has a scale of its own."),
        Mistake(2 * values, "That is BF16, two bytes a value and no scales."),
        Mistake(
            values // 2 + 4 * (values // 32), "You gave each scale four bytes; a power of two needs only its exponent, a byte."
        ),
    )


def _fp4(largest: float, scale: float) -> float:
    """The relative error of a value that is stored with this scale: to the nearest level, 6 at most."""
    levels = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    stored = scale * min(levels, key=lambda level: abs(level - largest / scale))
    return abs(stored - largest) / largest


def _largest() -> float:
    scale = 1.0
    while LARGEST / scale > 6:
        scale *= 2
    return _fp4(LARGEST, scale)


def _largest_mistakes() -> tuple[Mistake, ...]:
    return (
        Mistake(
            _fp4(LARGEST, 2.0), "With that scale the value exceeds the largest level and is cut off; the scale must be larger."
        ),
        Mistake(_fp4(LARGEST, 1.0), "There is no scale in that: the largest level alone is far too small."),
        Mistake(_largest() * LARGEST, "That is the error itself. Divide it by the value."),
        Mistake(abs(16 - LARGEST) / LARGEST, "There is a level that is nearer, the largest one."),
        Mistake(0.0, "A scale of exactly a sixth would do that, but scales are powers of two."),
    )


def _packed() -> float:
    return cost.kv_bytes("v4-flash", MILLION, "bf16")["total"] / cost.kv_bytes("v4-flash", MILLION)["total"]


def _packed_mistakes() -> tuple[Mistake, ...]:
    exact, half, packed = (cost.kv_bytes("v4-flash", MILLION, storage) for storage in ("fp32", "bf16", "released"))
    return (
        Mistake(
            2.0, "Not everything is half as large: there are scales, channels that stay BF16, and keys of less than a byte."
        ),
        Mistake(half["index"] / packed["index"], "That is the index keys alone; most of the cache are entries."),
        Mistake(half["compressed"] / packed["compressed"], "That is the entries alone; the index keys shrink by more."),
        Mistake(exact["total"] / packed["total"], "That is against FP32; the question is against BF16."),
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
    Exercise(
        name="row after a column step",
        notebook=6,
        question=f"Two streams, and a matrix with the rows {MATRIX[0]} and {MATRIX[1]}. Sinkhorn divides every column by its"
        " sum. By how much does the sum of the first row miss one after that?",
        unit="share",
        solve=_first_row,
        mistakes=_first_row_mistakes,
        general="Add up both columns, divide each entry by the sum of its own column, and add up the first row.",
    ),
    Exercise(
        name="growth through depth",
        notebook=6,
        question=f"Were every mixing matrix of V4-Pro to enlarge a signal {GROWTH:g} times, how many times larger would it"
        f" leave the last of {_hybrid('v4-pro').num_hidden_layers} layers?",
        unit="times",
        solve=_growth,
        mistakes=_growth_mistakes,
        general="Count the sublayers, attention and MoE of every layer; each multiplies what it is given.",
    ),
    Exercise(
        name="bytes that make the mixing",
        notebook=6,
        question="V4-Flash: 43 layers with two sublayers each. Every sublayer projects all 4 streams of 4,096 channels to 4"
        " weights to read, 4 to write and 4 × 4 to mix. How many bytes do these projections take in FP32?",
        unit="bytes",
        solve=_mixing_bytes,
        mistakes=_mixing_mistakes,
        general="Multiply: sublayers, what each makes, what each reads, bytes a number.",
    ),
    Exercise(
        name="bytes of an index key",
        notebook=7,
        question="An index key of V4 has 128 values, stored in FP4 with a scale of one byte for each run of 32. How many bytes"
        " is that?",
        unit="bytes",
        solve=_key_bytes,
        mistakes=_key_mistakes,
        general="Two codes fit into a byte. Add the scales, one for each run.",
    ),
    Exercise(
        name="the largest of a run",
        notebook=7,
        question=f"The largest of 32 values is {LARGEST:g}. FP4 has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6, and the"
        " scale is the smallest power of two that keeps the run within 6. Which share of its size is the error of this value?",
        unit="share",
        solve=_largest,
        mistakes=_largest_mistakes,
        general="Find the scale, divide by it, go to the nearest magnitude, multiply by the scale, and compare.",
    ),
    Exercise(
        name="released against bf16",
        notebook=7,
        question=f"At {MILLION:,} tokens, how many times smaller is V4-Flash's cache as released than all of it in BF16?",
        unit="times",
        solve=_packed,
        mistakes=_packed_mistakes,
        general="Section 2 shows how: take both totals at this length, and divide.",
    ),
)
