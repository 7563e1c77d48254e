"""The tables of the README: what the shipped checkpoints can do, from the scores stored beside them.

``python benchmarks/scores.py`` prints them, ``--write`` puts them into README.md. `make check-all` measures the scores again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("tiny-v4", "tiny-v4-engram")
TALLY = "tiny-v4-tally"
START, END = "<!-- scores: written by `python benchmarks/scores.py --write` -->", "<!-- /scores -->"
TALLY_START, TALLY_END = START.replace("scores:", "tally:", 1), "<!-- /tally -->"


def table() -> str:
    models = {}
    for name in NAMES:
        folder = ROOT / "workbench" / "assets" / name
        models[name] = json.loads((folder / "scores.json").read_text()), json.loads((folder / "recipe.json").read_text())
    first = next(iter(models.values()))[0]
    rows = [("", *models, "by chance")]

    def add(label: str, pick, chance: str) -> None:
        rows.append((label, *(pick(scores) for scores, _ in models.values()), chance))

    luck = f"{first['recall_chance']:.1%}"
    add("far needles answered, 256 tokens", lambda s: f"{s['recall_256']['far']:.1%}", luck)
    add("the same with top-k 1", lambda s: f"{s['recall_256_top1']['far']:.1%}", luck)
    add("far needles answered, 4,096 tokens", lambda s: f"{s['recall_4096']['far']:.1%}", luck)
    add("one needle in 4,096 tokens of text", lambda s: f"{s['haystack_4096']:.1%}", luck)
    add("needle's entry in the indexer's top 2 (best layer)", lambda s: f"{max(s['hit_at_2'].values()):.1%}",
        f"{first['hit_chance']['2']:.1%}")  # fmt: skip
    add("loss on held-out text, nats per token", lambda s: f"{s['text_loss']:.3f}", f"{first['text_loss_uniform']:.3f}")
    minutes = [recipe["trained_with"]["cpu_seconds"] / 60 for _, recipe in models.values()]
    rows.append(("training, minutes of one CPU core", *(f"{m:.0f}" for m in minutes), ""))
    return _markdown(rows)


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
