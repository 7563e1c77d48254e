"""The tables of the README: what the shipped checkpoints can do, from the scores stored beside them.

``python benchmarks/scores.py`` prints them, ``--write`` puts them into README.md. `make check-all` measures the scores again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from workbench.checkpoint import load, shipped_names
from workbench.model.language_model import LanguageModel

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 4096  # tokens of context that the cache's bytes are stated for
TALLY = "tiny-v4-tally"
START, END = "<!-- scores: written by `python benchmarks/scores.py --write` -->", "<!-- /scores -->"
TALLY_START, TALLY_END = START.replace("scores:", "tally:", 1), "<!-- /tally -->"


def table() -> str:
    """Every shipped checkpoint that was trained on single needles: what it recalls, what it holds and reads for that."""
    models = {name: _stored(name) for name in shipped_names() if name != TALLY}
    ordered = dict(sorted(models.items(), key=lambda item: (not item[0].startswith("tiny-v"), item[0])))
    first = next(iter(ordered.values()))[0]
    rows = [("", *ordered, "by chance")]

    def add(label: str, pick: Callable[[dict[str, Any]], str], chance: str = "") -> None:
        rows.append((label, *(pick(scores) for scores, _ in ordered.values()), chance))

    luck = f"{first['recall_chance']:.1%}"
    add("far needles answered, 256 tokens", lambda s: f"{s['recall_256']['far']:.1%}", luck)
    add("the same with top-k 1", lambda s: f"{s['recall_256_top1']['far']:.1%}" if "recall_256_top1" in s else "–", luck)
    add("far needles answered, 4,096 tokens", lambda s: f"{s['recall_4096']['far']:.1%}", luck)
    add("one needle in 4,096 tokens of text", lambda s: f"{s['haystack_4096']:.1%}", luck)
    add("needle in the indexer's top 2 (best layer), in brackets by chance", lambda s: _hits(s, "2"))
    add("needle in the indexer's top-k, likewise", lambda s: _hits(s, max(s.get("hit_chance", {"": 0}), key=_number)))
    add("loss on held-out text, nats per token", lambda s: f"{s['text_loss']:.3f}", f"{first['text_loss_uniform']:.3f}")
    traffic = [cache_traffic(load(name, device="cpu")) for name in ordered]
    rows.append((f"KV cache held at {LENGTH:,} tokens, bytes in bf16", *(f"{held:,}" for held, _ in traffic), ""))
    rows.append(("bytes of it that one decoded token reads", *(f"{read:,}" for _, read in traffic), ""))
    minutes = [recipe["trained_with"]["cpu_seconds"] / 60 for _, recipe in ordered.values()]
    rows.append(("training, minutes of one CPU core", *(f"{m:.0f}" for m in minutes), ""))
    return _markdown(rows)


def _stored(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = ROOT / "workbench" / "assets" / name
    return json.loads((folder / "scores.json").read_text()), json.loads((folder / "recipe.json").read_text())


def _hits(scores: dict[str, Any], k: str) -> str:
    """Hit rate of the best layer and query among the k best, and by luck; a dash where nothing is selected."""
    if "hit_chance" not in scores:
        return "–"
    return f"{max(scores[f'hit_at_{k}'].values()):.1%} of top {k} ({scores['hit_chance'][k]:.1%})"


def _number(text: str) -> int:
    return int(text or 0)


@torch.inference_mode()
def cache_traffic(model: LanguageModel, length: int = LENGTH) -> tuple[int, int]:
    """(bytes held, bytes read) by a live cache in bf16: held after ``length`` tokens, read by the last of them."""
    cache = model.new_cache(storage="bf16")
    ids = torch.arange(length).remainder(model.config.vocab_size).unsqueeze(0)
    for chunk in ids[:, :-1].split(512, dim=1):
        model(chunk, cache, "last")
    before = sum(cache.bytes_read_by_part().values())
    model(ids[:, -1:], cache, "last")
    return cache.nbytes, sum(cache.bytes_read_by_part().values()) - before


def tally_table() -> str:
    """Answers to " The most frequent code of apple is" by the number of compressed entries each query may attend to."""
    scores = json.loads((ROOT / "workbench" / "assets" / TALLY / "scores.json").read_text())["tally"]
    percent = "{:.1%}".format
    found = {k: max(rates.values()) for k, rates in scores["records_found"].items()}
    return _markdown(
        [
            (f"entries kept of {scores['entries']}", "windows alone", *scores["accuracy"], "all"),
            (
                "most frequent value named",
                *map(percent, (scores["window_alone"], *scores["accuracy"].values(), scores["accuracy_all_entries"])),
            ),
            ("records of the key among them (best layer)", "", *map(percent, found.values()), ""),
        ]
    )


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for start, end, written in ((START, END, table()), (TALLY_START, TALLY_END, tally_table())):
        before, rest = text.split(start)
        text = f"{before}{start}\n{written}\n{end}{rest.split(end)[1]}"
        print(written, end="\n\n")
    if "--write" in sys.argv:
        readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
