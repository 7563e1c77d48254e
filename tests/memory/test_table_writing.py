"""Making a host table: what cannot be one is refused, and a write that breaks off leaves nothing to be taken for one."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from workbench.errors import InputError, WorkbenchError
from workbench.memory import table_file
from workbench.memory.table import EngramTable

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows must be a positive whole number, got 0"),
        ({"rows": 2.5}, "rows must be a positive whole number, got 2.5"),
        ({"rows": True}, "rows must be a positive whole number, got True"),
        ({"width": -3}, "width must be a positive whole number, got -3"),
        ({"width": "8"}, "width must be a positive whole number, got '8'"),
        ({"rows": 2**62}, "more than a table can hold"),
        ({"dtype": "fp4"}, "dtype is one of fp16, bf16, fp8, got 'fp4'"),
        ({"fill": "ones"}, "fill must be one of random, zero, got 'ones'"),
        ({"seed": -1}, "seed must be a whole number, 0 or more, got -1"),
        ({"seed": 0.5}, "seed must be"),
    ],
)
def test_impossible_tables_are_refused_and_leave_nothing(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        EngramTable.create(tmp_path / "t", **({"rows": 5, "width": 4} | arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        (np.ones((2, 3), np.int64), "fp16", "floating-point"),
        (np.ones(3, np.float32), "fp16", "rows"),
        (np.ones((0, 3), np.float32), "fp16", "rows"),
        ([], "fp16", "got none"),
        ([np.ones((2, 3)), np.ones((2, 4))], "fp16", r"must be \[n, 3\], got \[2, 4\] after row 2"),
        (np.array([[1.0, np.nan]]), "bf16", "value 1 of row 0 is not finite"),
        ([np.ones((2, 2)), np.array([[1.0, 1e5]])], "fp16", "rows 2 and on: value 1 of row 0 is too large for fp16"),
        (np.array([[3.4e38]], np.float32), "bf16", "too large for bf16"),
        (np.full((1, 33), 0x7F, np.uint8), "fp8", "NaN or infinity"),
        (np.full((1, 33), 0xFE, np.uint8), "fp8", "NaN or infinity"),  # 448 * 2^127
        (np.array([[0x0F, 0xFF]], np.uint8), "fp8", "NaN or infinity"),
        (np.full((1, 4), 0x7C, np.uint8), "fp16", "NaN or infinity"),
        (np.zeros((1, 5), np.uint8), "bf16", "2 values have 4 bytes"),
    ],
)
def test_rows_that_cannot_be_stored_are_refused_and_leave_nothing(tmp_path, values, dtype, message):
    with pytest.raises(InputError, match=message):
        EngramTable.from_rows(tmp_path / "t", values, dtype)
    assert not list(tmp_path.iterdir())


# -- writing that breaks off -----------------------------------------------------------------------------------------------


def failing_write(after: int, error: BaseException):
    real, calls = os.write, []

    def write(fd, data):
        calls.append(len(data))
        if len(calls) > after:
            raise error
        return real(fd, data[: max(1, len(data) // 2)])  # the system may write less than asked

    return write


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), WorkbenchError, "no room left on its disk.*free some room"),
        (OSError(errno.EIO, "Input/output error"), WorkbenchError, r"cannot be written \(Input/output error\)"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
@pytest.mark.parametrize("after", [0, 3, 60])
def test_a_write_that_fails_leaves_no_file_and_an_older_table_as_it_was(
    tmp_path, monkeypatch, error, kind, message, after, older
):
    path = tmp_path / "t"
    if older:
        EngramTable.create(path, 3, 4, seed=1).close()
    held = path.read_bytes() if older else None
    monkeypatch.setattr(table_file, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(table_file.os, "write", failing_write(after, error))
    with pytest.raises(kind, match=message or None):
        EngramTable.create(path, 2000, 8)
    assert [p.name for p in tmp_path.iterdir()] == (["t"] if older else [])
    assert not older or path.read_bytes() == held


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(table_file.os, "write", failing_write(10**9, OSError()))
    with EngramTable.create(tmp_path / "t", 2000, 8) as table:
        assert table.verify()


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on file sizes is Unix's")
def test_a_real_limit_of_the_system_is_one_clear_error(tmp_path):
    code = f"""
import resource, workbench as wb
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    wb.EngramTable.create({str(tmp_path / "t")!r}, 2**16, 64)
except wb.WorkbenchError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)
    assert "no room left on its disk (File too large)" in out.stdout and not list(tmp_path.iterdir())


def test_a_process_killed_while_writing_leaves_nothing_that_opens(tmp_path):
    code = f"""
import os, workbench as wb
wb.EngramTable.create({str(tmp_path / "t")!r}, 2**17, 64, progress=lambda share: share > 0.5 and os._exit(9))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, timeout=120)
    assert out.returncode == 9 and not (tmp_path / "t").exists()
    (partial,) = tmp_path.iterdir()
    assert partial.stat().st_size > 2**20
    with pytest.raises(InputError, match="is not an Engram table"):
        EngramTable.open(partial)
    EngramTable.create(tmp_path / "t", 5, 4).close()  # and is in nobody's way


def test_a_reader_never_sees_a_table_before_it_is_whole(tmp_path):
    seen = []
    EngramTable.create(tmp_path / "t", 2**16, 64, progress=lambda share: seen.append((tmp_path / "t").exists())).close()
    assert seen and not any(seen)


def test_too_little_room_is_said_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(table_file.shutil, "disk_usage", lambda path: os.statvfs_result([0] * 10) and _Usage)
    with pytest.raises(InputError, match=r"needs 2\.0 MB but 1\.0 MB are free in .*; free some room or choose another folder"):
        EngramTable.create(tmp_path / "t", 10**5, 10)
    with pytest.raises(InputError, match="are free"):
        EngramTable.from_rows(tmp_path / "t", np.ones((10**5, 10), np.float32))
    EngramTable.create(tmp_path / "t", 10**5, 10, fill="zero").close()  # holes need none


class _Usage:
    free = 10**6


def test_places_that_take_no_table_are_refused(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    for path, message in (
        (tmp_path / "nowhere" / "t", "nowhere is not a folder; make it first"),
        (tmp_path / "notes.txt" / "t", "notes.txt is not a folder"),
        (tmp_path / "notes.txt", "exists and is not an Engram table; it was left alone"),
        (tmp_path, "exists and is not an Engram table"),
    ):
        with pytest.raises(InputError, match=message):
            EngramTable.create(path, 3, 4)
    assert (tmp_path / "notes.txt").read_text() == "mine"

    def refuse(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(table_file.os, "open", refuse)
    with pytest.raises(WorkbenchError, match=r"cannot be written \(Read-only file system\).*choose a folder you may write in"):
        EngramTable.create(tmp_path / "t", 3, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="permissions are Unix's")
@pytest.mark.parametrize("mode", [0o555, 0o444])
def test_a_folder_without_permission_is_one_clear_error(tmp_path, mode):
    """A real read-only folder, and one that may not be entered. Root may write anywhere, so there the child gives that up."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    folder.chmod(mode)
    code = f"""
import os, workbench as wb
from workbench.memory import table
os.chdir({str(tmp_path)!r})
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    wb.EngramTable.create("theirs/t", 3, 4)
except wb.WorkbenchError as error:
    print(error)
try:
    wb.EngramTable.open("theirs/t")
except wb.InputError as error:
    print(error)
"""
    tmp_path.chmod(0o755)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)
    folder.chmod(0o755)
    made, opened = out.stdout.splitlines()
    assert "theirs/t cannot be written (Permission denied)" in made
    assert "choose a folder you may write in" in made and "theirs/t cannot be opened" in opened
    assert not list(folder.iterdir())
