"""Make the recorded traces that ship, from shipped models: ``python -m workbench.training.sample`` and ``... --growth``.

A few hundred tokens of held-out prose with a needle far beyond the window, the question, and the one token of the answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from workbench.checkpoint import load, shipped_names
from workbench.errors import WorkbenchError
from workbench.live import run
from workbench.needle import find_needle, hide_needle, sample_text
from workbench.trace import Trace
from workbench.trace_files import SHIPPED

MODEL, TOKENS, DEPTH = "tiny-v4", 320, 0.25
MAX_BYTES = 500_000


def prose(text: str) -> str:
    """The paragraphs of ``text`` that are plain sentences, each on one line: no headings, grammars, lists or source code."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if not part.startswith((" ", "#", '"'))]
    return " ".join(part for part in paragraphs if part[:1].isupper() and part.endswith(".") and "::=" not in part)


def record_sample(model: str = MODEL, folder: Path = SHIPPED / "needle") -> Trace:
    """Run ``model`` on the needle and save the trace in ``folder``.

    Raises WorkbenchError if it misses the needle (nothing is saved then), or if the files grow too big.
    """
    loaded = load(model, device="cpu")
    needle = hide_needle(loaded, prose(sample_text()), depth=DEPTH, tokens=TOKENS)
    live = run(loaded, needle.ids, max_new_tokens=1)
    live.wait()
    if live.error:
        raise WorkbenchError(live.error)
    found = find_needle(live.trace, needle)
    first_look = {"look_at": {"token": found["best_query"], "layer": found["best_layer"]}}  # where widgets open
    trace = replace(live.trace, notes=live.trace.notes | needle.notes | first_look)
    if not found["right"] or not any(layer["found"] for layer in found["layers"]):
        raise WorkbenchError(f"{model} answered {found['answer']!r} instead of {found['expected']!r}; nothing was saved")
    trace.save(folder, half=True)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MAX_BYTES:
        raise WorkbenchError(f"{folder} has {size:,} bytes, a shipped trace at most {MAX_BYTES:,}; lower TOKENS")
    return trace


def record_growth(model: str = "tiny-v4-engram", folder: Path = SHIPPED / "growth") -> Trace:
    """Run ``model`` on a short prompt and 40 tokens more, so that blocks close while it decodes; save the trace."""
    loaded = load(model, device="cpu")
    needle = hide_needle(loaded, prose(sample_text()), key="river", value="52", depth=0.2, tokens=100)
    live = run(loaded, needle.ids, max_new_tokens=41)  # the last one is not fed back
    live.wait()
    if live.error:
        raise WorkbenchError(live.error)
    opens_on = {"look_at": {"token": live.trace.length - 1, "layer": 1}}  # the end, where most is held
    trace = replace(live.trace, notes=live.trace.notes | opens_on)
    trace.save(folder, half=True)
    return trace


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=MODEL if MODEL in shipped_names() else f"{MODEL}-engram")
    parser.add_argument("--out", type=Path, default=SHIPPED / "needle")
    parser.add_argument("--growth", action="store_true", help="record the run that decodes, for the demos")
    options = parser.parse_args(arguments)
    if options.growth:
        options.out = SHIPPED / "growth"
    trace = record_growth() if options.growth else record_sample(options.model, options.out)
    print(f"{options.out}: {trace.label}, {trace.length} tokens")


if __name__ == "__main__":
    main()
