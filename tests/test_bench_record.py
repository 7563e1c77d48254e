"""What benchmarks store: one JSON file each, named after what was measured on, that says how busy the machine was."""

import json

from benchmarks import _record as record


def test_a_record_has_the_machine_and_its_load_before_and_after_and_is_named_by_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "benchmarks" / "results")
    (tmp_path / "benchmarks").mkdir()
    found = record.begin("nothing", rounds=3)
    found["ms"] = 1.5
    path = record.store(found, "CPU (Some, 2 cores) bf16")
    assert path == tmp_path / "benchmarks" / "results" / "nothing-cpu-some-2-cores-bf16.json"
    assert capsys.readouterr().out == "record: benchmarks/results/nothing-cpu-some-2-cores-bf16.json\n"
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert (kept["benchmark"], kept["rounds"], kept["ms"]) == ("nothing", 3, 1.5)
    assert "load_average" in kept["machine"] and "load after" in kept and "niceness" in kept
    assert found.keys() == kept.keys() - {"load after"}  # a record may be stored again, with a later load


def test_a_record_goes_where_it_is_told(tmp_path, capsys):
    path = record.store(record.begin("nothing"), path=tmp_path / "here.json")
    assert path == tmp_path / "here.json" and json.loads(path.read_text())["machine"]["cores"] >= 1
    assert str(path) in capsys.readouterr().out
