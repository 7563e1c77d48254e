"""The machine under the workbench: threads, devices, and what a label or ``workbench doctor`` says about them.

Threads are set here and nowhere else. torch is imported only by the functions that need it.
"""

from __future__ import annotations

import operator
import os
import platform
import re
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import InputError

if TYPE_CHECKING:
    import torch

CHECKOUT = Path(__file__).resolve().parents[1]
# V4.1's independent implementation, for tests. It asks for much that its model code does without, so it is installed alone.
LONE_ORACLE = ("nemo-automodel", "==0.7.0")
_COMPARE = {"==": operator.eq, "!=": operator.ne, ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
COPIED_BYTES, COPIES = 2**28, 5  # far more than any cache of a CPU holds
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def cores() -> int:
    """CPU cores this process may use: its affinity mask, and a container's quota where one is set."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")  # "max 100000", or "150000 100000" for 1.5 cores
    if quota.isdigit() and period.strip().isdigit():
        count = min(count, -(-int(quota) // int(period)))
    return max(1, count)


def memory_bytes() -> int | None:
    """Main memory this process may use, or None where the system does not say (Windows)."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def available_bytes(device: str | torch.device = "cpu") -> float:
    """Bytes of memory that may still be used, on a CUDA device or on the host, as far as the system says."""
    if str(device).startswith("cuda"):
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    known = [limit for limit in (memory_bytes(),) if limit is not None]
    free = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return float(min([*known, *([1024 * int(free[1])] if free else [])], default=float("inf")))


def size_text(nbytes: float) -> str:
    """ "1.5 GB" or "20.0 MB": a size in a sentence."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes per second that copying a large tensor moves, read and written together: the best of several copies.

    It is what a decode step is held against: no step can read its cache and weights faster than memory delivers them.
    """
    import torch

    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(COPIES):
        synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * COPIED_BYTES / best


def synchronise(device: str | torch.device) -> None:
    """Wait until a device has done what it was given; the CPU always has."""
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def threads_for_run() -> int:
    """Threads for a live run: one core is left to the Engram lookup; OMP_NUM_THREADS, where set, is an upper limit."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    free = max(1, cores() - 1)
    return min(free, int(limit)) if limit.isdigit() and int(limit) else free


def use_threads(n: int) -> None:
    """Let torch compute with ``n`` threads from now on, in the whole process. Raises InputError if n is not positive."""
    if n < 1:
        raise InputError(f"threads must be at least 1, got {n}")
    import torch

    torch.set_num_threads(n)


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The torch device of that name, as torch spells it: "cpu", "cuda:1", "mps", "xpu", "npu:0"; "auto" is CUDA, else the CPU.

    Raises InputError for a name torch does not know, or a device on which it cannot allocate here.
    """
    import torch

    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            f"device {str(name)!r} is unknown to torch {torch.__version__}; give 'auto', 'cpu', 'cuda', 'cuda:N', 'mps' or "
            "another name it has (one from an extension once that is imported)"
        ) from None
    try:
        torch.zeros(1, device=device).tolist()  # a value comes back: "meta" has none
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:  # each build says no in its own way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"device {str(name)!r} is not available: torch {torch.__version__} cannot use it here ({reason:.120}); use 'cpu'"
        ) from None
    return device


def synchronize(device: torch.device) -> None:
    """Wait until everything asked of ``device`` so far is done, so that a clock read next counts it."""
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize(device)


def device_name(device: str | torch.device = "cpu") -> str:
    """A label for figures and traces, such as "CPU (AMD EPYC, 2 cores)" or "NVIDIA H100 80GB HBM3"."""
    if not str(device).startswith("cpu"):
        import torch

        named = getattr(torch.get_device_module(torch.device(device)), "get_device_name", None)
        return named(device) if named else str(device)  # Apple's module names none
    return f"CPU ({_processor()}, {cores()} core{'s' if cores() > 1 else ''})"


def slug(text: str) -> str:
    """A device's label as part of a file name: "cpu-amd-epyc-2-cores"."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def machine(*, accelerator: bool = False) -> dict[str, Any]:
    """What a measurement should be stored with, as plain values; what the system does not tell is None.

    ``accelerator=True`` imports torch to ask for CUDA devices; otherwise "cuda" is missing and nothing is imported.
    """
    found: dict[str, Any] = {
        "device": device_name("cpu"),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # runnable processes, last minute
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": installed_version("torch"),
    }
    if accelerator:
        import torch

        devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        found |= {"cuda": [torch.cuda.get_device_name(i) for i in devices], "threads": torch.get_num_threads()}
    return found


def installed_version(package: str) -> str | None:
    """The installed version of a package, read from its metadata, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, tuple[str, str]]:
    """Package -> (version bounds, the extra that wants it or ""), as this workbench declares them."""
    try:
        lines = metadata.requires("deepseek-v4-workbench") or []
    except metadata.PackageNotFoundError:  # run from a checkout that was not installed
        import tomllib

        project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"].items()
        lines = project["dependencies"] + [f'{line}; extra == "{extra}"' for extra, own in extras for line in own]
    found = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        name, bounds = re.fullmatch(r"([\w.-]+)\s*(.*?)\s*", requirement).groups()  # type: ignore[union-attr]
        extra = re.search(r"extra == [\"'](\w+)", marker)
        found[name] = (bounds, extra[1] if extra else "")
    return found


def within(version: str, bounds: str) -> bool:
    """Whether a version such as "2.13.0+cpu" satisfies bounds such as ">=2.6,<2.14" or "==5.23.0"; numbers only."""
    for bound in filter(None, bounds.split(",")):
        sign, limit = re.fullmatch(r"\s*([=<>!]+)\s*(.+?)\s*", bound).groups()  # type: ignore[union-attr]
        if not _COMPARE[sign](_numbers(version), _numbers(limit)):
            return False
    return True


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome, which the browser tests drive."""
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


def checkpoints() -> dict[str, int]:
    """Shipped checkpoints: name -> bytes of its folder."""
    folders = sorted(path.parent for path in (Path(__file__).parent / "assets").glob("*/config.json"))
    return {f.name: sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in folders}


def _numbers(version: str) -> tuple[int, ...]:
    """Release numbers, trailing zeros dropped so that 3 equals 3.0."""
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in release.group().split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _processor() -> str:
    """The processor's name; an architecture ("aarch64") where no better name is known."""
    named = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    name = named.group(1) if named else platform.processor() or platform.machine() or sys.platform
    return re.sub(r"\((?:R|TM)\)|\bCPU\b|\bProcessor\b|@.*|\d+-Core", "", name).replace("  ", " ").strip() or name


def _read(path: str) -> str:
    """A file of the system, empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
