"""``workbench bench following`` runs, counts frames and tells both bars; it counts pictures and nothing else."""

import ipywidgets as ipw

import workbench as wb
from benchmarks import following as bench


def test_the_bench_runs_and_tells_both_bars(capsys):
    bench.main(["--quick"])
    said = capsys.readouterr().out
    assert "48 tokens:" in said and "frames a second: map" in said and "KV chart" in said
    assert said.count("met)") == 2 and "bar 5" in said and "bar 1.15" in said and "record:" not in said


def test_pictures_are_counted_once_each_and_nothing_else_is():
    with bench.counted_messages() as sent:
        explorer = wb.AttentionExplorer(wb.Trace.load("needle"))
        label = ipw.HTML()
        label.value = "words"
        explorer.map.label = "another label"
        for token in (70, 80, 90):
            explorer.session.choose_token(token)
    counts = {name: len(sent.get(part.model_id, ())) for name, part in (("map", explorer.map), ("text", explorer.text))}
    assert counts == {"map": 1, "text": 4}  # the first of each; the map keeps its picture when another query is chosen
    assert len(sent.get(explorer.strip.model_id, ())) == 4 and label.model_id not in sent


def test_the_bars_are_held_against_medians_and_the_slowest_part():
    rates = [{"map": 9.0, "text": 4.0}, {"map": 5.5, "text": 6.0}, {"map": 7.0, "text": 5.1}]
    rates = [rate | {"KV chart": 1.9} for rate in rates]
    pairs = [{"frames a second": r, "ratio": q} for r, q in zip(rates, (1.3, 1.1, 1.0), strict=True)]
    frames, ratio = bench.bars(pairs)
    assert (frames["value"], frames["met"]) == (5.1, True) and (ratio["value"], ratio["met"]) == (1.1, True)
    assert not bench.bars([pairs[0]])[1]["met"]
