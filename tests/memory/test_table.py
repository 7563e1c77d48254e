"""The host table: what is written comes back, wherever it lies in a file; what is no whole table is refused."""

import os
import pickle
import re
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.errors import InputError, WorkbenchError
from workbench.memory import row_formats, table_file
from workbench.memory.table import EngramTable
from workbench.memory.table_file import PAGE, Header

ROOT = Path(__file__).parents[2]
ROWS, WIDTH = 1009, 96  # prime rows; three runs of 32
DTYPES = ("fp16", "bf16", "fp8")


def draw(rows: int = ROWS, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Values over many powers of two, with zeros, both signs, and a run of nothing but zeros."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((rows, width)) * 2.0 ** rng.integers(-12, 6, (rows, width))).astype(np.float32)
    values[::7, ::5] = 0
    values[3, :32] = 0
    return values


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """What torch makes of the values in that format: independent of the table's own coding."""
    x = torch.from_numpy(values)
    if dtype != "fp8":
        return x.to({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]).float().numpy()
    runs = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32)).double()
    amax = runs.abs().amax(-1, keepdim=True)
    scale = torch.where(amax > 0, 2.0 ** torch.ceil(torch.log2(amax / 448)), 1.0)
    return ((runs / scale).float().to(torch.float8_e4m3fn).double() * scale).flatten(1)[:, : x.shape[1]].float().numpy()


@pytest.fixture(params=DTYPES)
def table(request, tmp_path):
    with EngramTable.from_rows(tmp_path / "rows.table", draw(), request.param) as made:
        yield made


@pytest.fixture
def small(tmp_path):
    with EngramTable.create(tmp_path / "small.table", 50, 8) as made:
        yield made


# -- values ----------------------------------------------------------------------------------------------------------------


def test_gathered_rows_are_the_rounded_ones_in_any_shape(table):
    ids = np.random.default_rng(1).integers(0, ROWS, (3, 5, 7))
    values = table.gather(ids)
    assert values.shape == (3, 5, 7, WIDTH) and values.dtype == (np.float16 if table.dtype == "fp16" else np.float32)
    expected = rounded(draw(), table.dtype)
    np.testing.assert_array_equal(values, expected[ids])
    np.testing.assert_array_equal(table.gather(5), expected[5])
    np.testing.assert_array_equal(table.gather(np.arange(ROWS)), expected)
    assert table.gather(np.zeros((0, 4), np.int64)).shape == (0, 4, WIDTH)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64, ">i8"])
def test_any_integer_type_and_layout_numbers_rows(table, kind):
    ids = np.arange(60, dtype=kind).reshape(6, 10).T[::2]
    np.testing.assert_array_equal(table.gather(ids), table.gather(ids.astype(np.int64)))


def test_gather_fills_the_buffer_it_is_given(table):
    ids = np.array([[4, 4], [ROWS - 1, 0]])
    room = np.full((3, 2, WIDTH), 7, table.value_dtype)
    assert table.gather(ids, out=room[:2]).base is room or np.shares_memory(table.gather(ids, room[:2]), room)
    np.testing.assert_array_equal(room[:2], rounded(draw(), table.dtype)[ids])
    assert (room[2] == 7).all()


def test_every_fp8_code_and_scale_is_decoded_exactly(tmp_path):
    codes = np.arange(256, dtype=np.uint8)
    codes[[0x7F, 0xFF]] = 0  # the two that are NaN
    codes = np.tile(codes.reshape(8, 32), (247, 1))
    scales = np.repeat(np.arange(247, dtype=np.uint8), 8)[:, None]  # up to 2^119: beyond, 448 of it are no float32
    with EngramTable.from_rows(tmp_path / "t", np.hstack([codes, scales]), "fp8") as table:
        found = table.gather(np.arange(table.rows))
        np.testing.assert_array_equal(table.gather_raw([[2]])[0, 0], np.hstack([codes[2], scales[2]]))
    value = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(found, (value * 2.0 ** (scales.astype(float) - 127)).astype(np.float32))


@pytest.mark.parametrize("width", [1, 31, 33, 256])
def test_fp8_rows_of_any_width_have_a_scale_per_32_values(tmp_path, width):
    values = draw(11, width)
    with EngramTable.from_rows(tmp_path / "t", values, "fp8") as table:
        assert table.width == width and table.row_bytes == width + -(-width // 32)
        np.testing.assert_array_equal(table.gather(np.arange(11)), rounded(values, "fp8"))
        with EngramTable.from_rows(tmp_path / "same", table.gather_raw(np.arange(11)), "fp8") as again:
            assert again.width == width
            np.testing.assert_array_equal(again.gather(np.arange(11)), table.gather(np.arange(11)))


def test_256_fp8_values_take_264_bytes(tmp_path):
    with EngramTable.create(tmp_path / "t", 3, 256, "fp8") as table:
        assert table.row_bytes == 264 and table.nbytes == 3 * 264


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_rows_follow_the_seed_and_are_finite_and_small(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(table_file, "CHUNK_BYTES", 1000)  # several chunks
    made = [EngramTable.create(tmp_path / str(i), 101, 64, dtype, seed=seed) for i, seed in enumerate((3, 3, 4))]
    first, same, other = (table.gather(np.arange(101)) for table in made)
    np.testing.assert_array_equal(first, same)
    assert (first != other).mean() > 0.9 and (first[:50] != first[51:]).mean() > 0.9
    assert np.isfinite(first).all() and 0 < np.abs(first).max() < 0.03 and 0.3 < (first < 0).mean() < 0.7
    assert made[0].verify() and made[0].content == "random rows, seed 3"
    for table in made:
        table.close()


def test_rows_come_in_pieces_that_need_not_match_the_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(table_file, "CHUNK_BYTES", 1000)
    values = draw(97)
    pieces = (values[first : first + 13] for first in range(0, 97, 13))
    with EngramTable.from_rows(tmp_path / "t", pieces, "bf16", content="trained") as table:
        np.testing.assert_array_equal(table.gather(np.arange(97)), rounded(values, "bf16"))
        assert table.verify() and table.content == "trained" and table.header.chunks > 10


# -- the file --------------------------------------------------------------------------------------------------------------


def test_a_table_opens_again_elsewhere_and_says_what_it_is(table):
    with EngramTable.open(str(table.path)) as again, pickle.loads(pickle.dumps(table)) as third:
        assert (again.rows, again.width, again.dtype) == (ROWS, WIDTH, table.dtype) == (third.rows, third.width, third.dtype)
        np.testing.assert_array_equal(again.gather([1, 2]), third.gather([1, 2]))
        assert again.verify() and "1,009 x 96" in repr(again) and "given rows" in repr(again)
    assert table.header.data_offset % PAGE == 0 and table.path.stat().st_size == table.header.file_bytes


def test_a_table_read_into_memory_or_without_advice_has_the_same_rows(table):
    with EngramTable.open(table.path, in_memory=True) as held, EngramTable.open(table.path, advice="none") as plain:
        assert held.in_memory and not plain.in_memory
        ids = np.arange(0, ROWS, 3)
        np.testing.assert_array_equal(held.gather(ids), table.gather(ids))
        np.testing.assert_array_equal(plain.gather(ids), table.gather(ids))
        assert held.verify()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mappings")
def test_two_processes_share_the_pages_of_one_table(table):
    code = f"""
import re, numpy as np, workbench as wb
table = wb.EngramTable.open({str(table.path)!r})
rows = table.gather(np.arange(table.rows))
print(re.search(r" (\\S+) \\S+ \\S+ \\S+ +{re.escape(str(table.path))}", open("/proc/self/maps").read())[1])
input()
print(rows.astype(float).sum(), table.gather(7).astype(float).sum())
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    )
    assert child.stdout.readline().strip() == "r--s"  # read-only and shared
    before = table.gather(np.arange(ROWS)).astype(float).sum()
    with table.path.open("r+b") as file:  # a byte changed in the file is seen by both: it is the same page
        file.seek(PAGE + 7 * table.row_bytes)
        file.write(table.gather_raw(9).tobytes())
    out, _ = child.communicate("\n", timeout=120)
    assert [float(x) for x in out.split()] == [before, table.gather(9).astype(float).sum()]
    np.testing.assert_array_equal(table.gather(7), table.gather(9))


def test_rows_are_addressed_across_64_gib_of_which_few_are_written(tmp_path):
    rows = 2**28
    table = EngramTable.create(tmp_path / "large.table", rows, 128, fill="zero")
    if table.path.stat().st_blocks * 512 > 2**30:
        pytest.skip("this file system keeps no holes")
    assert table.nbytes == 64 * 2**30 and table.verify()
    far = np.array([0, 1, 2**23 - 1, 2**23, 2**24 + 5, rows // 2, rows - 2, rows - 1])
    values = draw(len(far), 128).astype(np.float16)
    with table.path.open("r+b") as file:
        for row, value in zip(far, values, strict=True):
            file.seek(PAGE + int(row) * 256)
            file.write(value.tobytes())
    np.testing.assert_array_equal(table.gather(far[::-1]), values[::-1])
    assert not table.gather([5, 2**23 + 1, rows // 2 + 1, rows - 3]).any()
    with pytest.raises(InputError, match="must lie in 0..268435455"):
        table.gather(rows)
    with pytest.raises(WorkbenchError, match=r"rows differ.*6 of 16384 parts, within rows 0\.\.268,435,455"):
        table.verify()
    table.close()


def test_verify_names_the_damaged_rows_and_open_does_not_read_them(table):
    with table.path.open("r+b") as file:
        file.seek(PAGE + 500 * table.row_bytes + 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with EngramTable.open(table.path) as again, pytest.raises(WorkbenchError, match="rows differ from what was written"):
        again.verify()


def test_verify_notices_damaged_checksums_and_a_file_put_in_its_place(table):
    with table.path.open("r+b") as file:
        file.seek(table.header.sums_offset)
        file.write(b"\1\2\3\4")
    with pytest.raises(WorkbenchError, match="checksums themselves are damaged"):
        table.verify()
    EngramTable.create(table.path, 3, 4).close()
    with pytest.raises(WorkbenchError, match="another file now"):
        table.verify()
    assert table.gather(ROWS - 1).shape == (WIDTH,)  # the old one is whole for who has it open


def test_zero_rows_take_no_room_and_are_still_held_against_their_checksum(tmp_path):
    for dtype in DTYPES:
        with EngramTable.create(tmp_path / dtype, 2**20, 64, dtype, fill="zero") as table:
            assert table.verify() and not table.gather([0, 5, 2**20 - 1]).any() and table.content == "zeros"
            with table.path.open("r+b") as file:
                file.seek(PAGE + table.nbytes - 1)
                file.write(b"\1")
            with pytest.raises(WorkbenchError, match="rows differ"):
                table.verify()


# -- files that are no table -----------------------------------------------------------------------------------------------


def changed(path: Path, offset: int, data: bytes, *, resealed: bool) -> None:
    """Write ``data`` over the header, with a checksum that fits again if ``resealed``."""
    page = bytearray(path.read_bytes()[:PAGE])
    page[offset : offset + len(data)] = data
    if resealed:
        page[-4:] = struct.pack("<I", zlib.crc32(page[:-4]))
    with path.open("r+b") as file:
        file.write(page)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be opened"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("a poem"), "is not an Engram table"),
        (lambda path: path.write_bytes(b"\x80\x04K\x01." * 2000), "is not an Engram table"),
        (lambda path: os.truncate(path, 100), "cut short"),
        (lambda path: os.truncate(path, PAGE), "cut short: a table of 50 rows has"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "cut short"),
        (lambda path: os.truncate(path, path.stat().st_size + 1), "goes on after its end"),
        (lambda path: changed(path, 0, b"WBENGRAX", resealed=True), "is not an Engram table"),
        (lambda path: changed(path, 8, struct.pack("<I", 2), resealed=True), "version 2, this workbench reads version 1"),
        (lambda path: changed(path, 20, struct.pack("<Q", 60), resealed=False), "damaged header"),
        (lambda path: changed(path, 3000, b"\1", resealed=False), "damaged header"),
        (lambda path: changed(path, 20, struct.pack("<Q", 60), resealed=True), "contradicts itself"),
        (lambda path: changed(path, 20, struct.pack("<Q", 0), resealed=True), "rows must be a positive"),
        (lambda path: changed(path, 28, struct.pack("<I", 0), resealed=True), "width must be a positive"),
        (lambda path: changed(path, 20, struct.pack("<Q", 2**63), resealed=True), "more than a table can hold"),
        (lambda path: changed(path, 12, b"fp4\0\0\0\0\0", resealed=True), "dtype is one of fp16, bf16, fp8, got 'fp4'"),
    ],
)
def test_what_is_no_whole_table_is_refused_with_its_path_and_what_to_do(small, damage, message):
    damage(small.path)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        EngramTable.open(small.path)
    assert "small.table" in str(caught.value) and ("make it anew" in str(caught.value) or "give " in str(caught.value))


def test_folders_and_unreadable_advice_are_refused(small, tmp_path):
    with pytest.raises(InputError, match="cannot be opened"):
        EngramTable.open(tmp_path)
    with pytest.raises(InputError, match="advice must be"):
        EngramTable.open(small.path, advice="sequential")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets nobody cut an open mapped file")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_cut_short_while_open_is_one_clear_error_and_no_crash(tmp_path, dtype):
    """Reading a mapped page beyond a file's end ends the process, so the rows are asked for in one of their own."""
    path = tmp_path / "t"
    EngramTable.create(path, 5000, WIDTH, dtype).close()
    code = f"""
import os
from workbench.errors import WorkbenchError
from workbench.memory.hot_rows import HotRows
from workbench.memory.table import EngramTable

table, held = EngramTable.open({str(path)!r}), EngramTable.open({str(path)!r}, in_memory=True)
hot, last = HotRows(table, 64), table.rows - 1
kept = table.gather([last])
for left in (table.header.file_bytes - 1, {PAGE}, 100, 0):
    os.truncate(table.path, left)
    for read in (table.gather, table.gather_raw, hot.gather, lambda ids: table.all_values()):
        try:
            read([last])
        except WorkbenchError as error:
            assert "has been cut short since it was opened" in str(error) and "make it anew" in str(error), error
        else:
            raise SystemExit("nothing was said")
assert (held.gather([last]) == kept).all()  # what is in memory stays
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_a_file_that_has_grown_while_open_says_so(small):
    with small.path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(WorkbenchError, match="has grown since it was opened"):
        small.gather([1])


def test_a_closed_table_says_so(small):
    small.close()
    small.close()
    for call in (lambda: small.gather([1]), lambda: small.gather_raw([1]), small.verify, small.all_values):
        with pytest.raises(WorkbenchError, match="is closed; open it again"):
            call()


# -- bad arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 50], r"must lie in 0..49 of small.table, got 0..50"),
        ([-1, 3], r"got -1..3"),
        (np.array([2**64 - 1], np.uint64), r"got 18446744073709551615"),
        (np.array([-1], ">i8"), r"got -1..-1"),
        ([0.0, 1.0], "must be integers, got float64"),
        ([True], "must be integers, got bool"),
        (["1"], "must be integers"),
        (None, "must be integers"),
    ],
)
def test_bad_row_numbers_are_refused_before_anything_is_written(small, ids, message):
    out = np.full((2, 8), 7, np.float16)
    for call in (small.gather, small.gather_raw):
        with pytest.raises(InputError, match=message):
            call(ids, out)
    assert (out == 7).all()


def test_buffers_that_do_not_fit_are_refused(small):
    read_only = np.zeros((2, 8), np.float16)
    read_only.flags.writeable = False
    for out, message in (
        (np.zeros((2, 9), np.float16), r"must be a numpy array float16 \[2, 8\], got float16 \[2, 9\]"),
        (np.zeros((2, 8), np.float32), "got float32"),
        ([[0.0] * 8] * 2, "got list"),
        (np.zeros((8, 2), np.float16).T, "contiguous and writable"),
        (read_only, "contiguous and writable"),
    ):
        with pytest.raises(InputError, match=message):
            small.gather([1, 2], out=out)
    with pytest.raises(InputError, match=r"must be a numpy array uint8 \[1, 16\]"):
        small.gather_raw([1], out=np.zeros((1, 8), np.uint8))


# -- bounded memory, threads, imports --------------------------------------------------------------------------------------


def test_a_gather_of_quantised_rows_needs_no_memory_that_grows_with_it(tmp_path):
    import tracemalloc

    with EngramTable.create(tmp_path / "t", 5000, 256, "fp8") as table:
        ids = np.arange(10**5) % 5000
        out = np.empty((len(ids), 256), np.float32)
        tracemalloc.start()
        table.gather(ids, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 5 * 2**20 < out.nbytes / 10


def close_while_gathering(table: EngramTable, ids: np.ndarray, expected: np.ndarray, times: int) -> list[object]:
    """Close the table while a thread for each row of ``ids`` gathers from it; what was neither right nor told as a close."""
    wrong: list[object] = []

    def work(mine: np.ndarray) -> None:
        for _ in range(times):
            try:
                if not np.array_equal(table.gather(mine), expected[mine]):
                    wrong.append("rows differ")
            except WorkbenchError as error:
                if "is closed" not in str(error):
                    wrong.append(error)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in ids]
    for thread in threads:
        thread.start()
    table.close()
    for thread in threads:
        thread.join(60)
    return wrong + [thread for thread in threads if thread.is_alive()]


def test_several_threads_gather_at_once_and_a_close_meanwhile_harms_none(table):
    ids = np.random.default_rng(0).integers(0, ROWS, (8, 4000))
    assert close_while_gathering(table, ids, rounded(draw(), table.dtype), 20) == []


def test_a_close_at_any_moment_is_told_as_one(tmp_path):
    with EngramTable.create(tmp_path / "t", 1009, 96, dtype="fp16") as table:
        expected = np.array(table.all_values())
    ids = np.tile(np.arange(50), (8, 1))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns inside of a call: without care about one round in ten goes wrong
    try:
        for _ in range(100):
            assert close_while_gathering(EngramTable.open(tmp_path / "t"), ids, expected, 50) == []
    finally:
        sys.setswitchinterval(interval)


def test_progress_is_told_drawn_on_a_terminal_and_silent_in_a_pipe(tmp_path, monkeypatch, capsys):
    told: list[float] = []
    EngramTable.create(tmp_path / "t", 2**16, 64, progress=told.append).close()
    assert told == sorted(told) and told[-1] == 1 and len(told) == 2
    assert capsys.readouterr() == ("", "")
    EngramTable.create(tmp_path / "t", 2**16, 64).close()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with EngramTable.create(tmp_path / "t", 2**16, 64) as table:
        table.verify()
    drawn = capsys.readouterr().err
    assert "100% t" in drawn and "verifying t" in drawn and drawn.endswith("\r\x1b[K")


def test_pages_counts_what_the_rows_lie_on(tmp_path):
    for width in (4, 80, 3000):
        with EngramTable.create(tmp_path / "t", 3000, width, fill="zero") as table:
            ids = np.unique(np.random.default_rng(0).integers(0, 3000, 400))
            start = PAGE + ids * table.row_bytes
            spans = [range(a // PAGE, (a + table.row_bytes - 1) // PAGE + 1) for a in start.tolist()]
            assert table.pages(ids) == len({page for span in spans for page in span})
            assert table.pages(ids[:0]) == 0


def test_dropped_pages_are_read_again_with_the_same_rows(table):
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux drops pages on request")
    before = table.gather(np.arange(ROWS))
    table.drop_pages()
    np.testing.assert_array_equal(table.gather(np.arange(ROWS)), before)
    with EngramTable.open(table.path, in_memory=True) as held, pytest.raises(WorkbenchError, match="cannot be dropped"):
        held.drop_pages()


def test_a_table_needs_numpy_only():
    code = """
import sys, tempfile, numpy as np, workbench as wb
for dtype in ("fp16", "bf16", "fp8"):
    with tempfile.TemporaryDirectory() as folder, wb.EngramTable.create(folder + "/t", 9, 64, dtype) as table:
        table.verify()
        wb.HotRows(table, 4).gather([1, 2, 1])
print("torch" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "False"
    assert wb.EngramTable is EngramTable


def test_a_header_says_what_it_was_given():
    header = Header.of("fp8", 12345, 256, "random rows, seed 7", 99)
    assert len(header.pack()) == PAGE and Header.read(header.pack(), Path("t"), header.file_bytes) == header
    assert header.row_bytes == row_formats.row_bytes("fp8", 256) == 264 and header.chunk_rows == 4 * 2**20 // 264
