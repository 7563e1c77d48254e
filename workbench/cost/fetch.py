"""How long Engram rows take and how long the layers before them hide it: durations for `workbench.schedule`, by formula.

Symbols of reference/engram-and-overlap.md, section 3: n tokens of this forward pass (sequences when decoding), R rows a token
and layer, s bytes a row, u the share of rows that are unique, h the share that a fast tier holds.

    T_hash = t_py + n R c_hash        T_gather = n R u (1 - h) c_row / threads        T_link = t_fix + n R s u (1 - h) / BW
    T_nvme = t_lat + n R u (1 - h) / IOPS, in the place of T_gather         W_l = sum of t_block before layer l

The constants in `Costs` are engineering estimates there; all results are modelled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from workbench.devices import Device, Drive, Link, link_of
from workbench.errors import InputError
from workbench.presets import presets
from workbench.schedule import Fetch, Policy, Schedule, plan
from workbench.sources import Format, Records, Source

Path = Literal["staged", "chunked", "uva"]
PATHS: dict[Path, str] = {
    "staged": "CPU gathers into pinned memory, then one copy",
    "chunked": "CPU gathers and copies in chunks, side by side",
    "uva": "a kernel on the device reads host memory itself",
}
EULER_GAMMA = 0.577
MOST_TOKENS = 2**20  # how far break-even points are looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class EngramModel:
    """What matters of a model here. ``efficiency`` of the peak FLOP rate in prefill, ``weight_bytes`` of one parameter read."""

    name: str
    title: str
    blocks: int
    block_parameters: float  # active in one block
    weight_bytes: float
    format: Format
    efficiency: float
    engram_layers: tuple[int, ...]  # counted from zero
    rows_per_token: int
    row_bytes: int
    source: Source

    @property
    def bytes_per_token(self) -> int:
        """b = R s, of one layer."""
        return self.rows_per_token * self.row_bytes


def _v41() -> EngramModel:
    """Layers and rows from the preset; a stored row is 256 FP8 values and a scale byte for each 32 of them."""
    config = presets["v4.1-flash"].config
    engram = config.engram
    assert engram is not None
    return EngramModel(
        name="v4.1-flash",
        title="DeepSeek-V4.1-Flash",
        blocks=config.num_hidden_layers,
        block_parameters=377.3e6,
        weight_bytes=1.0,
        format="fp8",
        efficiency=0.35,
        engram_layers=engram.layer_ids,
        rows_per_token=engram.rows_per_token,
        row_bytes=engram.head_dim + engram.head_dim // 32,
        source=Source("reference/deepseek-v41.md, section 9.2, and engram-and-overlap.md, sections 0 and 3", "derived"),
    )


_PAPER = Source("Engram paper, rows taken as BF16 (reference/engram-and-overlap.md, sections 0 and 3)", "derived")
engram_models: Records[EngramModel] = Records(
    "Engram model",
    (
        EngramModel(
            name="engram-27b",
            title="Engram-27B of the paper",
            blocks=30,
            block_parameters=127e6,
            weight_bytes=2.0,
            format="bf16",
            efficiency=0.40,
            engram_layers=(1, 14),  # "2" and "15", counted from one
            rows_per_token=16,
            row_bytes=160,
            source=_PAPER,
        ),
        _v41(),
        EngramModel(
            name="dense-8b",
            title="dense 8B with a 100B table, as the paper's test",
            blocks=36,
            block_parameters=8e9 / 36,
            weight_bytes=2.0,
            format="bf16",
            efficiency=0.40,
            engram_layers=(1,),
            rows_per_token=16,
            row_bytes=160,
            source=Source(f"{_PAPER.text}; depth and row width assumed", "uncertain"),
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Constants of the formulas (reference/engram-and-overlap.md, sections 3 and 5); seconds unless the name says otherwise."""

    hash_fixed_s: float = 10e-6  # t_py, the call itself
    hash_row_s: float = 10e-9  # c_hash: numpy takes 3 to 50 ns
    row_s: float = 100e-9  # c_row: one core reads a random row of 160 bytes in 60 to 150 ns
    copy_fixed_s: float = 20e-6  # t_fix of an explicit copy: 10 to 30 us for submit, DMA start and event wait
    uva_fixed_s: float = 3e-6  # t_fix of a kernel that reads host memory: 2 to 5 us of round trips
    host_bytes_per_s: float = 143e9  # STREAM read of 8 channels DDR4-3200
    ids_s: float = 15e-6  # a sampled id comes to the host: 10 to 20 us
    launch_s: float = 0.0  # t_launch of a block when decoding; none in a captured graph
    weight_efficiency: float = 0.70  # of the memory bandwidth when weights are read


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One forward pass to model. ``link`` None is the device's own; ``drive`` None keeps the table in host memory.

    ``tokens``: of a prefill chunk, or sequences decoded together. ``layers`` None are the model's own Engram layers.
    ``cards`` share each block evenly, while each fetches all rows over a link of its own, an upper bound.
    Raises InputError for a number out of range and for a kernel that would have to read a drive.
    """

    model: EngramModel
    device: Device
    tokens: int
    phase: Literal["prefill", "decode"] = "prefill"
    link: Link | None = None
    drive: Drive | None = None
    path: Path = "staged"
    layers: tuple[int, ...] | None = None
    hit_rate: float = 0.0
    unique: float = 1.0
    threads: int = 8
    cards: int = 1
    costs: Costs = field(default_factory=Costs)

    def __post_init__(self) -> None:
        if self.phase not in ("prefill", "decode") or self.path not in PATHS:
            raise InputError(f"phase is prefill or decode and path one of {tuple(PATHS)}, got {self.phase!r} and {self.path!r}")
        for name in ("tokens", "threads", "cards"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number of 1 or more, got {value!r}")
        for name in ("hit_rate", "unique"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} is a share from 0 to 1, got {getattr(self, name)!r}")
        if not all(0 <= layer < self.model.blocks for layer in self.engram_layers):
            raise InputError(f"{self.model.title} has blocks 0..{self.model.blocks - 1}, got Engram layers {self.layers}")
        if self.path == "uva" and self.drive is not None:
            raise InputError("a kernel cannot read rows from a drive: choose path 'staged' or 'chunked'")
        if self.model.format not in self.device.tflop_per_s and "bf16" not in self.device.tflop_per_s:
            raise InputError(f"{self.device.title} has no FLOP rate for {self.model.format}")

    @property
    def engram_layers(self) -> tuple[int, ...]:
        return self.model.engram_layers if self.layers is None else self.layers

    @property
    def crossed(self) -> Link | None:
        """The link the rows cross; None in unified memory."""
        return self.link or link_of(self.device)

    @property
    def flop_per_s(self) -> float:
        """The device's rate in the model's format, or in BF16 where it lacks that."""
        rates = self.device.tflop_per_s
        return 1e12 * rates.get(self.model.format, rates.get("bf16", 0.0)) * self.model.efficiency


def block_seconds(setting: Setting) -> float:
    """t_block: FLOP time, but never less than reading the block's active weights once, and a launch when decoding.

    A batch of a mixture of experts reads more weights than one token does; that is left out, so the window is not overstated.
    """
    model, costs = setting.model, setting.costs
    flops = 2.0 * model.block_parameters * setting.tokens / setting.flop_per_s
    read = model.block_parameters * model.weight_bytes / (setting.device.bandwidth_bytes_per_s * costs.weight_efficiency)
    return max(flops, read) / setting.cards + (costs.launch_s if setting.phase == "decode" else 0.0)


def window_s(setting: Setting, layer: int) -> float:
    """W_l without stalls: compute of the blocks before ``layer``."""
    return layer * block_seconds(setting)


def ids_known_s(setting: Setting) -> float:
    """When the ids are where they are hashed: at once, or a little later where the host hashes ids sampled on the device."""
    return setting.costs.ids_s if setting.phase == "decode" and setting.path != "uva" else 0.0


def bytes_fetched(setting: Setting) -> float:
    """Of one layer: n b u (1 - h)."""
    return setting.tokens * setting.model.bytes_per_token * setting.unique * (1.0 - setting.hit_rate)


def link_seconds(link: Link, nbytes: float) -> float:
    """Bandwidth part alone."""
    return nbytes / link.effective_bytes_per_s


def fetch_of(setting: Setting, layer: int) -> Fetch:
    """T_hash, T_gather and T_link of one Engram layer."""
    costs, nbytes = setting.costs, bytes_fetched(setting)
    read = setting.tokens * setting.model.rows_per_token * setting.unique * (1.0 - setting.hit_rate)
    link, uva = setting.crossed, setting.path == "uva"
    copy = 0.0 if link is None else (costs.uva_fixed_s if uva else costs.copy_fixed_s) + link_seconds(link, nbytes)
    if uva:  # hashed on the device, in the same launch
        return Fetch(layer=layer, gather_s=nbytes / costs.host_bytes_per_s, link_s=copy, chunked=True)
    if setting.drive is not None:
        gather = setting.drive.latency_s + read / setting.drive.reads_per_s
    else:
        gather = read * costs.row_s / setting.threads
    hashed = costs.hash_fixed_s + setting.tokens * setting.model.rows_per_token * costs.hash_row_s
    return Fetch(layer=layer, hash_s=hashed, gather_s=gather, link_s=copy, chunked=setting.path == "chunked")


def modelled(setting: Setting, policy: Policy = "prefetch") -> Schedule:
    """The forward pass on the virtual clock."""
    blocks = [block_seconds(setting)] * setting.model.blocks
    fetches = [fetch_of(setting, layer) for layer in setting.engram_layers]
    where = setting.device.title if setting.cards == 1 else f"{setting.cards} x {setting.device.title}"
    return plan(
        blocks, fetches, policy, ids_known_s=ids_known_s(setting), device=f"{where} (virtual clock)", note=described(setting)
    )


def described(setting: Setting) -> str:
    """Where rows lie, what they cross, and how many tokens ask for them."""
    link = setting.crossed
    over = f"over {link.title}" if link else "in unified memory"
    tier = setting.drive.title if setting.drive else "host memory"
    what = "chunk of" if setting.phase == "prefill" else "decode, batch"
    hits = f", {setting.hit_rate:.0%} of rows in a fast tier" if setting.hit_rate else ""
    return f"{setting.model.title}; {what} {setting.tokens:,}; rows from {tier} {over}{hits}; {PATHS[setting.path]}"


def required_bandwidth(setting: Setting, layer: int) -> float:
    """Bytes a second at which the copy alone fits the window before ``layer``; infinite before block 0.

    In prefill n cancels: b u (1 - h) F eff / (2 P_block l).
    """
    window = window_s(setting, layer)
    return bytes_fetched(setting) / window if window > 0 else math.inf


def stall_alone(setting: Setting, layer: int) -> float:
    """Stall of one Engram layer with the queue to itself: max(0, t0 + T_f - W_l)."""
    return max(0.0, ids_known_s(setting) + fetch_of(setting, layer).total_s - window_s(setting, layer))


def masked_tokens(setting: Setting, layer: int, most: int = MOST_TOKENS) -> tuple[tuple[int, int], ...]:
    """The ranges of n, first and last, up to ``most``, for which the rows of ``layer`` come in time: the break-even points.

    Looked for at eight places per doubling and then narrowed to the exact n, so a range narrower than that may be missed.
    """

    def hidden(n: int) -> bool:
        return stall_alone(replace(setting, tokens=n), layer) <= 0.0

    places = sorted({min(most, round(2 ** (i / 8))) for i in range(8 * math.ceil(math.log2(max(2, most))) + 1)})
    seen = [hidden(n) for n in places]
    ranges, first = [], places[0] if seen[0] else None
    for (a, was), (b, is_now) in zip(zip(places, seen, strict=True), zip(places[1:], seen[1:], strict=True), strict=False):
        if was == is_now:
            continue
        while b - a > 1:
            middle = (a + b) // 2
            a, b = (middle, b) if hidden(middle) == was else (a, middle)
        if is_now:
            first = b
        elif first is not None:
            ranges.append((first, a))
            first = None
    return (*ranges, *(((first, places[-1]),) if first is not None else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """One line of the break-even table: a layer alone on the queue, one batch or chunk, one link."""

    layer: int
    tokens: int
    link: str
    window_s: float
    fetch_s: float
    stall_s: float
    hidden_fraction: float
    required_bytes_per_s: float
    masked_tokens: tuple[tuple[int, int], ...]


def break_even_table(
    setting: Setting, layers: Iterable[int], tokens: Sequence[int], links: Iterable[Link | Drive]
) -> list[BreakEven]:
    """Every layer index x batch x link, the rest as in ``setting``; a drive stands for itself and the setting's own link."""
    lines = []
    for way in links:
        way_there = replace(setting, drive=way) if isinstance(way, Drive) else replace(setting, link=way, drive=None)
        for layer in layers:
            masked = masked_tokens(way_there, layer)
            for n in tokens:
                here = replace(way_there, tokens=n)
                fetch, stall = fetch_of(here, layer).total_s, stall_alone(here, layer)
                lines.append(
                    BreakEven(
                        layer=layer,
                        tokens=n,
                        link=way.title,
                        window_s=window_s(here, layer),
                        fetch_s=fetch,
                        stall_s=stall,
                        hidden_fraction=1.0 - stall / fetch if fetch > 0 else math.nan,
                        required_bytes_per_s=required_bandwidth(here, layer),
                        masked_tokens=masked,
                    )
                )
    return lines


def zipf_hit_rate(kept: float, keys: float) -> float:
    """Share of traffic that the ``kept`` most popular of ``keys`` keys take when popularity follows Zipf's law, exponent 1.

    (ln c + 0.577) / (ln M + 0.577)   (reference/engram-and-overlap.md, section 3); 0 for none kept. Real n-grams: measure.
    """
    if not keys >= 1 or not 0 <= kept <= keys:
        raise InputError(f"keep 0 to all of at least one key, got {kept!r} of {keys!r}")
    return 0.0 if kept < 1 else (math.log(kept) + EULER_GAMMA) / (math.log(keys) + EULER_GAMMA)
