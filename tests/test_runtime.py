import os
import subprocess
import sys

import pytest

from workbench import runtime
from workbench.errors import InputError


@pytest.mark.parametrize(
    ("version", "bounds", "expected"),
    [
        ("2.13.0+cpu", ">=2.6,<2.14", True),
        ("2.14.0", ">=2.6,<2.14", False),
        ("2.5.1", "<2.14,>=2.6", False),
        ("2.6", ">=2.6.0", True),
        ("5.23.0", "==5.23.0", True),
        ("5.23.1", "==5.23.0", False),
        ("0.11.0", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version, bounds, expected):
    assert runtime.within(version, bounds) is expected


def test_a_run_leaves_one_core_to_the_lookup_and_obeys_the_environment(monkeypatch):
    monkeypatch.setattr(runtime, "cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert runtime.threads_for_run() == 6
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert runtime.threads_for_run() == 3
    monkeypatch.setattr(runtime, "cores", lambda: 1)
    assert runtime.threads_for_run() == 1


def test_a_container_quota_limits_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)), raising=False)
    monkeypatch.setattr(runtime, "_read", {"/sys/fs/cgroup/cpu.max": "250000 100000\n"}.get)
    assert runtime.cores() == 3
    monkeypatch.setattr(runtime, "_read", {"/sys/fs/cgroup/cpu.max": "max 100000\n"}.get)
    assert runtime.cores() == 7


def test_the_processor_is_named_without_trademarks(monkeypatch):
    monkeypatch.setattr(runtime, "cores", lambda: 2)
    monkeypatch.setattr(
        runtime, "_read", lambda path: "model\t\t: 85\nmodel name\t: Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz\n"
    )
    assert runtime.device_name("cpu") == "CPU (Intel Xeon Gold 6130, 2 cores)"
    assert runtime.slug(runtime.device_name("cpu")) == "cpu-intel-xeon-gold-6130-2-cores"


def test_threads_are_set_for_the_whole_process():
    code = "from workbench import runtime; runtime.use_threads(2); import torch; print(torch.get_num_threads())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=runtime.CHECKOUT)
    assert out.stdout.strip() == "2"
    with pytest.raises(InputError, match="at least 1, got 0"):
        runtime.use_threads(0)


def test_tests_compute_with_one_thread():
    import torch

    assert torch.get_num_threads() == 1


def test_a_device_is_picked_by_the_name_torch_gives_it(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.pick_device("auto") == runtime.pick_device("cpu") == torch.device("cpu")
    assert runtime.pick_device(torch.device("cpu")).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runtime.pick_device("auto").type == "cuda"
    asked = []
    monkeypatch.setattr(torch, "zeros", lambda n, device: asked.append(device) or torch.ones(n))
    for name, kind, index in (("cuda:1", "cuda", 1), ("mps", "mps", None), ("xpu", "xpu", None), ("hpu:3", "hpu", 3)):
        device = runtime.pick_device(name)
        assert (device.type, device.index) == (kind, index) and asked[-1] == device


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "cuda:", "cudax", "npu:0", ""])
def test_a_device_torch_does_not_know_is_refused_in_one_line(name):
    with pytest.raises(InputError, match="unknown to torch") as refused:
        runtime.pick_device(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["xpu", "cuda:97", "meta"])
def test_a_device_that_cannot_be_allocated_on_is_refused_in_one_line(name):
    with pytest.raises(InputError, match=f"device '{name}' is not available: .*use 'cpu'") as refused:
        runtime.pick_device(name)
    assert "\n" not in str(refused.value)


def test_waiting_for_a_cpu_is_nothing_and_other_devices_are_waited_for(monkeypatch):
    import torch

    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    runtime.synchronize(torch.device("cpu"))
    runtime.synchronize(torch.device("mps"))
    assert [d.type for d in waited] == ["mps"]


def test_the_machine_is_described_in_plain_values_and_without_torch():
    code = "import json, sys; from workbench import runtime; print(json.dumps(runtime.machine()), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=runtime.CHECKOUT)
    assert out.stdout.strip().endswith("False")
    found = runtime.machine(accelerator=True)
    assert found["cores"] == runtime.cores() >= 1 and found["device"].startswith("CPU (")
    assert found["threads"] == 1 and isinstance(found["cuda"], list)


def test_requirements_split_what_runs_from_what_tests():
    found = runtime.requirements()
    assert found["torch"][1] == "" and found["pytest"][1] == "test"
    assert all(
        runtime.within(runtime.installed_version(name) or "0", bounds) for name, (bounds, extra) in found.items() if not extra
    )


def test_free_memory_lies_within_all_memory():
    assert 0 < runtime.available_bytes() <= (runtime.memory_bytes() or float("inf"))
    assert (runtime.size_text(1.5e9), runtime.size_text(2e7)) == ("1.5 GB", "20.0 MB")


def test_copy_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch):
    now = iter(range(0, 1000, 2))  # every copy seems to take two seconds
    monkeypatch.setattr(runtime, "COPIED_BYTES", 1000)
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: float(next(now)))
    assert runtime.copy_bandwidth() == 1000.0
