"""Live runs: they answer between two steps, end in a state that says how, record what they did, and leave nothing behind."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.slow_reference import CONFIG, ENGRAM, random_ids, random_model
from tests.test_trace import assert_same
from workbench import live
from workbench.errors import InputError
from workbench.live import LiveRun, RunEvent, run
from workbench.model.transformer import V4Model
from workbench.recorder import Recorder
from workbench.trace import Trace

WITH_ENGRAM = replace(CONFIG, engram=ENGRAM)
PROMPT = random_ids(WITH_ENGRAM, 1, 19)[0].tolist()
CHUNK = 8  # so that 19 tokens are three prefill steps


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(CONFIG.vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.fixture
def model(monkeypatch) -> Iterator[V4Model]:
    monkeypatch.setattr(live, "PREFILL_CHUNK", CHUNK)
    before = set(threading.enumerate())
    made = random_model(WITH_ENGRAM)
    made.tokenizer = word_tokenizer()
    yield made
    made.fetcher.close()
    left = set(threading.enumerate()) - before
    assert not left, f"threads left behind: {left}"
    assert not any(m._forward_hooks for m in made.modules())


class Turnstile:
    """Lets a model make exactly as many steps as it is told; ``begun`` counts those that entered."""

    def __init__(self, model: V4Model) -> None:
        self.model, self.begun = model, 0
        self.tickets = threading.Semaphore(0)
        self.hook = model.register_forward_pre_hook(self.enter)

    def enter(self, *_: Any) -> None:
        self.begun += 1
        assert self.tickets.acquire(timeout=60)

    def open(self) -> None:
        self.hook.remove()
        self.tickets.release(1000)


def until(true: Callable[[], bool]) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def finished(work: LiveRun) -> LiveRun:
    assert work.wait(60)
    return work


def greedy(model: V4Model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_temperature_zero_is_the_argmax_of_a_plain_forward_loop(model):
    done = finished(run(model, PROMPT, max_new_tokens=12))
    expected = greedy(model, PROMPT, 12)
    assert done.state == "done" and done.error is None and done.progress == 1.0
    assert done.text == "".join(f"w{i}" for i in expected)
    trace = done.trace
    assert trace.next_ids.tolist() == [-1, -1, *expected]  # two prefill chunks choose nothing
    assert trace.token_ids.tolist() == PROMPT + expected[:-1] and trace.length == 30
    assert trace.token_texts == tuple(f"w{i}" for i in PROMPT + expected) and trace.prompt_length == 19
    assert trace.step_starts.tolist() == [0, 8, 16, *range(19, 30)]


def test_a_prompt_may_be_text_or_any_whole_numbers(model):
    text = " ".join(f"w{i}" for i in PROMPT)
    runs = [finished(run(model, p, max_new_tokens=3)) for p in (text, PROMPT, np.array(PROMPT), torch.tensor(PROMPT))]
    assert len({one.text for one in runs}) == 1 and all(one.trace.prompt_length == 19 for one in runs)


def test_the_trace_is_what_a_recorder_notes_by_hand(model):
    found = finished(run(model, PROMPT, max_new_tokens=9, topk=2)).trace
    ids = torch.tensor([found.token_ids.tolist()], dtype=torch.int64)
    recorder, cache, probs = Recorder(model), model.new_cache(), []
    with recorder, torch.inference_mode():
        for piece in ids.split([8, 8, 3, *[1] * 8], dim=1):
            probs.append(torch.softmax(model(piece, cache, "last", topk=2)[0, -1], -1))
            recorder.finish_step(piece.shape[1], cache)
    by_hand = recorder.snapshot(found.device)
    assert_same(found.layers, by_hand["layers"])
    assert_same(found.engram, by_hand["engram"])
    assert_same(found.cache_bytes, by_hand["cache_bytes"])
    for step, row in enumerate(probs):
        best = row.topk(5)
        assert found.top_ids[step].tolist() == best.indices.tolist()
        np.testing.assert_array_equal(found.top_probs[step], best.values)
    assert found.notes == {"topk": 2, "prefetch": "prefetch", "seed": 0, "temperature": 0.0, "max_new_tokens": 9}
    assert found.layer(1).selected.shape[1] == 2 and found.origin == "measured"


def test_the_same_seed_makes_the_same_text_and_another_another(model):
    texts = [finished(run(model, PROMPT, max_new_tokens=16, temperature=2.0, seed=s)).text for s in (5, 5, 6, 7)]
    assert texts[0] == texts[1] and len(set(texts)) == 3
    assert finished(run(model, PROMPT, max_new_tokens=16, seed=5)).text == finished(run(model, PROMPT, max_new_tokens=16)).text


def test_sampling_follows_the_probabilities(model):
    """One new token, many seeds: the shares of the likeliest come near their probabilities."""
    probs = torch.softmax(model(torch.tensor([PROMPT])).detach()[0, -1] / 0.5, -1)
    drawn = [
        int(finished(run(model, PROMPT, max_new_tokens=1, temperature=0.5, seed=s, record=False)).text[1:]) for s in range(60)
    ]
    for token in probs.topk(3).indices.tolist():
        share, p = drawn.count(token) / 60, float(probs[token])
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 60)


@pytest.mark.parametrize("policy", ["prefetch", "serial"])
def test_neither_the_policy_nor_recording_changes_the_text(model, policy):
    plain = finished(run(model, PROMPT, max_new_tokens=10, record=False, prefetch=policy))
    assert plain.text == finished(run(model, PROMPT, max_new_tokens=10)).text
    assert plain.trace.layers == () and plain.trace.timeline.spans == () and plain.trace.length == 28


def test_pause_answers_after_the_step_under_way_and_resume_goes_on(model):
    gate = Turnstile(model)
    work = run(model, PROMPT, max_new_tokens=4)
    until(lambda: gate.begun == 1)
    work.pause()
    assert work.state == "running"  # the step under way is not broken off
    gate.tickets.release()
    until(lambda: work.state == "paused")
    assert gate.begun == 1 and work.trace.steps == 1 and work.progress == pytest.approx(8 / 23)
    assert not work.wait(0.05)
    work.resume()
    gate.open()
    assert finished(work).state == "done" and len(work.trace.next_ids) == 6


def test_each_step_asked_for_is_made_and_no_other(model):
    gate = Turnstile(model)
    work = run(model, PROMPT, max_new_tokens=8)
    work.pause()
    gate.tickets.release(100)
    until(lambda: work.state == "paused")
    made = gate.begun  # the pause may have come before the first step or during it
    for _ in range(3):
        work.step()
        made += 1
        until(lambda made=made: gate.begun == made and work.trace.steps == made and work.state == "paused")
    work.step()
    work.step()  # asked for twice before the run could look
    until(lambda: gate.begun == made + 2 and work.state == "paused")
    time.sleep(0.02)
    assert gate.begun == made + 2 == work.trace.steps
    work.stop()
    assert finished(work).state == "stopped" and gate.begun == made + 2
    gate.open()


def test_a_step_asked_of_a_running_run_makes_one_more_and_pauses(model):
    gate = Turnstile(model)
    work = run(model, PROMPT, max_new_tokens=8)
    until(lambda: gate.begun == 1)
    work.step()
    gate.tickets.release(100)
    until(lambda: work.state == "paused")
    assert gate.begun == 2
    work.stop()
    finished(work)
    gate.open()


@pytest.mark.parametrize("paused", [True, False])
def test_stop_ends_within_a_step_and_keeps_the_trace(model, paused):
    gate = Turnstile(model)
    work = run(model, PROMPT, max_new_tokens=8)
    until(lambda: gate.begun == 1)
    if paused:
        work.pause()
        gate.tickets.release()
        until(lambda: work.state == "paused")
        work.stop()
    else:
        work.stop()
        gate.tickets.release()
    assert finished(work).state == "stopped" and work.error is None
    assert work.trace.length == 8 and work.trace.steps == 1 and work.progress < 1
    for command in (work.resume, work.step, work.pause, work.stop):  # nothing wakes it again
        command()
    assert work.state == "stopped" and gate.begun == 1 and work.wait(1)
    gate.open()


def test_commands_after_the_end_do_nothing(model):
    work = finished(run(model, PROMPT, max_new_tokens=1))
    for command in (work.pause, work.step, work.resume, work.stop):
        command()
    assert work.state == "done" and work.wait(0)


def test_progress_only_rises_and_every_event_comes_in_order(model):
    gate, events, progress = Turnstile(model), [], []
    work = run(model, PROMPT, max_new_tokens=5)

    def note(event: RunEvent) -> None:
        events.append(event)
        progress.append(work.progress)

    work.on_event(note)
    gate.open()
    finished(work)
    assert [e.kind for e in events] == ["prefill", "prefill", *["token"] * 5, "state"] and events[-1].state == "done"
    assert "".join(e.text for e in events) == work.text
    assert progress == sorted(progress) and 0 < progress[0] < 1 and progress[-1] == 1.0


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3), AssertionError()])
def test_what_a_callback_raises_is_noted_and_harmless(model, error):
    gate, heard = Turnstile(model), []

    def fail(event: RunEvent) -> None:
        raise error

    work = run(model, PROMPT, max_new_tokens=3)
    work.on_event(fail)
    work.on_event(heard.append)  # a later one is still called
    gate.open()
    assert finished(work).state == "done" and work.error is None
    assert work.callback_error == f"{type(error).__name__}: {error}" and len(heard) == 6


def test_a_callback_may_command_the_run_it_hears(model):
    gate, states = Turnstile(model), []
    work = run(model, PROMPT, max_new_tokens=30)

    def command(event: RunEvent) -> None:
        states.append(event.state)
        if event.kind == "token":
            work.pause()
        elif event.state == "paused":
            work.stop()

    work.on_event(command)
    gate.open()
    assert finished(work).state == "stopped" and states[-2:] == ["paused", "stopped"]
    assert len(work.text.split("w")) == 2


def test_a_callback_may_wait_for_another_thread_that_commands_the_run(model):
    """So the run holds no lock while it calls back."""
    gate, heard = Turnstile(model), []
    work = run(model, PROMPT, max_new_tokens=30)

    def command(event: RunEvent) -> None:
        heard.append(event)
        thread = threading.Thread(target=work.pause if event.kind == "prefill" else work.stop)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()

    work.on_event(command)
    gate.open()
    assert finished(work).state == "stopped" and work.callback_error is None
    assert [e.state for e in heard] == ["running", "paused", "stopped"]


def test_a_callback_that_waits_for_its_own_run_is_told_so(model):
    gate = Turnstile(model)
    work = run(model, PROMPT, max_new_tokens=2)
    work.on_event(lambda event: work.wait())
    gate.open()
    assert finished(work).state == "done" and "cannot wait for the run that calls it" in work.callback_error


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_an_interrupt_while_waiting_leaves_the_run_going(model):
    gate = Turnstile(model)
    work = run(model, PROMPT, max_new_tokens=3)
    timer = threading.Timer(0.1, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        work.wait(60)
    timer.join()
    assert work.state == "running"
    gate.open()
    assert finished(work).state == "done" and len(work.trace.next_ids) == 5


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty; type some text"),
        ([], "prompt is empty; give at least one token"),
        ("  ", "prompt is empty; give at least one token"),
        ([0, 53], "must lie in 0..52, got 0..53"),
        ([-1], "must lie in 0..52, got -1"),
        ([1.5], "text or whole numbers, got"),
        (["one"], "text or whole numbers, got"),
        (None, "text or whole numbers, got None"),
        (7, "text or whole numbers, got 7"),
        ("w1 \ud800", "half a character"),
        ([1] * 8193, "has 8193 tokens, the model reads at most 8192; shorten it"),
    ],
)
def test_unusable_prompts_are_refused_before_anything_starts(model, prompt, message):
    with pytest.raises(InputError, match=message) as refused:
        run(model, prompt)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, got -1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be 0 or more, got 2.0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"temperature": math.inf}, "temperature must be 0"),
        ({"temperature": "hot"}, "temperature must be 0"),
        ({"seed": "lucky"}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"topk": 0}, "topk must be a positive integer"),
        ({"topk": 2.5}, "topk must be a positive integer"),
        ({"prefetch": "never"}, "choose one of"),
    ],
)
def test_unusable_settings_are_refused_before_anything_starts(model, settings, message):
    with pytest.raises(InputError, match=message):
        run(model, PROMPT, **settings)


def test_text_for_a_model_without_tokenizer_is_refused_and_ids_are_not(model):
    model.tokenizer = None
    with pytest.raises(InputError, match="without a tokenizer; give the prompt as a list of token ids"):
        run(model, "w1 w2")
    done = finished(run(model, PROMPT, max_new_tokens=2))
    assert done.text == " ".join(map(str, greedy(model, PROMPT, 2))) and done.trace.token_texts[0] == f"[{PROMPT[0]}]"


@pytest.mark.parametrize(("length", "new"), [(8192, 0), (8190, 2)])
def test_a_run_ends_where_the_models_limit_does(monkeypatch, length, new):
    monkeypatch.setattr(live, "PREFILL_CHUNK", 4096)
    model = random_model(replace(CONFIG, layer_kinds=("window",), mlp_kinds=("hash",), hidden_size=8, hc_mult=1))
    done = finished(run(model, [3] * length, max_new_tokens=50, record=False))
    assert done.state == "done" and len(done.text.split()) == new


def test_no_new_tokens_is_a_prefill(model):
    done = finished(run(model, PROMPT, max_new_tokens=0))
    assert done.state == "done" and done.text == "" and done.trace.length == 19 and done.trace.next_ids.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_fail_in_one_line_and_keep_the_trace(model, tmp_path, value):
    bad = next(t for t in range(CONFIG.vocab_size) if t not in PROMPT[:16])
    with torch.no_grad():
        model.embed.weight[bad] = value
    failed = finished(run(model, [*PROMPT[:16], bad, 1], max_new_tokens=5))
    assert failed.state == "failed" and "\n" not in failed.error
    assert failed.error == "the model's output is not finite; its weights or this input are unusable"
    trace = failed.trace
    assert trace.length == 16 and trace.steps == 2 and trace.layers[0].length == 16 and failed.progress < 1
    assert Trace.load(trace.save(tmp_path)).length == 16
    assert finished(run(model, PROMPT[:8], max_new_tokens=0)).state == "done"  # the model still answers


def test_a_model_that_is_nan_throughout_leaves_an_empty_trace(model, tmp_path):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    failed = finished(run(model, PROMPT))
    assert failed.state == "failed" and failed.trace.length == 0 and failed.trace.steps == 0 and failed.text == ""
    assert Trace.load(failed.trace.save(tmp_path)).length == 0


@pytest.mark.parametrize("error", [RuntimeError("out of\nmemory"), MemoryError(), KeyError("weight")])
def test_any_failure_of_the_model_ends_the_run_with_its_reason(model, error):
    steps = []

    def fail(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 3:
            raise error

    hook = model.layers[2].register_forward_pre_hook(fail)
    failed = finished(run(model, PROMPT, max_new_tokens=5))
    hook.remove()
    assert failed.state == "failed" and type(error).__name__ in failed.error and "recorded before is kept" in failed.error
    assert "\n" not in failed.error
    assert failed.trace.length == 16


def test_a_failing_lookup_ends_the_run_with_one_clear_line(model):
    def gone(rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        raise OSError("disk gone")

    model.blocks[3].engram.table.gather = gone
    failed = finished(run(model, PROMPT))
    assert (failed.state, failed.error) == ("failed", "Engram rows of layer 3 could not be fetched: disk gone")


def test_a_snapshot_taken_at_any_moment_is_consistent(model):
    """Hammered from this thread while the run works in another: no half-finished step may show."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        work, seen = run(model, PROMPT, max_new_tokens=60), []
        while not work.wait(0):
            seen.append(work.trace)
        seen.append(work.trace)
    finally:
        sys.setswitchinterval(interval)
    for trace in seen:
        assert len(trace.top_ids) == len(trace.top_probs) == len(trace.next_ids) == trace.steps == len(trace.cache_reserved)
        assert all(layer.length == trace.length for layer in (*trace.layers,))
        assert trace.length <= len(trace.token_texts) <= max(19, trace.length + 1)
        assert not trace.steps or trace.step_end(trace.steps - 1) == trace.length
        assert all(span.step < trace.steps for span in trace.timeline.spans)
    assert len(seen[-1].token_texts) == 79 and seen[-1].length == 78
    assert [t.length for t in seen] == sorted(t.length for t in seen)


def test_an_unchanged_run_hands_out_the_same_snapshot(model):
    work = finished(run(model, PROMPT, max_new_tokens=2))
    assert work.trace is work.trace


def test_two_runs_of_one_model_at_once_do_not_disturb_each_other(model):
    other = random_ids(WITH_ENGRAM, 1, 23, seed=9)[0].tolist()
    alone = [finished(run(model, p, max_new_tokens=12)).trace for p in (PROMPT, other)]
    both = [run(model, p, max_new_tokens=12) for p in (PROMPT, other)]
    for work, expected in zip(both, alone, strict=True):
        trace = finished(work).trace
        assert trace.token_texts == expected.token_texts
        assert_same(trace.layers, expected.layers)
        assert_same(trace.engram, expected.engram)
