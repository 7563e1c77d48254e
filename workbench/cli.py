"""The ``workbench`` command: open the notebooks, run a model, train one, look at this machine.

Exit status 0; 2 with one clear line on stderr for bad input; 130 after Ctrl-C. Progress is drawn on a terminal only.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from workbench import frontend, runtime
from workbench.devices import devices
from workbench.errors import InputError, WorkbenchError
from workbench.presets import presets
from workbench.progress import Progress
from workbench.transcript import Transcript, read_prompt

START_PAGE = "notebooks/00_start_here.ipynb"
LAB_CONFIG = Path(__file__).parent / "assets" / "jupyter"  # has notebooks keep the state of their widgets, for reopening


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    kept = 2 if arguments[:1] == ["bench"] and not "".join(arguments[1:2]).startswith("-") else None
    try:
        options = _parser().parse_args(arguments[:kept])
        if kept:
            options.arguments = list(arguments[kept:])
        return options.command(options)
    except (WorkbenchError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as in `workbench doctor | head -1`
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0
        print(f"workbench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("workbench: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="workbench", description="Watch DeepSeek-V4 work.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    lab = commands.add_parser("lab", help="open the notebooks in JupyterLab")
    lab.add_argument("--no-browser", action="store_true", help="print the address instead of opening it")
    lab.add_argument("--port", type=_port, default=8888, help="first port to try (default %(default)s)")
    lab.set_defaults(command=_lab)

    run = commands.add_parser("run", help="run a model on a prompt and save what happened")
    run.add_argument("--model", required=True, metavar="M", help="a shipped checkpoint or a model folder")
    run.add_argument(
        "--prompt", required=True, metavar="TEXT|@FILE", help="the text, or @ and a UTF-8 file: text, or a .jsonl transcript"
    )
    run.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the trace is saved")
    run.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    run.add_argument("--topk", type=int, metavar="K", help="entries each CSA query keeps (default: the model's)")
    run.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument(
        "--prefetch", choices=("prefetch", "serial", "resident"), default="prefetch", help="when Engram rows are fetched"
    )
    run.add_argument("--device", default="auto", help="auto, or as torch names it: cpu, cuda:1, mps")
    run.set_defaults(command=_run)

    cost = commands.add_parser("cost", help="count a published model's cache, work and fit, without running it")
    cost.add_argument("preset", metavar="PRESET", help=f"one of {', '.join(presets)}")
    cost.add_argument("--length", required=True, type=token_count, metavar="N[K|M]", help="tokens; K is 1,024 and M 1,048,576")
    cost.add_argument("--device", nargs="+", action="extend", default=[], metavar="D", help=f"any of {', '.join(devices)}")
    cost.add_argument("--cards", type=int, default=1, metavar="N", help="devices that share the work (default %(default)s)")
    cost.add_argument(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="cards of a tensor-parallel group (default %(default)s); cards / tp groups share the batch",
    )
    cost.add_argument(
        "--batch", type=int, default=1, metavar="N", help="sequences decoded together by all cards (default %(default)s)"
    )
    cost.add_argument("--json", action="store_true", help="the same for programs, and more of it")
    cost.set_defaults(command=_cost)

    train = commands.add_parser("train", help="train a small checkpoint from a recipe")
    train.add_argument("--recipe", required=True, metavar="R", help="name of the recipe")
    train.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the checkpoint is written")
    start = train.add_mutually_exclusive_group()
    start.add_argument("--resume", dest="fresh", action="store_false", help="go on where an earlier training stopped (default)")
    start.add_argument("--fresh", action="store_true", help="start again, forgetting an earlier training in FOLDER")
    train.set_defaults(command=_train, fresh=False)

    sweep = commands.add_parser("sweep", help="train a grid of small variants: quality against KV bytes held and read")
    sweep.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where points are written, one file each")
    sweep.add_argument("--grid", choices=("small", "full"), default="small", help="which variants (default %(default)s)")
    sweep.add_argument("--seeds", type=int, default=1, metavar="N", help="times each variant is trained (default %(default)s)")
    sweep.add_argument("--steps", type=int, metavar="N", help="optimiser steps of a point (default: the light recipe's)")
    sweep.add_argument("--scheduler", metavar="ADDRESS", help="a running Dask scheduler you trust (default: a local cluster)")
    sweep.add_argument("--workers", type=int, default=2, metavar="N", help="processes on this machine (default %(default)s)")
    sweep.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads of a worker (default %(default)s)")
    sweep.set_defaults(command=_sweep)

    bench = commands.add_parser("bench", help="measure something on this machine; without a name, list what can be measured")
    bench.add_argument("name", nargs="?", metavar="NAME", help="what follows the name is passed on; `bench NAME --help`")
    bench.add_argument("--all", action="store_true", help="run every benchmark in turn")
    bench.set_defaults(command=_bench, arguments=[])

    read = commands.add_parser("import", help="read a profiler's trace or a server's selections and say what is in them")
    read.add_argument(
        "file", type=Path, metavar="FILE", help="what torch.profiler exports (.json, .json.gz), an own export, or a capture"
    )
    read.add_argument("--preset", metavar="P", help="of a capture: the model the server runs (default: the one it names)")
    read.add_argument("--layers", type=int, nargs="+", metavar="N", help="of a capture: some of the layers that choose")
    read.set_defaults(command=_import)

    export = commands.add_parser("export", help="write a notebook, or a folder of them, as one HTML file that works from disk")
    export.add_argument(
        "source", type=Path, metavar="NOTEBOOK|FOLDER", help="a folder becomes one page with a table of contents"
    )
    export.add_argument("--html", required=True, type=Path, metavar="FILE", help="the file to write")
    export.add_argument("--no-run", dest="run", action="store_false", help="take the outputs that are stored, run nothing")
    export.add_argument(
        "--max-bytes", type=int, default=5_000_000, metavar="N", help="refuse a larger page (default %(default)s)"
    )
    export.set_defaults(command=_export)

    doctor = commands.add_parser("doctor", help="check this machine and say what to do")
    doctor.set_defaults(command=_doctor)
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 1 to 65535, got {text!r}")
    return int(text)


def token_count(text: str) -> int:
    factor = {"K": 2**10, "M": 2**20}.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"a length is a whole number of tokens such as 4096, 128K or 1M, got {text!r}")
    return int(digits) * factor


def _checkout(part: str) -> Path:
    """The checkout's root: where this package lies, or the current folder when the package was installed elsewhere."""
    for root in (runtime.CHECKOUT, Path.cwd()):
        if (root / part).is_dir():
            return root
    raise InputError(f"no {part}/ beside the package or in {Path.cwd()}; run this from a checkout of the workbench")


def _lab(options: argparse.Namespace) -> int:
    """Serve the notebooks on this machine only, behind Jupyter's token; the server itself never calls out."""
    root = _checkout("notebooks")
    try:
        from jupyterlab.labapp import main as serve
    except ImportError:
        raise WorkbenchError("JupyterLab is not installed; install the workbench with: pip install -e .") from None
    settings = [
        f"--ServerApp.root_dir={root}",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={options.port}",
        "--ServerApp.port_retries=50",  # a taken port means the next free one
        f"--LabApp.default_url=/lab/tree/{START_PAGE}",
        "--LabApp.news_url=None",  # no news, and no question about news
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",  # the other one searches PyPI
    ]
    if options.no_browser:
        settings.append("--no-browser")
    places = [os.environ.get("JUPYTER_CONFIG_PATH", ""), str(LAB_CONFIG)]  # what the user has set comes first
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(place for place in places if place)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        settings.append("--allow-root")  # containers; the server listens on this machine only
    serve(settings)  # in this process, so that Ctrl-C and kill reach Jupyter itself
    return 0


def _run(options: argparse.Namespace) -> int:
    """Run the model in the background, show how far it is, print the answer and save the trace."""
    import workbench as wb
    from workbench.trace_files import MANIFEST_FILE

    prompt, out = _prompt(options.prompt), options.out
    if out.is_file():
        raise InputError(f"{out} is a file; give a folder to save the trace in")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_FILE).is_file():
        raise InputError(f"{out} holds something that is not a trace; give a new or an empty folder")
    settings = {name: getattr(options, name) for name in ("max_new_tokens", "topk", "temperature", "seed", "prefetch")}
    live = wb.run(wb.load(options.model, device=options.device), prompt, **settings)
    bar = Progress()
    try:
        out.mkdir(parents=True, exist_ok=True)  # an unusable place shows now, not after the run
        while not live.wait(0.2):
            bar.show(live.progress, "Ctrl-C stops")
    except BaseException:
        live.stop()
        live.wait(10.0)  # the step under way
        raise
    finally:
        bar.clear()
    if live.state == "failed":
        raise WorkbenchError(f"{live.error}; nothing was saved")
    folder = live.trace.save(out)
    print(live.text)
    print(f"trace: {folder}")
    return 0


def _prompt(text: str) -> str | Transcript:
    """The prompt itself, or the content of the file named after an @."""
    if not text.startswith("@"):
        return text
    return read_prompt(text[1:])


def _cost(options: argparse.Namespace) -> int:
    """Print what `workbench.cost` counts for a preset: a table to read, or JSON."""
    from workbench import cost
    from workbench.cost.table import report_lines

    on = [devices[name] for name in options.device]
    split = {"cards": options.cards, "tp": options.tp, "batch": options.batch}
    report = cost.report(presets[options.preset], options.length, on, **split)
    print(json.dumps(report, indent=2) if options.json else "\n".join(report_lines(report)))
    return 0


def _train(options: argparse.Namespace) -> int:
    from workbench.training.train import train

    bar = Progress()
    try:
        train(options.recipe, options.out, fresh=options.fresh, progress=(lambda text, part: bar.show(part, text)))
    except KeyboardInterrupt:
        bar.clear()
        print(f"workbench: {options.out} keeps the state of every 50th step; the same line goes on from there", file=sys.stderr)
        raise
    finally:
        bar.clear()
    print(f"checkpoint: {options.out}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    """Train what is missing, print a line for each point of the frontier; status 2 if a point failed."""
    from workbench import frontier
    from workbench.training.sweep import sweep

    steps = frontier.STEPS if options.steps is None else options.steps
    variants = frontier.grid(options.grid, options.seeds, steps)
    bar = Progress()
    where = {"scheduler": options.scheduler, "workers": options.workers, "threads": options.threads}
    try:
        found = sweep(variants, options.out, **where, progress=(lambda text, part: bar.show(part, text)))
    except KeyboardInterrupt:
        bar.clear()
        print(f"workbench: {options.out} keeps the finished points; the same line makes the others", file=sys.stderr)
        raise
    finally:
        bar.clear()
    for text in found.broken:
        print(f"workbench: {text}; it was made anew", file=sys.stderr)
    points = [frontier.read_point(options.out / f"{name}.json") for name in found.kept + found.made]
    print("\n".join(frontier.table_lines(points)))
    print(f"points: {options.out} ({len(found.made)} made, {len(found.kept)} were there)")
    if found.failed:
        name, reason = next(iter(found.failed.items()))
        raise WorkbenchError(
            f"{len(found.failed)} of {len(variants)} points failed, {name} first: {reason}; finished points were kept, the "
            "same line makes the others"
        )
    return 0


def _bench(options: argparse.Namespace) -> int:
    """Run ``main()`` of benchmarks/NAME.py, given the arguments after the name if it takes any, or list the names."""
    root = _checkout("benchmarks")
    files = {path.stem: path for path in sorted((root / "benchmarks").glob("[!_]*.py"))}
    if options.name and options.name not in files:
        raise InputError(f"no benchmark {options.name!r}; there are {', '.join(files) or 'none yet'}")
    sys.path.insert(0, str(root))
    for name in files if options.all else [options.name] if options.name else []:
        main = importlib.import_module(f"benchmarks.{name}").main
        if inspect.signature(main).parameters:
            main(options.arguments)
        elif options.arguments:
            raise InputError(f"benchmark {name!r} takes no arguments, got {' '.join(options.arguments)!r}")
        else:
            main()
    if not options.name and not options.all:
        for name, path in files.items():
            about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"{name:20} {about.partition(chr(10))[0]}".rstrip())
    return 0


def _import(options: argparse.Namespace) -> int:
    """One line a stream or thread of a profiler's trace, or the totals of a timeline; wb.OverlapTimeline(FILE) draws it.

    Of a server's selections one line a layer; wb.AttentionExplorer(wb.Trace.from_capture(FILE)) draws them.
    """
    from workbench import captures, chrome_trace
    from workbench.profile import Profile, overlap_lines

    if not options.file.is_file():
        raise InputError(f"no file {str(options.file)!r}: give an exported Chrome trace, or what wb.capture saved")
    if captures.is_capture(options.file):
        trace = captures.trace_of(options.file, options.preset, layers=options.layers)
        print("\n".join(captures.summary_lines(trace)))
        return 0
    if options.preset or options.layers:
        raise InputError(f"{options.file} is no capture, so --preset and --layers mean nothing; leave them out")

    found = chrome_trace.load(options.file)
    if isinstance(found, Profile):
        print("\n".join(overlap_lines(found)))
    else:
        stalled, fetched = 1e3 * found.stall_s, 1e3 * found.fetch_s
        print(f"{len(found.spans):,} spans, {found.origin}{f' on {found.device}' if found.device else ''}; {found.note}")
        print(f"rows on their way {fetched:,.3f} ms, stall {stalled:,.3f} ms, hidden {found.hidden_fraction:.0%}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from workbench.export import export

    bar = Progress()
    try:
        written = export(
            options.source,
            options.html,
            run=options.run,
            most_bytes=options.max_bytes,
            report=lambda part, what: bar.show(part, what),
        )
    finally:
        bar.clear()
    print(f"{written}: {written.stat().st_size / 1e6:.1f} MB")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    """One line per thing looked at: ok, warning (works, with a limit), or MISSING, with what to do. Status 1 if missing."""
    python = ("ok", f"Python {platform.python_version()} at {sys.executable}")
    lines = [python, *_check_packages(), *_check_widgets(), *_check_machine(), _check_browser(), *_check_checkpoints()]
    for level, text in lines:
        print(f"{level:8} {text}")
    return int(any(level == "MISSING" for level, _ in lines))


def _check_packages() -> list[tuple[str, str]]:
    lines = []
    purposes = {"test": " (for the tests)", "sweep": " (for `workbench sweep`)"}
    for name, (bounds, extra) in runtime.requirements().items():
        version = runtime.installed_version(name)
        if version is None:
            level, what = ("warning", f'".[{extra}]"') if extra else ("MISSING", ".")
            lines.append((level, f"{name} is not installed: pip install -e {what}{purposes.get(extra, '')}"))
        elif not runtime.within(version, bounds):
            lines.append(("warning", f'{name} {version} is outside {bounds}: pip install "{name}{bounds}"'))
        else:
            lines.append(("ok", f"{name} {version}"))
    name, bounds = runtime.LONE_ORACLE
    version = runtime.installed_version(name)
    if version is not None and runtime.within(version, bounds):
        return [*lines, ("ok", f"{name} {version}")]
    found = "is not installed" if version is None else f"{version} is not {bounds.strip('=')}"
    return [*lines, ("warning", f"{name} {found}: pip install --no-deps {name}{bounds} (for the tests)")]


def _check_widgets() -> list[tuple[str, str]]:
    try:
        return frontend.widget_checks()
    except ImportError as error:
        return [("MISSING", f"Jupyter cannot be imported ({error}): pip install -e .")]


def _check_machine() -> list[tuple[str, str]]:
    try:
        found = runtime.machine(accelerator=True)
    except ImportError as error:
        return [("MISSING", f"torch cannot be imported ({error}): pip install -e .")]
    memory, load = found["memory_bytes"], found["load_average"]
    lines = [("ok", f"{found['device']}; torch computes with {found['threads']}, a live run with {runtime.threads_for_run()}")]
    lines.append(("ok", f"CUDA: {', '.join(found['cuda'])}" if found["cuda"] else "no CUDA device: models run on the CPU"))
    if memory is not None:
        small = memory < 2 * 10**9
        advice = ": close other programs, and keep to the shipped checkpoints" if small else ""
        lines.append(("warning" if small else "ok", f"memory {memory / 1e9:.1f} GB{advice}"))
    if load is not None and load > found["cores"]:
        lines.append(
            ("warning", f"load average {load:.1f} on {found['cores']} cores: timings will be unsteady until it is quiet")
        )
    return lines


def _check_browser() -> tuple[str, str]:
    path = runtime.find_chromium()
    if path is None:
        return "warning", "no chromium: the browser tests are skipped (Debian: apt-get install chromium)"
    return "ok", f"browser for the tests at {path}"


def _check_checkpoints() -> list[tuple[str, str]]:
    shipped = runtime.checkpoints()
    if not shipped:
        return [("warning", "no shipped checkpoints: get the whole checkout, or make one with `workbench train`")]
    return [("ok", f"checkpoint {name}, {size / 1e6:.1f} MB") for name, size in shipped.items()]
