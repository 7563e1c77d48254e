"""``workbench bench tiles`` runs, says what it measured against which bar, and its random records obey the rules of traces."""

import numpy as np

from benchmarks import tiles as bench
from workbench.trace import Trace


def test_the_bench_runs_and_tells_every_bar(capsys):
    bench.main(["--quick"])
    said = capsys.readouterr().out
    for words in ("focus tile, bytes", "focus tile, ms", "32 thumbnails", "strip, bytes", "strip, ms", "slider move"):
        assert words in said
    assert said.count("one run less another, head") == 6
    assert said.count("met)") == 8 and "one query's strip" in said and "record:" not in said


def test_its_traces_are_what_a_recorder_leaves(tmp_path):
    trace = Trace.load(bench.sparse_trace(300).save(tmp_path / "trace"))  # checked when loaded
    for record in trace.layers:
        t = np.arange(300)
        for name, probs in (("window", record.window_probs), ("entry", record.entry_probs), ("kept", record.selected_probs)):
            assert probs is None or (probs.min() >= 0 and probs.max() <= 1), name
        assert not record.window_probs[0, :, :-1].any()
        if record.selected is not None:
            kept = record.selected
            assert (kept < ((t + 1) // record.ratio)[:, None]).all()
            assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in kept)


def test_the_long_strips_query_sees_all_its_entries():
    trace = bench.last_query(4096)
    record = trace.layers[0]
    assert record.entries == 1024 and len(record.index_scores(4095)) == 1024
