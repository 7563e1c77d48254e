"""What `workbench doctor` says about blank widgets."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from jupyter_client.kernelspec import NoSuchKernel

from workbench import cli, frontend
from workbench.runtime import CHECKOUT


@pytest.fixture
def jupyter(tmp_path, monkeypatch) -> Path:
    """A folder that is the only one in which Jupyter looks for scripts and kernels, with all that is needed."""
    for name in frontend.SCRIPTS:
        script(tmp_path, name)
    kernel(tmp_path, "python")
    monkeypatch.setattr("jupyter_core.paths.jupyter_path", lambda *parts: [str(tmp_path.joinpath(*parts))])
    monkeypatch.setattr("jupyter_client.kernelspec.jupyter_path", lambda *parts: [str(tmp_path.joinpath(*parts))])
    monkeypatch.setattr("jupyter_client.kernelspec.jupyter_data_dir", lambda: str(tmp_path))
    monkeypatch.setattr(frontend.shutil, "which", lambda name: str(Path(sys.executable).parent / name))
    return tmp_path


def script(folder: Path, name: str, text: str = json.dumps({"version": "1.2.3"})) -> None:
    place = folder / "labextensions" / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "package.json").write_text(text)


def kernel(folder: Path, program: str) -> None:
    place = folder / "kernels" / frontend.KERNEL
    place.mkdir(parents=True, exist_ok=True)
    (place / "kernel.json").write_text(json.dumps({"argv": [program, "-m", "x"], "display_name": "x", "language": "python"}))


def levels() -> list[str]:
    return [level for level, _ in frontend.widget_checks()][:4]  # the front ends after them are no checks


def test_a_whole_environment_is_ok(jupyter):
    assert levels() == ["ok"] * 4


def test_this_machine_can_show_widgets(capsys):
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if re.match(r"ok +widget script @jupyter-widgets/jupyterlab-manager \d", line)]
    assert [line for line in lines if re.match(r"ok +widget script anywidget \d", line)]


@pytest.mark.parametrize("name", frontend.SCRIPTS)
@pytest.mark.parametrize("text", [None, "", "[]", "{}"])
def test_a_missing_or_broken_script_is_named_with_its_package(jupyter, name, text):
    if text is None:
        (jupyter / "labextensions" / name / "package.json").unlink()
    else:
        script(jupyter, name, text)
    (bad,) = [line for level, line in frontend.widget_checks() if level == "MISSING"]
    assert f"widget script {name} is not where" in bad and f"--force-reinstall {frontend.SCRIPTS[name]}," in bad


def test_a_kernel_of_another_python_or_none_is_named(jupyter, monkeypatch):
    kernel(jupyter, "/opt/other/bin/python")
    assert levels()[2] == "warning" and "/opt/other/bin/python" in frontend.widget_checks()[2][1]
    kernel(jupyter, sys.executable)
    assert levels()[2] == "ok"

    def none(manager, name):
        raise NoSuchKernel(name)

    monkeypatch.setattr("jupyter_client.kernelspec.KernelSpecManager.get_kernel_spec", none)
    assert levels()[2] == "MISSING"


def test_another_jupyter_on_the_path_is_named(jupyter, monkeypatch):
    monkeypatch.setattr(frontend.shutil, "which", lambda name: "/opt/other/bin/jupyter")
    assert levels()[3] == "warning" and "/opt/other/bin/jupyter" in frontend.widget_checks()[3][1]


def test_the_readme_has_the_causes_doctor_looks_for():
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Why is my widget blank?")[1].split("\n## ")[0]
    assert "workbench doctor" in table and "ipykernel install --sys-prefix" in table and "workbench lab" in table
    assert (
        dict(re.findall(r"^\| ([\w ]+?) \| (tested|documented, not tested here) \|", table, re.MULTILINE))
        == frontend.FRONT_ENDS
    )


def test_doctor_says_where_the_widgets_were_tested(capsys):
    cli.main(["doctor"])
    said = capsys.readouterr().out
    assert "widgets in Notebook 7: tested" in said and "widgets in Voila: documented, not tested here" in said
