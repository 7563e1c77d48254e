"""Training the points of the frontier: one by one here, or many on a Dask cluster, ``workbench sweep``.

Each finished point is written at once, so a sweep that was interrupted goes on with the points that are missing; a worker that
is lost costs the point it was at, which another worker takes up.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workbench.errors import InputError, WorkbenchError
from workbench.frontier import SCORED_LENGTH, Point, Variant, read_point, write_point
from workbench.model.families import model_class
from workbench.model.language_model import LanguageModel
from workbench.runtime import device_name, use_threads
from workbench.training import light
from workbench.training.optimiser import optimisers
from workbench.training.recipes import Phase, Recipe
from workbench.training.score import SEED
from workbench.training.train import circumstances, learning_rate, next_token_loss, train_step

BATCH, LENGTH = 8, 128  # sequences of a step and symbols in each
DENSE_SHARE = 0.8  # of the steps, in which every query attends to all entries while the indexers learn; then to its top-k
SCORED_BATCHES, SCORED_TEXTS = 4, 4  # and texts in each
CONNECT_TIMEOUT_S = 10.0
Progress = Callable[[str, float], None]  # what is being done, share done


class Stopped(WorkbenchError):
    """Training ended because it was asked to."""


def recipe_of(variant: Variant) -> Recipe:
    """What is stored beside the scores; ``optimisers`` and ``train_step`` take their rates from it."""
    dense = round(DENSE_SHARE * variant.steps)
    phases = [Phase(steps=n, length=LENGTH, batch=BATCH) for n in (dense, variant.steps - dense) if n]
    return Recipe(
        name=variant.name,
        seed=variant.seed,
        phases=tuple(phases),
        engram=variant.engram,
        vocab_size=light.VOCAB,
        plain_share=0.0,
        once_share=0.0,
        short_share=0.0,
        index_topk=variant.topk,
        warmup_steps=min(20, max(1, variant.steps // 5)),
    )


def train_point(
    variant: Variant, *, progress: Progress | None = None, stop: Callable[[], bool] | None = None
) -> tuple[Point, LanguageModel]:
    """Train and score one variant in this thread. Raises Stopped soon after ``stop()`` says True."""
    recipe, config = recipe_of(variant), variant.config()
    model = model_class(config).untrained(config, variant.seed)
    model.name = variant.name
    parts = optimisers(model, recipe)
    peaks = [[group["lr"] for group in part.param_groups] for part in parts]
    dense_steps = round(DENSE_SHARE * variant.steps)
    start = time.thread_time()
    model.train()
    for step in range(variant.steps):
        if stop is not None and stop():
            raise Stopped(f"{variant.name} was stopped after {step} of {variant.steps} steps; nothing was kept of it")
        for part, rates in zip(parts, peaks, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(recipe, step, variant.steps)
        batch = light.batch(np.random.default_rng([variant.seed, step]), BATCH, LENGTH)
        losses = train_step(model, parts, recipe, batch, dense=step < dense_steps)
        if progress is not None:
            progress(f"step {step + 1}/{variant.steps} text {losses['text']:.2f} reads {losses['reads']:.2f}",
                     (step + 1) / variant.steps)  # fmt: skip
    model.eval()
    model.what = "toy, trained"
    spent = round(time.thread_time() - start, 1)
    with_what = circumstances(spent) | {"device": device_name()}
    return Point(variant, score_light(model), recipe.to_dict(), with_what), model


@torch.inference_mode()
def score_light(model: LanguageModel) -> dict[str, float]:
    """Recall of records beyond the windows' reach, and loss on filler, in texts that no training saw; chance beside each."""
    rng = np.random.default_rng([SEED, 0])
    right, losses, symbols = [], [], 0
    for _ in range(SCORED_BATCHES):
        batch = light.batch(rng, SCORED_TEXTS, SCORED_LENGTH)
        ids = torch.from_numpy(batch.ids)
        logits = model(ids)
        row, t = np.nonzero(batch.read_mask)
        far = t - batch.needle_position[row, t] > light.FAR
        row, t = row[far], t[far]
        right.append(logits.argmax(-1).numpy()[row, t] == batch.ids[row, t + 1])
        losses.append(float(next_token_loss(logits, ids, torch.from_numpy(batch.text_mask))) * batch.text_mask.sum())
        symbols += int(batch.text_mask.sum())
    answered = np.concatenate(right)
    return {
        "recall": float(answered.mean()),
        "questions": len(answered),
        "chance": 1 / light.VALUES,
        "beyond": light.FAR,
        "length": SCORED_LENGTH,
        "text_loss": float(sum(losses) / symbols),
        "text_symbols": symbols,
        "text_loss_best": light.best_text_loss(),
        "text_loss_uniform": float(np.log(light.VOCAB)),
    }


@dataclass
class Sweep:
    """What came of a sweep: names of points that were there, made now, and failed with the reason; files found broken."""

    kept: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def sweep(
    variants: Sequence[Variant],
    out: Path | str,
    *,
    scheduler: str | None = None,
    workers: int = 2,
    threads: int = 1,
    progress: Progress | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
) -> Sweep:
    """Train the variants that ``out`` holds no point of, and write each as soon as it is done.

    On ``workers`` processes of ``threads`` torch threads on this machine, or on the workers of the Dask ``scheduler`` at that
    address, which must have the workbench, too. A file that holds no point of its name is named in the result and made anew.
    What fails is in the result, everything else goes on. Raises InputError for an unusable folder and a scheduler that does not
    answer, both before anything is trained.
    """
    if not variants:
        raise InputError("there is nothing to sweep; give at least one variant")
    for name, value in (("workers", workers), ("threads", threads)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} must be a whole number from 1, got {value!r}")
    out = _usable_folder(Path(out))
    found, missing = Sweep(), []
    for variant in dict.fromkeys(variants):
        try:
            found.kept.append(read_point(out / f"{variant.name}.json").variant.name)
        except InputError as error:
            if (out / f"{variant.name}.json").exists():
                found.broken.append(str(error))
            missing.append(variant)
    if missing:
        with _cluster(scheduler, workers, timeout_s) as client:
            _run(client, missing, out, threads, found, progress or (lambda text, share: None))
    return found


def _usable_folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"{out} cannot hold the points of a sweep ({error.strerror or error}); give another folder") from None
    return out


@contextmanager
def _cluster(scheduler: str | None, workers: int, timeout_s: float) -> Iterator[Any]:
    """A Dask client of the scheduler at that address, or of a cluster of this machine's own that ends with it."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError:
        raise WorkbenchError('a sweep needs Dask: pip install -e ".[sweep]"') from None
    one_each = {"distributed.scheduler.worker-saturation": 1.0}  # a worker holds the point it is at and none besides
    with dask.config.set({"distributed.comm.timeouts.connect": f"{timeout_s} s"} | one_each):
        if scheduler is None:
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=":0",
                silence_logs=50, local_directory=tempfile.gettempdir(),
            )  # fmt: skip
            with cluster, Client(cluster) as client:
                yield client
            return
        try:
            client = Client(scheduler, timeout=f"{timeout_s} s")
        except (OSError, TimeoutError, ValueError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"no Dask scheduler answers at {scheduler!r} ({reason:.120}); give the address that `dask scheduler` prints, "
                "such as tcp://127.0.0.1:8786, or none to use this machine"
            ) from None
        with client:
            try:
                client.wait_for_workers(1, timeout=timeout_s)
            except TimeoutError:
                raise InputError(f"the Dask scheduler at {scheduler!r} has no workers; start some with `dask worker`") from None
            yield client


def _run(client: Any, missing: Sequence[Variant], out: Path, threads: int, found: Sweep, say: Progress) -> None:
    from distributed import as_completed

    say(f"0 of {len(missing)} points", 0.0)
    futures = {
        client.submit(_work, asdict(variant), threads, pure=False, priority=-i): variant for i, variant in enumerate(missing)
    }
    try:
        for done, future in enumerate(as_completed(futures), 1):
            variant = futures[future]
            try:
                write_point(Point.from_dict(future.result()), out)
                found.made.append(variant.name)
            except (Exception, CancelledError) as error:  # one point's trouble, whatever it is, is not the others'
                found.failed[variant.name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            future.release()  # a result that is written need not be made again when its worker is lost
            say(f"{done} of {len(missing)} points, last {variant.name}", done / len(missing))
    finally:
        with suppress(Exception):  # the cluster may be what is gone
            client.cancel([future for future in futures if not future.done()])


def _work(variant: dict[str, Any], threads: int) -> dict[str, Any]:
    """One point on a worker, sent and returned as plain values."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    use_threads(threads)
    return train_point(Variant.from_dict(variant))[0].to_dict()
