"""A prompt meets a model: generation in a background thread that can be paused, stepped and stopped, and is recorded.

A step is one prefill chunk or one token; between steps the thread looks at what it was told, so controls answer within one.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from workbench.decoded import NOTE, SpelledCharacters
from workbench.errors import InputError, WorkbenchError
from workbench.memory.prefetch import POLICIES
from workbench.model.language_model import LanguageModel
from workbench.recorder import Recorder
from workbench.runtime import device_name, threads_for_run, use_threads
from workbench.trace import Timeline, Trace
from workbench.transcript import Transcript, read_prompt

Prompt = str | Path | Transcript | Sequence[int]
State = Literal["running", "paused", "done", "stopped", "failed"]
FINAL = ("done", "stopped", "failed")
PREFILL_CHUNK = 256
GUESSES = 5


@dataclass(frozen=True, slots=True)
class RunEvent:
    """What callbacks get, from the run's own thread: a new state, a prefilled chunk, or a new token."""

    kind: Literal["state", "prefill", "token"]
    state: State
    text: str = ""  # of the new token


def check_model(model: LanguageModel) -> None:
    """InputError for what is no model of ours."""
    if not isinstance(model, LanguageModel):
        raise InputError(f"expected a model that wb.load gave (wb.attach watches one of transformers), got {model!r:.60}")


def encode(model: LanguageModel, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt. Raises InputError for an empty one, one the model cannot read, or one beyond its limit."""
    check_model(model)
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("the prompt is empty; type some text")
        if model.tokenizer is None:
            raise InputError("this model came without a tokenizer; give the prompt as a list of token ids")
        model.tokenizer.encode_special_tokens = True  # a typed "<|bos|>" is text like any other
        try:
            ids = model.tokenizer.encode(prompt).ids
        except TypeError:  # what the library says to half a surrogate pair
            raise InputError("the prompt holds half a character that is no Unicode text; type it again") from None
    else:
        try:
            ids = [operator.index(i) for i in prompt]
        except TypeError:
            raise InputError(f"a prompt must be text or whole numbers, got {prompt!r:.60}") from None
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    if min(ids) < 0 or max(ids) >= model.config.vocab_size:
        raise InputError(f"prompt ids must lie in 0..{model.config.vocab_size - 1}, got {min(ids)}..{max(ids)}")
    limit = model.config.max_position_embeddings
    if len(ids) > limit:
        raise InputError(f"the prompt has {len(ids)} tokens, the model reads at most {limit}; shorten it")
    return ids


def token_texts(model: LanguageModel, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token's own text; pieces of a multi-byte character show as U+FFFD."""
    if model.tokenizer is None:
        return tuple(f"[{i}]" for i in ids)
    return tuple(model.tokenizer.decode_batch([[int(i)] for i in ids], skip_special_tokens=False))


def best_guesses(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest next tokens by logits [V], best first: ids and probabilities. WorkbenchError unless all are finite."""
    if not torch.isfinite(logits).all():
        raise WorkbenchError("the model's output is not finite; its weights or this input are unusable")
    found = torch.softmax(logits, -1).topk(min(GUESSES, len(logits)))
    return found.indices.cpu().numpy(), found.values.float().cpu().numpy()


class LiveRun:
    """One generation at work; made by ``wb.run``. Every method may be called from any thread, at any time."""

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        seed: int = 0,
        temperature: float = 0.0,
        topk: int | None = None,
        prefetch: str = "prefetch",
        record: bool = True,
    ) -> None:
        check_model(model)
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise InputError(f"max_new_tokens must be 0 or more, got {max_new_tokens!r}")
        if not isinstance(temperature, (int, float)) or not math.isfinite(temperature) or temperature < 0:
            raise InputError(f"temperature must be 0 (greedy) or more, got {temperature!r}")
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise InputError(f"seed must be a whole number from 0 to 2^64 - 1, got {seed!r}")
        if topk is not None and (not isinstance(topk, int) or topk < 1):
            raise InputError(f"topk must be a positive integer or None for the model's own, got {topk!r}")
        if topk is not None and not model.config.index_topk:
            raise InputError(f"{model.name} attends to every token, so there is no topk to set; leave it out")
        if prefetch not in POLICIES:
            raise InputError(f"prefetch policy {prefetch!r} is unknown; choose one of {POLICIES}")
        self.model = model
        self.error: str | None = None
        self.callback_error: str | None = None
        prompt = read_prompt(prompt) if isinstance(prompt, Path) else prompt
        self._ids = encode(model, prompt.text if isinstance(prompt, Transcript) else prompt)
        self._texts = list(token_texts(model, self._ids))
        self._spelled = SpelledCharacters(model.tokenizer.decode if model.tokenizer else str)
        self._spelled.update(self._ids, self._texts)
        self._prompt_length = len(self._ids)
        self._room = model.config.max_position_embeddings - self._prompt_length
        self._max_new = min(max_new_tokens, self._room)
        self._settings = {"topk": topk, "prefetch": prefetch}
        self._temperature, self._generator = temperature, torch.Generator().manual_seed(seed)
        self._guess_count = min(GUESSES, model.config.vocab_size)
        self._notes = {
            "topk": topk or model.config.index_topk or None,  # None: the model attends to everything
            "prefetch": prefetch,
            "seed": seed,
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
        }
        if isinstance(prompt, Transcript) and model.tokenizer is not None:  # without one, encode has refused it
            self._notes["roles"] = prompt.token_roles(model.tokenizer.encode(prompt.text).offsets)
        self._device = device_name(str(model.device))
        self._recorder = Recorder(model) if record else None
        self._fed = 0
        self._guesses: list[tuple[np.ndarray, np.ndarray, int]] = []  # after each step: ids, probabilities, the token chosen
        self._snapshot: Trace | None = None
        self._callbacks: list[Callable[[RunEvent], None]] = []
        self._control = threading.Condition()
        self._wanted: Literal["run", "pause", "step", "stop"] = "run"
        self._steps_asked = 0
        self._state: State = "running"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="workbench-run", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        return self._state

    @property
    def progress(self) -> float:
        """Share of the prompt and the new tokens that has been processed, 0 to 1."""
        return 1.0 if self._state == "done" else min(1.0, self._fed / max(1, self._prompt_length + self._max_new))

    @property
    def text(self) -> str:
        """What was generated so far."""
        new = self._ids[self._prompt_length :]
        return self.model.tokenizer.decode(new) if self.model.tokenizer else " ".join(map(str, new))

    @property
    def trace(self) -> Trace:
        """A snapshot of everything recorded up to the last finished step."""
        recorded = self._recorder.snapshot(self._device) if self._recorder else {}
        guesses, texts = list(self._guesses), tuple(self._texts)  # after the snapshot, so never fewer than its steps
        starts = recorded.get("step_starts", np.zeros(0, np.int32))
        length = self._fed
        if self._recorder:
            guesses = guesses[: len(starts)]
            length = recorded["layers"][0].length if recorded["layers"] else 0
        texts = texts[: max(self._prompt_length, length + 1)]
        known = self._snapshot
        if known is not None and (known.steps, len(known.top_ids), len(known.token_texts)) == (
            len(starts),
            len(guesses),
            len(texts),
        ):
            return known
        spelled = [found for found in list(self._spelled.found) if found[1] < length]
        fields = {"timeline": Timeline("measured", (), self._device)} | recorded
        self._snapshot = Trace(
            model=self.model.name,
            what=self.model.what,
            device=self._device,
            config=self.model.config.to_dict(),
            token_ids=np.asarray(self._ids[:length], np.int32),
            token_texts=texts,
            prompt_length=min(self._prompt_length, length),
            top_ids=np.array([g[0] for g in guesses], np.int32).reshape(-1, self._guess_count),
            top_probs=np.array([g[1] for g in guesses], np.float32).reshape(-1, self._guess_count),
            next_ids=np.array([g[2] for g in guesses], np.int32),
            notes=self._notes | ({NOTE: spelled} if spelled else {}),
            **fields,
        )
        return self._snapshot

    def on_event(self, callback: Callable[[RunEvent], None]) -> None:
        """Call ``callback(event)`` from the run's thread on every event; what it raises is noted and does not stop the run."""
        self._callbacks.append(callback)

    def pause(self) -> None:
        self._tell("pause")

    def resume(self) -> None:
        self._tell("run")

    def step(self) -> None:
        """Do one more step, then pause."""
        self._tell("step")

    def stop(self) -> None:
        """End after the step under way; what was recorded stays."""
        self._tell("stop")

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the run is over; True if it is. An interrupt while waiting leaves the run going."""
        if threading.current_thread() is self._thread:
            raise WorkbenchError("a callback cannot wait for the run that calls it")
        # Not Thread.join alone: before Python 3.13 an interrupted join takes a living thread for a finished one.
        if self._over.wait(timeout_s):
            self._thread.join()
        return self._over.is_set()

    def _tell(self, wanted: Literal["run", "pause", "step", "stop"]) -> None:
        with self._control:
            if self._wanted != "stop":
                self._wanted = wanted
                self._steps_asked = self._steps_asked + 1 if wanted == "step" else 0
            self._control.notify_all()

    def _may_go_on(self) -> bool:
        """Blocks while paused; False once the run should stop. Callbacks are called without the lock: they may do anything."""
        while True:
            with self._control:
                while self._wanted == "pause" and self._state == "paused":
                    self._control.wait()
                wanted = self._wanted
                if wanted == "step":
                    self._steps_asked -= 1
                    if not self._steps_asked:
                        self._wanted = "pause"
            if wanted == "stop":
                return False
            self._change("paused" if wanted == "pause" else "running")
            if wanted != "pause":
                return True

    def _change(self, state: State) -> None:
        if state != self._state:
            self._state = state
            self._emit(RunEvent("state", state))

    def _emit(self, event: RunEvent) -> None:
        for callback in list(self._callbacks):
            try:
                callback(event)
            except BaseException as error:  # not even sys.exit() in a callback may end the run unseen
                self.callback_error = f"{type(error).__name__}: {error}"

    def _work(self) -> None:
        use_threads(threads_for_run())
        final: State = "done"
        try:
            if self._recorder:
                with self._recorder:
                    final = self._generate()
            else:
                final = self._generate()
        except BaseException as error:  # nobody else would hear of it in this thread
            reason, final = " ".join(str(error).split()), "failed"
            if not isinstance(error, WorkbenchError):
                reason = f"the run failed ({type(error).__name__}: {reason}); what was recorded before is kept"
            self.error = reason
        self.model.fetcher.retire(wait_s=1.0)  # an idle worker ends with the run; one that hangs is not waited for
        self._change(final)
        self._over.set()

    def _generate(self) -> State:
        cache = self.model.new_cache()
        line = torch.tensor([self._ids], device=self.model.device)
        with torch.inference_mode():
            while self._fed < self._prompt_length or len(self._ids) < self._prompt_length + self._max_new:
                if not self._may_go_on():
                    return "stopped"
                prefill = self._fed < self._prompt_length
                chunk = line[:, self._fed : self._fed + PREFILL_CHUNK] if prefill else line
                logits = self.model(chunk, cache, logits="last", **self._settings)[0, -1]
                guessed = best_guesses(logits)
                tokens = chunk.shape[1]
                last = self._fed + tokens >= self._prompt_length
                chosen = self._choose(logits) if last and len(self._ids) < self._prompt_length + self._max_new else -1
                self._guesses.append((*guessed, chosen))
                if self._recorder:
                    self._recorder.finish_step(tokens, cache)
                self._fed += tokens
                if chosen >= 0:
                    self._ids.append(chosen)
                    self._texts += token_texts(self.model, [chosen])
                    self._spelled.update(self._ids, self._texts)
                    line = torch.tensor([[chosen]], device=self.model.device)
                self._emit(RunEvent("token" if chosen >= 0 else "prefill", self._state, self._texts[-1] if chosen >= 0 else ""))
        return "done"

    def _choose(self, logits: torch.Tensor) -> int:
        if self._temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(torch.softmax(logits.cpu() / self._temperature, -1), 1, generator=self._generator))


def run(
    model: LanguageModel,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    temperature: float = 0.0,
    topk: int | None = None,
    prefetch: str = "prefetch",
    record: bool = True,
) -> LiveRun:
    """Start generating in the background and return the LiveRun at once.

    ``prompt`` is text, token ids, a Path (of a text file, or a .jsonl transcript) or what ``wb.read_transcript`` returns, whose
    roles are kept in the trace's notes. ``temperature`` 0 is greedy; ``topk`` keeps another number of entries than the model's;
    ``prefetch`` says when Engram rows are fetched ("prefetch" ahead of need, "serial" at the layer, "resident": they lie on the
    compute device); ``record=False`` leaves out all recording. Raises InputError for a prompt or setting that cannot be used.
    """
    return LiveRun(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        seed=seed,
        temperature=temperature,
        topk=topk,
        prefetch=prefetch,
        record=record,
    )
