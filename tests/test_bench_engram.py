"""``workbench bench engram`` runs, measures what it says, and leaves nothing behind."""

import pytest

from benchmarks import engram as bench
from workbench.errors import InputError


def test_the_bench_runs_and_removes_its_tables(tmp_path, capsys):
    bench.main(["--quick", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert "times numpy.take" in said and "fewer bytes read" in said and "waits at most" in said
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "available_bytes", lambda: 10.0)
    with pytest.raises(InputError, match="memory"):
        bench.main(["--quick", "--folder", str(tmp_path)])
    with pytest.raises(InputError, match="is no folder"):
        bench.main(["--quick", "--folder", str(tmp_path / "nowhere")])
    assert not list(tmp_path.iterdir())
