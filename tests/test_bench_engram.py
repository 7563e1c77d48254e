"""``workbench bench engram`` runs, measures what it says, and leaves nothing behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import engram as bench
from workbench.errors import InputError


def test_the_bench_runs_and_removes_its_tables(tmp_path, capsys):
    bench.main(["--quick", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert (
        "times numpy.take" in said
        and "fewer bytes read" in said
        and "waits at most" in said
        and "of them different within their call" in said
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("wait_for", ["engram-*/*.table", "engram-*/hot.table"], ids=["first table", "table of the text"])
def test_an_interrupt_leaves_no_table_behind(tmp_path, wait_for):
    command = [sys.executable, "-m", "benchmarks.engram", "--quick", "--folder", str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(bench.__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(wait_for)):
            assert process.poll() is None and time.monotonic() < deadline, "no table was written"
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode != 0 and b"KeyboardInterrupt" in error
    assert not list(tmp_path.iterdir())


def test_an_interrupt_beside_the_spinning_thread_ends_it():
    before = bench.threading.active_count()

    def interrupted(ids):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.longest_gap(interrupted, np.zeros(1, int))
    assert bench.threading.active_count() == before


def test_text_asks_for_the_same_rows_again_and_every_row_is_one_of_the_table():
    rows, asked = bench.text_rows(700, 20_000)
    assert asked.shape[1] == 24 and asked.min() >= 0 and asked.max() < rows
    assert 24 * 700 <= rows < 24 * 1000 and bench.shares_of_lookups(asked)["10%"] > 0.2


def test_the_table_of_the_text_is_a_gibibyte():
    rows = 24 * bench.HEAD_ROWS  # prime sizes are a little larger
    assert rows * bench.row_bytes("fp8", 256) >= 2**30


def test_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "available_bytes", lambda: 10.0)
    with pytest.raises(InputError, match="memory"):
        bench.main(["--quick", "--folder", str(tmp_path)])
    with pytest.raises(InputError, match="is no folder"):
        bench.main(["--quick", "--folder", str(tmp_path / "nowhere")])
    assert not list(tmp_path.iterdir())
