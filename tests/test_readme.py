"""The front door stays true: its table, its picture and the names it mentions."""

import importlib.util
import re
from pathlib import Path

import workbench as wb

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_scores_in_the_readme_are_those_stored_beside_the_checkpoints():
    spec = importlib.util.spec_from_file_location("scores", ROOT / "benchmarks" / "scores.py")
    scores = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scores)
    assert f"{scores.START}\n{scores.table()}\n{scores.END}" in README, "run: python benchmarks/scores.py --write"
    assert f"{scores.TALLY_START}\n{scores.tally_table()}\n{scores.TALLY_END}" in README


def test_every_file_the_readme_names_is_there():
    named = re.findall(r"`((?:notebooks|benchmarks|workbench)/[\w/.]+)`", README)
    assert named and all((ROOT / path).exists() for path in named)


def test_every_public_name_in_the_readme_exists():
    names = set(re.findall(r"\bwb\.(\w+)", README))
    assert names and all(hasattr(wb, name) for name in names)


def test_the_readmes_example_runs_as_it_stands(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(example, "README.md", "exec"), {})  # our own text, which a reader pastes and runs
    assert "'total':" in capsys.readouterr().out
