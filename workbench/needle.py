"""Hide a needle: a sentence with a code somewhere in a long text, the question at its end, and what the model made of it.

Everything here reads a model or a trace; nothing draws. The sentence is the one the shipped models were trained on, see
training/tasks.py; any other wording can be tried, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workbench.errors import InputError
from workbench.live import encode
from workbench.model.language_model import LanguageModel
from workbench.runtime import device_name, threads_for_run, use_threads
from workbench.trace import LayerTrace, Trace, entries_of
from workbench.training import score, tasks

MAX_TOKENS = 4096
SENTENCE, QUESTION = tasks.needle("{key}", "{value}"), tasks.question("{key}")
SAMPLE_TEXT = Path(__file__).parent / "assets" / "heldout.txt"
STREAM_TOKENS = 256  # of the held-out streams that rates are taken on


@dataclass(frozen=True, slots=True)
class Needle:
    """A prompt with a needle in it: token ids, where the value's first token stands, and what was hidden."""

    ids: tuple[int, ...]
    position: int
    key: str
    value: str
    value_ids: tuple[int, ...]  # the tokens a right answer has
    queries: tuple[int, ...]  # tokens of the question that may look the value up: its end, and the key in it
    depth: float  # where it was asked to be hidden, 0 start to 1 end

    @property
    def notes(self) -> dict[str, Any]:
        """What a trace remembers of it."""
        told = {"position": self.position, "key": self.key, "value": self.value, "value_ids": list(self.value_ids)}
        return {"needle": told | {"queries": list(self.queries), "depth": self.depth}}


def sample_text() -> str:
    """Text no shipped model was trained on: Python's own documentation and standard library, up to 200 KB."""
    return SAMPLE_TEXT.read_text(encoding="utf-8")


def hide_needle(
    model: LanguageModel,
    text: str,
    key: str = "apple",
    value: str = "37",
    depth: float = 0.5,
    tokens: int | None = None,
    *,
    sentence: str = SENTENCE,
    question: str = QUESTION,
) -> Needle:
    """Put " The code of KEY is VALUE." into ``text`` at ``depth`` (0 start, 1 end) and ask for it at the end.

    ``sentence`` and ``question`` say it in other words; they name {key} and {value}. ``tokens`` cuts the text so that the whole
    prompt has at most that many; without it, a prompt beyond 4,096 tokens raises InputError. So do an empty key or value, a
    depth outside 0..1 and a sentence without {value}.
    """
    key, value = key.strip(), value.strip()
    if not key or not value:
        raise InputError("give the needle a key and a value, such as 'apple' and '37'")
    if not 0 <= depth <= 1:
        raise InputError(f"depth must lie between 0 (start) and 1 (end), got {depth}")
    if "{value}" not in sentence:
        raise InputError(f"the sentence must say {{value}} where the code goes, got {sentence!r}")
    before, after = (part.replace("{key}", key) for part in sentence.split("{value}", 1))
    record, asked = encode(model, before + value + after), encode(model, question.replace("{key}", key))
    ends = [end for _, end in model.tokenizer.encode(before + value + after).offsets]  # type: ignore[union-attr]
    holds = [i for i, end in enumerate(ends) if len(before) < end <= len(before + value)]  # record tokens that spell the value
    room = (MAX_TOKENS if tokens is None else tokens) - len(record) - len(asked)
    filler = encode(model, text) if text else []
    if tokens is not None:
        filler = filler[: max(0, room)]
    if room < 0 or len(filler) > room:
        most = max(0, room)
        raise InputError(f"the text has {len(filler)} tokens, and with the needle at most {most} fit; cut it with tokens=")
    cut = _word_start(model, filler, round(depth * len(filler)))
    ids = (*filler[:cut], *record, *filler[cut:], *asked)
    upto_key = encode(model, question[: question.index("{key}")] + key) if "{key}" in question else asked
    end, named = len(ids) - 1, len(ids) - len(asked) + len(upto_key) - 1  # the question's last token, and its key's
    queries = tuple(sorted({end, named}, reverse=True))
    return Needle(ids, cut + holds[0], key, value, tuple(record[i] for i in holds), queries, depth)


def _word_start(model: LanguageModel, ids: list[int], at: int) -> int:
    """The next place from ``at`` on where a word begins, so that the sentence does not split one; ``at`` if none is near."""
    for place in range(at, min(at + 8, len(ids)) if at else 0):
        if model.tokenizer.decode([ids[place]])[:1].isspace():  # type: ignore[union-attr]
            return place
    return at


def find_needle(trace: Trace, needle: Needle | None = None) -> dict[str, Any]:
    """How a finished or running trace answered: the answer, and per layer that selects whether the needle was kept, and why.

    ``selects`` is False for models that attend to every token, which have no such ``layers``. The value may be looked up at the
    question's end or as soon as the key is named: ``query`` is the token, of these two, whose indexer ranked the needle higher
    (of equal ranks, the one that attends to it more), layer by layer; ``best_layer`` and ``best_query`` the highest of all. Any
    entry that a value's first token goes into counts: one, or two where CSA's blocks overlap. ``rank`` counts from 1 among all
    visible entries by index score (in V4.1's reusing layers that of the layer that chose), None while the needle is too near to
    be in a finished entry; ``chance`` is the probability that as many random entries contain one of them, for at least one of
    the two queries. InputError for a trace without a needle.
    """
    notes = trace.notes.get("needle") if needle is None else needle.notes["needle"]
    if not isinstance(notes, dict) or not {"position", "value", "value_ids", "queries"} <= notes.keys():
        raise InputError("this trace has no needle; make the prompt with wb.hide_needle")
    asked = trace.prompt_length - 1
    layers: list[dict[str, Any]] = []
    for layer in trace.layers:
        chooser = trace.chooser(layer.layer)
        if chooser is None or trace.length <= asked:
            continue
        looks = [_look(layer, chooser, int(t), int(notes["position"])) for t in notes["queries"]]
        best_look = min(looks, key=_order)
        layers.append(best_look | {"chance": 1 - math.prod(1 - look["chance"] for look in looks)})
    ranked = [layer for layer in layers if layer["rank"] is not None]
    best = min(ranked, key=_order) if ranked else {"layer": None, "query": asked}
    step = trace.step_of_token(asked) if trace.steps and trace.length > asked else len(trace.next_ids)
    expected = [int(i) for i in notes["value_ids"]]
    chosen = [int(i) for i in trace.next_ids[step:] if i >= 0][: len(expected)]
    answer = "".join(trace.token_texts[asked + 1 : asked + 1 + len(chosen)]).strip() if chosen else None
    return {"expected": notes["value"], "answer": answer, "right": chosen == expected} | {
        "selects": any(layer.selects for layer in trace.layers),
        "best_layer": best["layer"],
        "best_query": best["query"],
        "layers": layers,
    }


def _order(look: dict[str, Any]) -> tuple[float, float]:
    """Better ranks first; of equal ranks the one whose heads attend to the needle more."""
    return (math.inf if look["rank"] is None else look["rank"], -look["best_head_probability"])


def _look(layer: LayerTrace, chooser: LayerTrace, query: int, position: int) -> dict[str, Any]:
    """What one query of a layer, and the indexer that chose for it, made of the needle whose value stands at ``position``."""
    assert layer.selected is not None and layer.selected_probs is not None
    scores, kept = chooser.index_scores(query), layer.selected[query]
    right = [e for e in layer.entries_of(position) if e < len(scores)]
    columns = np.flatnonzero(np.isin(kept, right)).tolist()
    heads = layer.selected_probs[query].astype(np.float32)  # [H, K]
    return {
        "layer": layer.layer,
        "query": query,
        "entries": right,
        "visible": len(scores),
        "kept": int((kept >= 0).sum()),
        "found": bool(columns),
        "rank": min((1 + int((scores > scores[e]).sum()) for e in right), default=None),
        "best_head_probability": float(heads[:, columns].sum(1).max()) if columns else 0.0,
        "chance": chance(len(scores), int((kept >= 0).sum()), len(right)),
    }


def chance(visible: int, kept: int, right: int = 2) -> float:
    """Probability that ``kept`` of ``visible`` entries, drawn at random, contain one of the ``right`` ones."""
    misses = math.prod(max(0, visible - right - i) / (visible - i) for i in range(min(kept, visible)))
    return 1.0 - misses if right else 0.0


def needle_rates(model: LanguageModel, topk: int | None = None, *, sequences: int = 12, seed: int = 7) -> dict[str, Any]:
    """Far recall and the indexers' hit rates on ``sequences`` held-out streams of 256 tokens, chance beside them.

    Far: the value lies beyond the sliding window, so only compressed entries can carry it. ``hits`` has one rate for each layer
    that chooses and each query that may look a value up, the key ("1 key") and the question's end ("1 end"); ``hit_chance`` is
    that of any one of them. A model that attends to every token has neither: ``topk`` and ``hit_chance`` are None, ``hits`` is
    empty. ``questions`` says how many there were. Raises InputError for a model without a tokenizer or without the topk given.
    """
    if model.tokenizer is None:
        raise InputError("this model has no tokenizer, so no needle can be written for it; load a shipped model")
    use_threads(threads_for_run())  # small matrices: more threads mostly wait for each other
    held = np.asarray(encode(model, sample_text()))
    stream = tasks.RecallStream.asked_once(model.tokenizer, held)
    batches = [stream.batch(np.random.default_rng(seed), sequences, STREAM_TOKENS)]
    k = _topk(model, topk)
    answers = score.recall(model, batches, topk=k)
    return {
        "model": _label(model),
        "topk": k,
        "questions": answers["questions"],
        "recall": answers["far"],
        "recall_chance": 1 / len(tasks.VALUES),
        "hits": score.needle_hits(model, batches, k, topk=k) if k else {},
        "hit_chance": score.chance_hits(model, batches, k) if k else None,
    }


def needle_trials(
    model: LanguageModel,
    sentence: str = SENTENCE,
    question: str = QUESTION,
    digits: int = 2,
    *,
    keys: Sequence[str] = tasks.KEYS,
    tokens: int = STREAM_TOKENS,
    trials: int = 12,
    topk: int | None = None,
    seed: int = 7,
) -> dict[str, Any]:
    """Hide one needle in each of ``trials`` held-out texts, said and asked in these words; the same rates as ``needle_rates``.

    Keys are drawn from ``keys``, codes are random numbers of ``digits`` digits, depths spread over all places beyond the
    sliding window. The same seed gives the same texts, keys and depths whatever the words, so that two wordings can be
    compared. An answer is right if the likeliest tokens spell the whole code. Raises InputError for no trial, no digit, and
    texts too short to be far.
    """
    far = score.far_distance(model)
    if trials < 1 or digits < 1 or tokens < 4 * far:
        raise InputError(
            f"needs at least 1 trial, 1 digit and {4 * far} tokens, got {trials} trials, {digits} digits, {tokens} tokens"
        )
    use_threads(threads_for_run())
    rng, text = np.random.default_rng(seed), sample_text()
    k = _topk(model, topk)
    kinds, ratios = model.config.layer_kinds, model.config.compress_ratios
    right = 0
    luck: list[float] = []
    hits: dict[str, int] = {}
    for trial in range(trials):
        start, key = int(rng.integers(len(text) - 8 * tokens)), str(rng.choice(np.array(keys)))
        value = str(int(10 ** (digits - 1) + rng.random() * 9 * 10 ** (digits - 1)))
        depth = (trial + 0.5) / trials * (1 - 2 * far / tokens)
        passage = text[start : start + 8 * tokens]
        needle = hide_needle(model, passage, key, value, depth, tokens, sentence=sentence, question=question)
        asked = len(needle.ids) - 1
        line = torch.tensor([[*needle.ids, *needle.value_ids]])
        with torch.inference_mode():
            guesses = model(line.to(model.device), topk=k)[0].argmax(-1).cpu()
        right += guesses[asked:-1].tolist() == list(needle.value_ids)
        for layer, entries in score.selected_entries(model, line[:, : asked + 1], k).items() if k else ():
            wanted = entries_of(kinds[layer], ratios[layer], needle.position)
            for query, t in (("key", needle.queries[-1]), ("end", asked)):
                look = f"{layer} {query}"
                hits[look] = hits.get(look, 0) + bool(set(wanted) & set(entries[0, t].tolist()))
            visible = (asked + 1) // ratios[layer]
            luck.append(chance(visible, min(k, visible), len(wanted)))
    return {
        "model": _label(model),
        "topk": k,
        "questions": trials,
        "recall": right / trials,
        "recall_chance": 1 / (9 * 10 ** (digits - 1)),
        "hits": {name: count / trials for name, count in hits.items()},
        "hit_chance": float(np.mean(luck)) if luck else None,
    }


def _topk(model: LanguageModel, topk: int | None) -> int | None:
    """Entries kept: as asked for, else the model's own number; None for a model that attends to everything."""
    own = model.config.index_topk or None
    if topk is not None and own is None:
        raise InputError(f"{model.name} attends to every token, so there is no topk to set; leave it out")
    return topk or own


def untrained_twin(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """The same shape and tokenizer with the random weights training starts from."""
    twin = type(model).untrained(model.config, seed).to(model.device)
    if model.config.engram:
        twin.engram_canonical_ids.copy_(model.engram_canonical_ids)
    twin.tokenizer, twin.name = model.tokenizer, f"{model.name} untrained"
    return twin


def _label(model: LanguageModel) -> str:
    return f"{model.name} ({model.what}), measured on {device_name(str(model.device))}"
