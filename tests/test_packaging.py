"""What people install: pyproject.toml and environment.yml agree, and the Makefile's .venv is complete or not there."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from workbench import __version__
from workbench.runtime import LONE_ORACLE, within

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
NAME_ON_CONDA = {"torch": "pytorch"}
ORACLE = "--no-deps " + "".join(LONE_ORACLE)


def split(requirement: str) -> tuple[str, frozenset[str]]:
    """ "torch>=2.6,<2.14" -> ("torch", {">=2.6", "<2.14"})"""
    name, bounds = re.fullmatch(r"([\w.-]+)\s*(.*)", requirement).groups()
    return name, frozenset(bounds.split(",")) if bounds else frozenset()


def test_conda_gets_the_same_packages_within_the_same_bounds():
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    found = dict(
        split(line[4:]) for line in lines[lines.index("dependencies:") :] if line.startswith("  - ") and line[-1] != ":"
    )
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["sweep"]
    expected = {NAME_ON_CONDA.get(name, name): bounds for name, bounds in map(split, wanted)}
    assert found == expected | {"python": frozenset({PROJECT["project"]["requires-python"]}), "pip": frozenset()}
    assert lines[-1].strip() == "- -e ."  # and then the workbench itself


def test_every_requirement_has_bounds_on_both_sides():
    for requirement in sum(PROJECT["project"]["optional-dependencies"].values(), PROJECT["project"]["dependencies"]):
        name, bounds = split(requirement)
        assert {bound[0] for bound in bounds} in ({">", "<"}, {"="}), name


def test_the_torch_that_make_installs_is_within_the_bounds():
    pinned = re.search(r"^TORCH \?= torch==([\d.]+)$", MAKEFILE, re.MULTILINE)[1]
    bounds = dict(map(split, PROJECT["project"]["dependencies"]))["torch"]
    assert within(pinned, ",".join(bounds))


def test_the_oracle_that_is_installed_alone_is_the_same_everywhere():
    assert f"ORACLE := {''.join(LONE_ORACLE)}\n" in MAKEFILE and "--no-deps $(ORACLE)" in MAKEFILE
    for name in ("README.md", "environment.yml", "tests/conftest.py"):
        assert f"pip install {ORACLE}" in (ROOT / name).read_text(encoding="utf-8"), name


def test_the_version_is_the_same_everywhere():
    assert PROJECT["project"]["version"] == __version__


def test_every_file_beside_the_code_is_packaged():
    package = ROOT / "workbench"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["workbench"]
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    files = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc") and p.name != ".gitkeep"}
    assert files <= packaged


def test_the_licence_is_complete():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


# A stand-in for Python that writes down what pip was asked to install, in a "virtual environment" that is a copy of itself.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *"-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *"-m pip"*" show --quiet torch") grep -q torch== pip.log ;;
    *"-m pip"*" install "*) echo "${*##* install }" >> pip.log; test ! -e no-network ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A folder with our Makefile and pyproject.toml; ``make(...)`` there uses the stand-in and never installs anything."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "pip.log").touch()
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(project: Path, *arguments: str, python: str | None = None) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    command = ["make", "--no-print-directory", *arguments, f"PYTHON={python or project / 'python'}"]
    return subprocess.run(command, cwd=project, env=clean, capture_output=True, text=True, timeout=60)


def installed(project: Path) -> list[str]:
    """What pip was asked for since the last look."""
    lines = (project / "pip.log").read_text().splitlines()
    seen = project / "seen"
    before = int(seen.read_text()) if seen.exists() else 0
    seen.write_text(str(len(lines)))
    return lines[before:]


def test_make_installs_once_and_again_only_after_a_change(project):
    assert make(project, "env").returncode == 0
    assert installed(project) == ["torch==2.13.0", "-e .[sweep]"]
    assert make(project, "env").returncode == 0
    assert installed(project) == []
    assert make(project, "env-test").returncode == 0
    assert installed(project) == ["-e .[test]", ORACLE]
    (project / "pyproject.toml").touch()  # newer, but the same
    assert make(project, "env-test").returncode == 0
    assert installed(project) == []
    with (project / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert make(project, "env-test").returncode == 0
    assert installed(project) == ["-e .[sweep]", "-e .[test]", ORACLE]


def test_the_lab_needs_no_test_packages_and_another_torch_can_be_named(project):
    assert make(project, "lab", "TORCH=torch==2.13.0 --index-url https://example.org/cpu").returncode == 0
    assert installed(project) == ["torch==2.13.0 --index-url https://example.org/cpu", "-e .[sweep]"]


def test_a_failed_installation_is_taken_up_again(project):
    (project / "no-network").touch()
    assert make(project, "lab").returncode != 0
    (project / "no-network").unlink()
    installed(project)
    assert make(project, "env").returncode == 0
    assert installed(project) == ["-e .[sweep]"]  # torch had been written down as installed


def test_a_copied_checkout_installs_itself(project, tmp_path_factory):
    make(project, "env")
    copy = tmp_path_factory.mktemp("elsewhere") / "checkout"
    shutil.copytree(project, copy)
    installed(copy)
    assert make(copy, "env").returncode == 0
    assert installed(copy) == ["-e .[sweep]"]


def test_an_unsuitable_python_is_refused_in_one_line(project):
    for python in ("/no/such/python", "/bin/false"):
        made = make(project, "lab", python=python)
        ours = [line for line in made.stderr.splitlines() if not line.startswith("make:")]
        assert made.returncode != 0 and len(ours) == 1 and "Python 3.11 or newer with venv" in ours[0] and python in ours[0]
        assert not (project / ".venv").exists()


@pytest.mark.parametrize(("ci", "outcome"), [("", "3 skipped"), ("true", "3 errors")])
def test_a_missing_oracle_or_browser_is_skipped_but_fails_in_ci(tmp_path, ci, outcome):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    oracle\n    browser\n")
    (tmp_path / "transformers.py").write_text("raise ImportError('not on this machine')")
    (tmp_path / "test_it.py").write_text(
        "def test_oracle(transformers_oracle): pass\ndef test_v41(nemo_oracle): pass\n"
        "def test_browser(chromium_path): pass\ndef test_plain(): pass\n"
    )
    environment = os.environ | {"CI": ci, "PATH": "", "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def run(*options: str) -> str:
        command = [sys.executable, "-m", "pytest", "-rsE", "-p", "no:cacheprovider", *options, str(tmp_path)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60).stdout

    out = run()
    assert f"1 passed, {outcome}" in out and "not on this machine" in out and "no chromium" in out
    assert "1 passed, 3 deselected" in run("-m", "not (oracle or browser)")
