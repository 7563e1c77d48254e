"""Accelerators, unified-memory machines, and the links and drives that feed them: frozen records, each number with its source.

`devices`, `links` and `drives` are mappings by name; case, spaces and dashes do not matter ("RTX 4090" is "rtx-4090"). To try
a number of your own, change a record with ``dataclasses.replace``. Bytes are plain bytes: 80 GB is 80e9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from workbench.errors import InputError
from workbench.sources import Format, Records, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, dense peaks without sparsity. ``kv_formats``: cache formats its matrix units read.

    ``host_link_bytes_per_s`` is per direction; None where memory is unified and there is no link, or where none was found.
    A device without the format a cache was released in keeps that cache in BF16.
    """

    name: str
    title: str
    memory_bytes: float
    bandwidth_bytes_per_s: float
    tflop_per_s: Mapping[Format, float]
    kv_formats: tuple[Format, ...]
    host_link: str
    host_link_bytes_per_s: float | None
    source: Source
    exceptions: Mapping[str, Source] = field(default_factory=dict)
    note: str = ""

    @property
    def unified_memory(self) -> bool:
        """Whether there is one memory for host and accelerator: what is kept on the host then takes the same room."""
        return self.host_link == _UNIFIED[0]

    def source_of(self, number: str) -> Source:
        """Source of one number by field name, "tflop_per_s.fp8" for one format; InputError if there is no such field."""
        field_name = number.partition(".")[0]
        if not hasattr(self, field_name):
            raise InputError(f"device {self.name!r} has no number {number!r}; give one of its fields")
        return self.exceptions.get(number, self.exceptions.get(field_name, self.source))


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way from host memory to the device, per direction; ``effective_bytes_per_s`` is what a large copy is assumed to get."""

    name: str
    title: str
    peak_bytes_per_s: float
    effective_bytes_per_s: float
    source: Source
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """An SSD that rows are read from, a whole page for each; ``latency_s`` until the first of a batch is there."""

    name: str
    title: str
    reads_per_s: float
    latency_s: float
    source: Source
    page_bytes: int = 4096


_DATASHEET = Source("vendor's data sheet, from general knowledge (reference/engram-and-overlap.md, section 7)", "published")
_AGREED = Source("secondary sources agree (reference/engram-and-overlap.md, section 7)", "secondary")
_DOUBTFUL = Source("few or conflicting sources (reference/engram-and-overlap.md, section 7)", "uncertain")
_ARTICLE = Source("announced 2025 and quoted by the article (reference/engram-and-overlap.md, section 7)", "published")
_PCIE4, _PCIE5, _C2C = ("PCIe 4.0 x16", 31.5e9), ("PCIe 5.0 x16", 63e9), ("NVLink-C2C", 450e9)
_UNIFIED: tuple[str, float | None] = ("none: unified memory", None)
_BF16: tuple[Format, ...] = ("bf16",)
_FP8: tuple[Format, ...] = ("bf16", "fp8")
_FP4: tuple[Format, ...] = ("bf16", "fp8", "fp4")


def _device(
    name: str,
    title: str,
    memory_gb: float,
    bandwidth_tb_per_s: float,
    tflop_per_s: Mapping[Format, float],
    kv_formats: tuple[Format, ...],
    link: tuple[str, float | None],
    source: Source,
    doubtful: tuple[str, ...] = (),
    note: str = "",
) -> Device:
    return Device(
        name=name,
        title=title,
        memory_bytes=memory_gb * 1e9,
        bandwidth_bytes_per_s=bandwidth_tb_per_s * 1e12,
        tflop_per_s=tflop_per_s,
        kv_formats=kv_formats,
        host_link=link[0],
        host_link_bytes_per_s=link[1],
        source=source,
        exceptions=dict.fromkeys(doubtful, _DOUBTFUL),
        note=note,
    )


# fmt: off
devices: Records[Device] = Records("device", (
    _device("a100-40gb", "A100 40 GB SXM", 40, 1.56, {"bf16": 312, "int8": 624}, _BF16, _PCIE4, _DATASHEET),
    _device("a100-80gb", "A100 80 GB SXM", 80, 2.04, {"bf16": 312, "int8": 624}, _BF16, _PCIE4, _DATASHEET),
    _device("h100", "H100 SXM", 80, 3.35, {"bf16": 989, "fp8": 1979}, _FP8, _PCIE5, _DATASHEET),
    _device("h800", "H800 SXM", 80, 3.35, {"bf16": 989, "fp8": 1979}, _FP8, _PCIE5, _AGREED),
    _device("h20", "H20", 96, 4.0, {"bf16": 148, "fp8": 296}, _FP8, _PCIE5, _AGREED),
    _device("h200", "H200 SXM", 141, 4.8, {"bf16": 989, "fp8": 1979}, _FP8, _PCIE5, _DATASHEET),
    _device("gh200", "GH200 144 GB", 144, 4.9, {"bf16": 989, "fp8": 1979}, _FP8, _C2C, _DATASHEET),
    _device("b200", "B200", 180, 8.0, {"bf16": 2250, "fp8": 4500, "fp4": 9000}, _FP4, _PCIE5, _AGREED,
            note="180 to 192 GB and 7.7 to 8 TB/s by variant"),
    _device("gb200", "GB200, one of two GPUs", 186, 8.0, {"bf16": 2500, "fp8": 5000}, _FP4, _C2C, _AGREED,
            note="the link is shared by the two GPUs of a superchip"),
    _device("gb300", "GB300 / B300, one GPU", 288, 8.0, {"bf16": 2250, "fp8": 4500, "fp4": 13500}, _FP4, _C2C, _AGREED,
            note="about 279 GB usable; BF16 to 2500, FP8 to 5000, FP4 to 15000 TFLOP/s by variant; B300 has PCIe 6.0"),
    _device("rubin-article", "Rubin, figures of 2025", 288, 13.0, {"bf16": 4000, "fp8": 17500, "fp4": 50000}, _FP4,
            ("NVLink-C2C", 900e9), _ARTICLE, ("tflop_per_s", "host_link_bytes_per_s"),
            note="bandwidth as announced in 2025; compute and link are the preliminary figures of 2026"),
    _device("rubin-2026", "Rubin, preliminary figures of 2026", 288, 22.0, {"bf16": 4000, "fp8": 17500, "fp4": 50000}, _FP4,
            ("NVLink-C2C", 900e9), _AGREED, ("tflop_per_s.bf16", "tflop_per_s.fp8"),
            note="FP4 as for inference; 35000 TFLOP/s for training; the link is per superchip"),
    _device("ascend-910b", "Ascend 910B", 64, 1.6, {"bf16": 376}, _BF16, _PCIE4, _DOUBTFUL,
            note="Atlas A2; 280 to 414 TFLOP/s by variant; one source gives far less bandwidth"),
    _device("ascend-910c", "Ascend 910C", 128, 3.2, {"bf16": 752, "int8": 1500}, _BF16, ("PCIe", None), _AGREED,
            note="Atlas A3; BF16 752 to 800 TFLOP/s; 784 GB/s between cards of a supernode"),
    _device("ascend-950pr", "Ascend 950PR, plan", 128, 1.6, {"bf16": 500, "fp8": 1000, "fp4": 2000}, _FP4,
            ("PCIe", None), _DOUBTFUL, note="shipping cards are quoted with 112 GB and 1.4 TB/s"),
    _device("ascend-950dt", "Ascend 950DT, plan", 144, 4.0, {"bf16": 500, "fp8": 1000, "fp4": 2000}, _FP4,
            ("PCIe", None), _DOUBTFUL),
    _device("mi300x", "MI300X", 192, 5.3, {"bf16": 1307, "fp8": 2615}, _FP8, _PCIE5, _DATASHEET),
    _device("mi355x", "MI355X", 288, 8.0, {"bf16": 2500, "fp8": 5000, "fp4": 10000}, _FP4, _PCIE5, _DATASHEET),
    _device("rtx-4090", "GeForce RTX 4090", 24, 1.01, {"bf16": 165, "fp8": 330}, _FP8, _PCIE4, _DATASHEET,
            note="with FP32 accumulation"),
    _device("rtx-5090", "GeForce RTX 5090", 32, 1.79, {"bf16": 210, "fp8": 419}, _FP4, _PCIE5, _DATASHEET,
            note="with FP32 accumulation"),
    _device("dgx-spark", "DGX Spark GB10", 128, 0.273, {"bf16": 125, "fp8": 250}, _FP4, _UNIFIED, _AGREED,
            ("tflop_per_s",)),
    _device("strix-halo", "Ryzen AI Max+ 395", 128, 0.256, {"bf16": 59}, _BF16, _UNIFIED, _AGREED, ("tflop_per_s",)),
    _device("m3-ultra", "Apple M3 Ultra", 512, 0.819, {"bf16": 28}, _BF16, _UNIFIED, _AGREED, note="later sold with 96 GB"),
))
# fmt: on

_PEAK = "peak as specified, effective rate assumed (reference/engram-and-overlap.md, section 3)"
_LINK, _LINK_DOUBTFUL = Source(_PEAK, "derived"), Source(_PEAK, "uncertain")
_DRIVE = Source("4 KiB random reads of a fast drive, assumed (reference/engram-and-overlap.md, section 3)", "uncertain")


def _link(name: str, title: str, peak_gb: float, effective_gb: float, source: Source = _LINK, note: str = "") -> Link:
    return Link(
        name=name,
        title=title,
        peak_bytes_per_s=peak_gb * 1e9,
        effective_bytes_per_s=effective_gb * 1e9,
        source=source,
        note=note,
    )


links: Records[Link] = Records(
    "link",
    (
        _link("pcie3", "PCIe 3.0 x16", 15.8, 12),
        _link("pcie4", "PCIe 4.0 x16", 31.5, 25),
        _link("pcie5", "PCIe 5.0 x16", 63, 52),
        _link("nvlink-c2c", "NVLink-C2C", 450, 350, note="as in GH200 and GB200; the host's own memory gives no more"),
        _link("nvlink-c2c-rubin", "NVLink-C2C of Vera Rubin", 900, 700, _LINK_DOUBTFUL),
        _link("cxl2", "CXL 2.0 x8", 32, 25, _LINK_DOUBTFUL, note="per host, on top of the link to the device"),
    ),
)
drives: Records[Drive] = Records(
    "drive",
    (
        Drive(name="nvme-gen4", title="NVMe Gen4", reads_per_s=1.0e6, latency_s=80e-6, source=_DRIVE),
        Drive(name="nvme-gen5", title="NVMe Gen5", reads_per_s=2.5e6, latency_s=65e-6, source=_DRIVE),
    ),
)


def link_of(device: Device) -> Link | None:
    """The link a device has to host memory; None where memory is unified. InputError where no rate was found for it."""
    if device.unified_memory:
        return None
    for link in links.values():
        if link.peak_bytes_per_s == device.host_link_bytes_per_s:
            return link
    raise InputError(
        f"no rate is known for the host link of {device.title} ({device.host_link}); choose one of {', '.join(links)}"
    )
