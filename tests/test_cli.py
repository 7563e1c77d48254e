import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

import workbench as wb
from tests.profiler_traces import cuda_trace
from tests.synthetic import synthetic_trace
from workbench import cli, runtime
from workbench.errors import InputError


def status_and_error(capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and stderr; what went to stdout stays for the next reader."""
    status = cli.main(arguments)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["fly"], "'fly'"),
        (["run", "--model", "m", "--prompt", "p"], "--out"),
        (["run", "--model", "m", "--prompt", "p", "--out", "o", "--topk", "many"], "'many'"),
        (["run", "--model", "m", "--prompt", "@nowhere.txt", "--out", "o"], "'nowhere.txt' does not exist"),
        (["lab", "--port", "70000"], "'70000'"),
        (["bench", "nothing-like-this"], "nothing-like-this"),
        (["train", "--recipe", "r", "--out", "o", "--fresh", "--resume"], "not allowed with"),
        (["cost", "v5", "--length", "5"], "v4-flash, v4-pro"),
        (["cost", "v4-pro"], "--length"),
        (["import", "nowhere.json"], "no file 'nowhere.json'"),
        (["import"], "FILE"),
        (["cost", "v4-pro", "--length", "5x"], "'5x'"),
        (["cost", "v4-pro", "--length", "2M"], "1048576"),
        (["cost", "v4-pro", "--length", "5", "--device", "abacus"], "'abacus'"),
        (["cost", "v4-pro", "--length", "-5"], "--length"),
        (["cost", "v4-pro", "--length", "5", "--cards", "0"], "cards"),
        (["cost", "v4-pro", "--length", "5", "--cards", "2.5"], "'2.5'"),
        (["cost", "v4-pro", "--length", "5", "--batch", "0"], "batch"),
        (["cost", "v4-pro", "--length", "5", "--tp", "0"], "tp"),
        (["cost", "v4-pro", "--length", "5", "--cards", "12", "--tp", "8"], "tp=8 and cards=12"),
        (["cost", "v4-flash", "--length", "5", "--cards", "128", "--tp", "128"], "tp=128 exceeds the model's 64"),
    ],
)
def test_bad_arguments_give_one_line_and_status_2(capsys, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    status, error = status_and_error(capsys, *arguments)
    assert status == 2 and error.startswith("workbench: ") and error.count("\n") == 1 and named in error
    assert not list(tmp_path.iterdir())


class FakeRun:
    """A LiveRun that is over when it has been waited for twice."""

    def __init__(self, trace) -> None:
        self.state, self.progress, self.error = "running", 0.0, None
        self.text, self.trace = "the answer", trace
        self.outcome: str | BaseException = "done"

    def wait(self, timeout_s=None) -> bool:
        if self.state == "running" and self.progress == 0.5:
            if isinstance(self.outcome, BaseException):
                raise self.outcome
            self.state = self.outcome
        self.progress = 0.5
        return self.state != "running"

    def stop(self) -> None:
        self.state = "stopped"


@pytest.fixture
def fake(monkeypatch):
    """``wb.load`` and ``wb.run`` replaced; what they were given is in ``asked``, and ``live`` is what run returns."""
    fake = types.SimpleNamespace(asked={}, live=FakeRun(synthetic_trace(23)))

    def load(source, *, device="auto"):
        fake.asked |= {"model": source, "device": device}
        return "a model"

    def run(model, prompt, **settings):
        assert model == "a model"
        fake.asked |= {"prompt": prompt} | settings
        return fake.live

    monkeypatch.setitem(vars(wb), "load", load)
    monkeypatch.setitem(vars(wb), "run", run)
    return fake


def test_run_saves_a_trace_and_prints_the_answer(capsys, tmp_path, fake):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("tausend Nadeln, 10 µm", encoding="utf-8")
    options = ["--max-new-tokens=7", "--topk=3", "--temperature=0.5", "--seed=11", "--prefetch=serial", "--device=cpu"]
    assert cli.main(["run", "--model", "tiny", "--prompt", f"@{prompt}", "--out", str(tmp_path / "t"), *options]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["the answer", f"trace: {tmp_path / 't'}"]
    assert printed.err == ""  # quiet in a pipe
    assert wb.Trace.load(tmp_path / "t").length == fake.live.trace.length
    assert fake.asked == {
        "model": "tiny",
        "device": "cpu",
        "prompt": "tausend Nadeln, 10 µm",
        "max_new_tokens": 7,
        "topk": 3,
        "temperature": 0.5,
        "seed": 11,
        "prefetch": "serial",
    }


def test_run_draws_its_progress_on_a_terminal(capsys, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["run", "--model", "tiny", "--prompt", "p", "--out", str(tmp_path / "t")]) == 0
    assert " 50% " in capsys.readouterr().err


def test_run_replaces_a_trace_but_nothing_else(capsys, tmp_path, fake):
    arguments = ["run", "--model", "tiny", "--prompt", "p", "--out"]
    assert cli.main([*arguments, str(tmp_path / "t")]) == cli.main([*arguments, str(tmp_path / "t")]) == 0
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("purr")
    fake.asked.clear()
    status, error = status_and_error(capsys, *arguments, str(tmp_path / "photos"))
    assert status == 2 and "photos" in error and not fake.asked
    status, error = status_and_error(capsys, *arguments, str(tmp_path / "photos" / "cat.txt"))
    assert status == 2 and "is a file" in error and (tmp_path / "photos" / "cat.txt").read_text() == "purr"


def test_a_refusal_by_the_library_is_one_line_even_when_it_had_several(capsys, tmp_path, fake, monkeypatch):
    def run(model, prompt, **settings):
        raise InputError(f"the prompt has {len(prompt)} tokens,\n  the model takes 4096; shorten it")

    monkeypatch.setitem(vars(wb), "run", run)
    status, error = status_and_error(capsys, "run", "--model", "m", "--prompt", "x" * 5003, "--out", str(tmp_path / "t"))
    assert (status, error) == (2, "workbench: the prompt has 5003 tokens, the model takes 4096; shorten it\n")
    assert not (tmp_path / "t").exists()


def test_a_prompt_file_must_be_text(capsys, tmp_path):
    (tmp_path / "p").write_bytes(b"abc\xff")
    status, error = status_and_error(capsys, "run", "--model", "m", "--prompt", f"@{tmp_path}/p", "--out", str(tmp_path / "t"))
    assert status == 2 and "byte 3" in error


def test_ctrl_c_stops_the_run_and_saves_nothing(capsys, tmp_path, fake):
    fake.live.outcome = KeyboardInterrupt()
    status, error = status_and_error(capsys, "run", "--model", "m", "--prompt", "p", "--out", str(tmp_path / "t"))
    assert status == 130 and fake.live.state == "stopped" and not list((tmp_path / "t").iterdir())


def test_a_run_that_failed_is_reported_with_its_reason(capsys, tmp_path, fake):
    fake.live.outcome, fake.live.error = "failed", "the model's output is not finite"
    status, error = status_and_error(capsys, "run", "--model", "m", "--prompt", "p", "--out", str(tmp_path / "t"))
    assert status == 2 and "output is not finite" in error and not list((tmp_path / "t").iterdir())


def test_a_folder_that_cannot_be_made_stops_the_run(capsys, tmp_path, fake):
    (tmp_path / "file").touch()
    status, error = status_and_error(capsys, "run", "--model", "m", "--prompt", "p", "--out", str(tmp_path / "file" / "t"))
    assert status == 2 and str(tmp_path / "file") in error and fake.live.state == "stopped"


@pytest.mark.parametrize(("flag", "fresh"), [([], False), (["--resume"], False), (["--fresh"], True)])
def test_train_passes_recipe_folder_and_start_on(capsys, tmp_path, monkeypatch, flag, fresh):
    asked = {}

    def train(recipe, out, *, fresh=False, progress=None):
        progress("step 1", 0.5)
        asked.update(recipe=recipe, out=out, fresh=fresh)

    monkeypatch.setitem(sys.modules, "workbench.training.train", types.SimpleNamespace(train=train))
    assert cli.main(["train", "--recipe", "tiny-v4", "--out", str(tmp_path / "m"), *flag]) == 0
    assert asked == {"recipe": "tiny-v4", "out": tmp_path / "m", "fresh": fresh} and capsys.readouterr().err == ""


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    """A checkout with one benchmark, which writes a file beside itself."""
    (tmp_path / "benchmarks").mkdir()
    body = '"""How long is nothing?\n\nMore."""\n\n\ndef main():\n    print("it ran")\n'
    (tmp_path / "benchmarks" / "nothing.py").write_text(body)
    (tmp_path / "benchmarks" / "_shared.py").write_text("")
    monkeypatch.setattr(runtime, "CHECKOUT", tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_bench_lists_what_there_is_and_runs_one(capsys, benchmarks):
    assert cli.main(["bench"]) == 0
    assert capsys.readouterr().out.split() == ["nothing", "How", "long", "is", "nothing?"]
    assert cli.main(["bench", "nothing"]) == 0
    assert capsys.readouterr().out == "it ran\n"
    assert cli.main(["bench", "--all"]) == 0
    assert capsys.readouterr().out == "it ran\n"


def test_arguments_after_the_name_reach_a_benchmark_that_takes_some(capsys, benchmarks, tmp_path):
    body = '"""Echo."""\n\n\ndef main(arguments=()):\n    print("got", *arguments)\n'
    (tmp_path / "benchmarks" / "echo.py").write_text(body)
    assert cli.main(["bench", "echo", "--lengths", "8K", "--all", "-h"]) == 0
    assert capsys.readouterr().out == "got --lengths 8K --all -h\n"
    assert cli.main(["bench", "--all"]) == 0
    assert capsys.readouterr().out == "got\nit ran\n"
    assert cli.main(["bench", "nothing", "--lengths", "8K"]) == 2
    assert "'nothing' takes no arguments, got '--lengths 8K'" in capsys.readouterr().err


def table(text):
    """First word of each line -> its words; of lines that begin alike the last."""
    return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


def test_cost_prints_a_table_that_names_formula_fit_and_rates(capsys):
    arguments = ["cost", "v4-flash", "--length", "1m", "--device", "H200", "ascend 910b", "--device", "B200", "--cards", "2"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    whole, devices = table(text.split("weights, modelled")[0]), table(text.split("weights, modelled")[1])
    assert "1,048,576 tokens; modelled (formula)" in text and max(map(len, text.splitlines())) <= 120
    assert whole["index"] == ["index", "0.374", "GB", "0.374", "GB"] and whole["without"][-2:] == ["3.688", "GB"]
    assert "bytes of the published checkpoint: unknown" in text
    assert devices["fits"] == ["fits", "yes", "NO", "yes"] and devices["longest"].count("(limit)") == 2
    assert devices["KV"] == ["KV", "cache,", "stored", "as", "released", "BF16", "released"]
    assert devices["index"][1:] == ["0.374", "GB", "1.409", "GB", "0.374", "GB"]
    assert "ascend-910b: supports BF16 caches, not FP8: cache kept in BF16" in text and "figures uncertain" in text
    assert "a single KV head (a latent) does not split" in text
    assert devices["1"][2] == "-" and float(devices["1"][1]) < float(devices["1"][3])  # tokens/s per card


def test_cost_splits_cards_into_groups_that_share_a_batch(capsys):
    arguments = ["cost", "v4-pro", "--length", "1M", "--device", "h100", "--cards", "16", "--tp", "8", "--batch", "4"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    found = table(text.split("16 cards in 2 groups of 8")[1])
    assert found["total"] == ["total", "10.562", "GB"] and found["fits"] == ["fits", "yes"]  # two sequences on every card
    assert found["largest"][-1] == "4" and found["most"][-1] == "8" and found["bound"][-1] == "bandwidth"
    rates = [float(found[count][1].replace(",", "")) for count in ("1", "2", "4", "8")]
    assert rates == sorted(rates)


def test_cost_says_what_is_unknown_extrapolated_and_published(capsys):
    for arguments in (["gqa-8", "--length", "4K"], ["v3.2", "--length", "1M", "--device", "m3-ultra", "b200", "--cards", "8"]):
        assert cli.main(["cost", *arguments]) == 0
    dense, latent = capsys.readouterr().out.split("DeepSeek-V3.2")
    assert "weights: unknown" in dense and "4,096 tokens" in dense and "EXTRAPOLATED" not in dense
    assert "EXTRAPOLATED beyond the model's max_position_embeddings of 163,840" in latent and " *\n" in latent
    assert cli.main(["cost", "v4.1-flash", "--length", "4K", "--device", "m3-ultra", "h100"]) == 0
    shared = capsys.readouterr().out
    assert "weights, published: 307.000 GB" in shared and "890 B" in shared
    assert "host and accelerator share one memory" in shared and "not one sequence" not in shared
    assert table(shared)["weights"][0] == "weights" and "510.000 GB" in shared


def test_cost_says_so_when_nothing_fits_and_when_nothing_is_held(capsys):
    assert cli.main(["cost", "v4-pro", "--length", "1M", "--device", "rtx-4090"]) == 0
    assert "not one sequence fits: no rates" in capsys.readouterr().out
    assert cli.main(["cost", "v4-pro", "--length", "0", "--device", "h100", "--cards", "16"]) == 0
    assert table(capsys.readouterr().out)["most"][-2:] == ["no", "limit"]


def test_cost_as_json_holds_the_same_numbers_as_the_library(capsys):
    arguments = ["cost", "v3.2", "--length", "100001", "--device", "h100", "--cards", "16", "--tp", "8", "--batch", "3"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {part: found["kv_bytes"][part] for part in ("kv", "index")} == {"kv": 61 * 656 * 100001, "index": 61 * 132 * 100001}
    assert found["decode_flops"]["total"] == wb.decode_flops("v3.2", 100001)["total"]
    (device,) = found["devices"]
    assert device["kv_bytes_per_card"]["index"] == 2 * found["kv_bytes"]["index"]  # two of three sequences on the fuller group
    assert device["most_concurrent_sequences"] == 2 * device["largest_batch_per_group"] == device["rates"][-1]["sequences"]
    assert found["groups"] == 2 and found["sources"]["weights"]["certainty"] == "derived"


def doctor(capsys) -> tuple[int, list[str]]:
    status = cli.main(["doctor"])
    return status, capsys.readouterr().out.splitlines()


def test_doctor_is_content_with_the_machine_the_tests_run_on(capsys):
    status, lines = doctor(capsys)
    assert status == 0 and not [line for line in lines if line.startswith("MISSING")]
    assert f"ok       torch {runtime.installed_version('torch')}" in lines
    assert any(runtime.device_name("cpu") in line for line in lines)


def test_doctor_names_what_is_missing_and_what_is_out_of_bounds(capsys, monkeypatch):
    bounds = {"torch": (">=2.6,<2.14", False), "plotly": (">=6.0,<8", False), "pytest": (">=8.3,<10", True)}
    monkeypatch.setattr(runtime, "requirements", lambda: bounds)
    monkeypatch.setattr(runtime, "installed_version", {"plotly": "5.24.1"}.get)
    monkeypatch.setattr(runtime, "find_chromium", lambda: None)
    status, lines = doctor(capsys)
    assert status == 1 and "MISSING  torch is not installed: pip install -e ." in lines
    assert 'warning  plotly 5.24.1 is outside >=6.0,<8: pip install "plotly>=6.0,<8"' in lines
    assert any(line.startswith("warning  pytest is not installed") for line in lines)
    assert "warning  nemo-automodel is not installed: pip install --no-deps nemo-automodel==0.7.0 (for the tests)" in lines
    assert any(line.startswith("warning  no chromium") for line in lines)


def test_doctor_lists_the_shipped_checkpoints(capsys, monkeypatch):
    monkeypatch.setattr(runtime, "checkpoints", lambda: {"tiny-v4": 3_600_000})
    assert "ok       checkpoint tiny-v4, 3.6 MB" in doctor(capsys)[1]
    monkeypatch.setattr(runtime, "checkpoints", dict)
    assert any(line.startswith("warning  no shipped checkpoints") for line in doctor(capsys)[1])


def test_output_into_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m workbench bench --help | head -c 1"
    out = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=runtime.CHECKOUT)
    assert out.stdout == "u" and out.stderr == ""


@pytest.mark.notebook
def test_lab_serves_the_notebooks_behind_a_token_and_never_calls_out(tmp_path):
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "s"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "w"),
    }
    environment |= {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "workbench", "lab", "--no-browser", "--port", str(port)]
        server = subprocess.Popen(command, env=environment, cwd=runtime.CHECKOUT, stderr=subprocess.PIPE, text=True)
        impatient = threading.Timer(120, server.kill)
        impatient.start()
        try:
            log = []
            for line in server.stderr:
                log.append(line)
                if address := re.search(r"http://127\.0\.0\.1:(\d+)(/lab/tree/\S+)\?token=(\w{20,})", line):
                    break
            else:
                pytest.fail("no address was printed:\n" + "".join(log))
            threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stall the server
            here, page, token = f"http://127.0.0.1:{address[1]}", address[2], address[3]
            assert int(address[1]) != port and page.endswith("/" + cli.START_PAGE)

            def get(path: str) -> str:
                request = urllib.request.Request(here + path, headers={"Authorization": f"token {token}"})
                with urllib.request.urlopen(request, timeout=60) as answer:
                    assert answer.status == 200
                    return answer.read().decode()

            while server.poll() is None:  # Jupyter prints its address just before it listens there
                with suppress(ConnectionError), socket.create_connection(("127.0.0.1", int(address[1])), timeout=60):
                    break
                time.sleep(0.05)
            get(page)
            settings = json.loads(re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', get("/lab"), re.DOTALL)[1])
            assert settings["news"] == {"disabled": True}
            assert json.loads(get("/lab/api/news")) == {"news": []}
            assert json.loads(get("/lab/api/update"))["notification"] is None
            plugin = json.loads(get("/lab/api/settings/@jupyter-widgets/jupyterlab-manager:plugin"))
            assert (
                plugin["schema"]["properties"]["saveState"]["default"] is True
            )  # so that reopened notebooks show their widgets
            assert {"notebooks", "pyproject.toml"} <= {entry["name"] for entry in json.loads(get("/api/contents"))["content"]}
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(here + "/api/contents", timeout=60)
        finally:
            impatient.cancel()
            server.terminate()
            server.wait(timeout=30)


def test_lab_outside_a_checkout_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "CHECKOUT", Path(tmp_path))
    monkeypatch.chdir(tmp_path)
    status, error = status_and_error(capsys, "lab")
    assert status == 2 and "run this from a checkout" in error


def test_import_says_how_much_of_each_stream_compute_covered(capsys, tmp_path):
    path = tmp_path / "cuda.json"
    path.write_text(json.dumps(cuda_trace()), encoding="utf-8")
    assert cli.main(["import", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    copies = next(line.split() for line in lines if line.startswith("stream 20: copies"))
    assert copies[3:] == ["0.150", "0.070", "0.080", "47%"] and "-20.0 to +5.0 us" in lines[-1]


def test_import_reads_an_own_export(capsys, tmp_path):
    timeline = synthetic_trace(23).timeline
    path = wb.chrome_trace.save(timeline, tmp_path / "own.json.gz")
    assert cli.main(["import", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"{len(timeline.spans)} spans, recorded on CPU" in printed and f"stall {1e3 * timeline.stall_s:.3f} ms" in printed
