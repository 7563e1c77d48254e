"""Sweeps of a few steps: points learn and repeat, finished ones stay, a lost worker costs its own, bad input is one error."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from workbench import cli, frontier
from workbench.errors import InputError
from workbench.frontier import Variant, read_point, read_points
from workbench.training import light, sweep

SHORT = [Variant(seed=seed, steps=2) for seed in range(6)]


@pytest.fixture(scope="module", autouse=True)
def _hardly_any_scoring() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "SCORED_BATCHES", 1)
        patch.setattr(sweep, "SCORED_LENGTH", 128)
        yield


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Dask scheduler in this process with two workers that are threads: what is patched here holds there."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0", silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


def quick_work(gate: Path, variant: dict[str, Any], threads: int) -> dict[str, Any]:
    """What a worker process does in the test that kills one: the real training, scored on less.

    All points but the first are held at the gate until somebody was killed, so that none ends at that very moment.
    """
    sweep.SCORED_BATCHES, sweep.SCORED_LENGTH = 1, 128
    point = sweep.train_point(Variant.from_dict(variant))[0].to_dict()
    deadline = time.monotonic() + 120
    while variant["seed"] and not gate.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return point


def files(folder: Path) -> dict[str, int]:
    """Every file and when it was last written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_point_learns_something_and_comes_out_alike_again():
    variant, said = Variant(steps=12, engram=True), []
    point, model = sweep.train_point(variant, progress=lambda text, share: said.append(share))
    again, _ = sweep.train_point(variant)
    assert point.scores == again.scores and point.recipe == again.recipe
    untrained = sweep.score_light(type(model).untrained(variant.config(), variant.seed))
    assert point.scores["text_loss"] < untrained["text_loss"] - 0.3 and point.scores["questions"] > 5
    assert said == sorted(said) and said[-1] == 1.0 and len(said) == 12
    assert point.recipe["seed"] == variant.seed and sum(phase["steps"] for phase in point.recipe["phases"]) == 12


def test_layers_select_sparsely_in_the_last_fifth_alone(monkeypatch):
    dense = []
    real = sweep.train_step
    monkeypatch.setattr(sweep, "train_step", lambda *a, dense: dense_noted(dense, real, *a))

    def dense_noted(flag: bool, step: Any, *arguments: Any) -> Any:
        dense.append(flag)
        return step(*arguments, dense=flag)

    sweep.train_point(Variant(steps=5))
    assert dense == [True] * 4 + [False]


def test_scores_of_a_model_that_knows_everything_and_of_one_that_guesses(monkeypatch):
    import torch

    class Oracle:
        def __call__(self, ids):
            logits = torch.full((*ids.shape, light.VOCAB), -30.0)
            logits[:, :-1].scatter_(2, ids[:, 1:, None], 30.0)
            return logits

    class Blind:
        def __call__(self, ids):
            return torch.zeros(*ids.shape, light.VOCAB)

    known, blind = sweep.score_light(Oracle()), sweep.score_light(Blind())
    assert known["recall"] == 1.0 and known["text_loss"] < 1e-6
    assert blind["recall"] == 0.0 and blind["text_loss"] == pytest.approx(blind["text_loss_uniform"])


def test_a_point_is_stopped_between_steps_and_nothing_comes_of_it():
    steps: list[str] = []
    with pytest.raises(sweep.Stopped, match="after 3 of 50 steps"):
        sweep.train_point(Variant(steps=50), progress=lambda text, share: steps.append(text), stop=lambda: len(steps) == 3)


def test_an_interrupted_sweep_goes_on_with_what_is_missing(address, tmp_path):
    def interrupt(text: str, share: float) -> None:
        if text.startswith("2 of 6"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(SHORT, tmp_path, scheduler=address, progress=interrupt)
    before = files(tmp_path)
    assert len(before) == 2
    said: list[float] = []
    found = sweep.sweep(SHORT, tmp_path, scheduler=address, progress=lambda text, share: said.append(share))
    assert sorted(f"{name}.json" for name in found.kept) == sorted(before) and len(found.made) == 4 and not found.failed
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before and len(after) == 6  # finished points were not touched
    assert said == sorted(said) and said[-1] == 1.0
    again = sweep.sweep(SHORT, tmp_path, scheduler=address)
    assert len(again.kept) == 6 and not again.made and files(tmp_path) == after


def test_one_points_failure_is_told_and_the_others_are_kept(address, tmp_path, monkeypatch):
    def work(variant: dict[str, Any], threads: int) -> dict[str, Any]:
        if variant["seed"] == 1:
            raise ValueError("the loss is <not> finite")
        return sweep.train_point(Variant.from_dict(variant))[0].to_dict()

    monkeypatch.setattr(sweep, "_work", work)
    found = sweep.sweep(SHORT[:3], tmp_path, scheduler=address)
    assert list(found.failed) == [SHORT[1].name] and "the loss is <not> finite" in found.failed[SHORT[1].name]
    assert sorted(found.made) == sorted([SHORT[0].name, SHORT[2].name]) and len(files(tmp_path)) == 2


def test_a_corrupt_file_is_named_and_its_point_made_anew(address, tmp_path):
    sweep.sweep(SHORT[:2], tmp_path, scheduler=address)
    broken, whole = (tmp_path / f"{variant.name}.json" for variant in SHORT[:2])
    broken.write_text(whole.read_text()[:100])
    kept = whole.stat().st_mtime_ns
    found = sweep.sweep(SHORT[:2], tmp_path, scheduler=address)
    assert len(found.broken) == 1 and str(broken) in found.broken[0]
    assert found.made == [SHORT[0].name] and read_point(broken).variant == SHORT[0] and whole.stat().st_mtime_ns == kept


def test_a_lost_worker_costs_only_the_point_it_was_at(tmp_path, monkeypatch):
    """The sweep's own cluster of two processes; the one that is at work when the first point is done is killed."""
    distributed = pytest.importorskip("distributed")
    clusters: list[Any] = []

    class Watched(distributed.LocalCluster):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            clusters.append(self)

    monkeypatch.setattr(distributed, "LocalCluster", Watched)
    gate, points = tmp_path / "gate", tmp_path / "points"
    monkeypatch.setattr(sweep, "_work", functools.partial(quick_work, gate))
    variants = [Variant(seed=seed, steps=6) for seed in range(4)]
    hit: list[str] = []
    begun: Counter[str] = Counter()
    lock = threading.Lock()

    def kill_one(text: str, share: float) -> None:
        if hit or not text.startswith("1 of 4"):
            return
        (cluster,) = clusters
        busy = [state for state in cluster.scheduler.workers.values() if state.processing]
        with lock:
            nanny = next(nanny for nanny in cluster.workers.values() if nanny.worker_address == busy[0].address)
            hit.append(next(iter(busy[0].processing)).key)
            os.kill(nanny.process.pid, signal.SIGKILL)
            gate.touch()

    found = sweep.sweep(variants, points, progress=kill_one)
    log = clusters[0].scheduler.transition_log
    for entry in log:
        key, finish = entry[0], entry[2]
        begun[key] += finish == "processing"
    assert hit, "no worker was at work after the first point"
    assert sorted(found.made) == sorted(variant.name for variant in variants) and not found.failed
    assert {point.variant for point in read_points(points)[0]} == set(variants)
    again = {key for key, times in begun.items() if times > 1}
    assert again == set(hit), "only the point of the worker that was lost is begun a second time"


@pytest.mark.parametrize(
    ("address", "said"),
    [("tcp://127.0.0.1:1", "no Dask scheduler answers at"), ("nonsense", "no Dask scheduler"), ("ftp://x:1", "ftp")],
)
def test_a_scheduler_that_does_not_answer_is_one_error_in_time(tmp_path, address, said):
    with pytest.raises(InputError, match=said) as refused:
        sweep.sweep(SHORT[:1], tmp_path, scheduler=address, timeout_s=0.5)
    assert "\n" not in str(refused.value) and "dask scheduler" in str(refused.value) and not files(tmp_path)


def test_a_scheduler_without_workers_is_one_error_in_time(tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0", silence_logs=50) as cluster,
        pytest.raises(InputError, match="has no workers"),
    ):
        sweep.sweep(SHORT[:1], tmp_path, scheduler=cluster.scheduler_address, timeout_s=0.5)


def test_bad_input_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_cluster", lambda *a: pytest.fail("a cluster was started"))
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot hold the points .*another folder"):
            sweep.sweep(SHORT, folder)
    for wrong in ({"workers": 0}, {"threads": True}, {"workers": 1.5}):
        with pytest.raises(InputError, match="whole number from 1"):
            sweep.sweep(SHORT, tmp_path, **wrong)
    with pytest.raises(InputError, match="nothing to sweep"):
        sweep.sweep([], tmp_path)


def test_the_command_prints_points_and_says_what_failed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "SMALL", (Variant(), Variant(hca_share=1.0)))

    def fake(variants, out, **where):
        assert [v.steps for v in variants] == [2, 2] and where["workers"] == 3
        point, _ = sweep.train_point(variants[0])
        frontier.write_point(point, out)
        return sweep.Sweep(made=[variants[0].name], failed={variants[1].name: "it broke"}, broken=["x.json is no point"])

    monkeypatch.setattr(sweep, "sweep", fake)
    status = cli.main(["sweep", "--out", str(tmp_path), "--steps", "2", "--workers", "3"])
    said = capsys.readouterr()
    assert status == 2 and "m4-k4-hca0-2steps-seed1" in said.out and "1 made, 0 were there" in said.out
    assert "1 of 2 points failed, hca100-2steps-seed1 first: it broke" in said.err and "x.json is no point" in said.err


@pytest.mark.parametrize(("flags", "said"), [("--seeds 0", "seeds"), ("--steps 0", "steps"), ("--grid big", "grid")])
def test_the_command_refuses_bad_numbers_in_one_line(capsys, tmp_path, flags, said):
    assert cli.main(["sweep", "--out", str(tmp_path), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_ctrl_c_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    def interrupted(*a, **b):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "sweep", interrupted)
    assert cli.main(["sweep", "--out", str(tmp_path)]) == 130
    assert "keeps the finished points" in capsys.readouterr().err
