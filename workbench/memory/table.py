"""An Engram table on the host: rows in a memory-mapped file, gathered by number into buffers that are there already.

The table may be far larger than memory. It is opened read-only and shared by all processes that map it; the system is told
that rows are read at random, because what it reads ahead around a row is never used. (reference/engram-and-overlap.md,
sections 4.3 and 5; the file: memory/table_file.py)
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import numpy as np

from workbench.errors import InputError, WorkbenchError
from workbench.memory import row_formats
from workbench.memory.table_file import (
    CHUNK_BYTES,
    MAKE_ANEW,
    PAGE,
    Header,
    TableWriter,
    check_shape,
    data_ranges,
    read_into,
    writing,
    zero_sum,
)
from workbench.progress import Report, reporting
from workbench.runtime import available_bytes, size_text

FILLS = ("random", "zero")
DECODED_ROWS = 1024  # gathered and decoded at a time, so that what lies between stays in a core's cache


class EngramTable:
    """``rows`` rows of ``width`` values; made by ``create``, ``from_rows`` and ``open``, closed by ``close`` or as a context.

    Any number of threads may gather at once. Pickling or copying one opens the same file again.
    """

    def __init__(self, path: Path, header: Header, file: FileIO, in_memory: bool, advice: str) -> None:
        self.path, self.header, self.in_memory = path, header, in_memory
        self._advice = advice
        self._file: FileIO | None = file
        self._map: mmap.mmap | None = None
        size = header.rows * header.row_bytes
        buffer: Any
        if in_memory:
            buffer, start = np.empty(size, np.uint8), 0
            read_into(file, memoryview(buffer), PAGE)
        else:
            buffer = self._map = mmap.mmap(
                file.fileno(), header.file_bytes, access=mmap.ACCESS_READ
            )  # MAP_SHARED where that exists
            start = header.data_offset
            if advice == "random" and hasattr(mmap, "MADV_RANDOM"):
                with suppress(OSError):  # a file system may know no advice; rows are the same
                    self._map.madvise(mmap.MADV_RANDOM)
        self._raw: np.ndarray | None = np.frombuffer(buffer, np.uint8, size, start).reshape(header.rows, header.row_bytes)

    # -- making and opening ----------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | Path,
        rows: int,
        width: int,
        dtype: str = "fp16",
        fill: str = "random",
        seed: int = 0,
        progress: Report | None = None,
    ) -> EngramTable:
        """Write a new table and open it. ``fill`` "random" draws small values from ``seed``; "zero" takes no room on disk where
        the file system keeps holes. ``progress`` is told the share done; without it a terminal shows a bar.

        An older table at ``path`` is replaced once the new one is whole; on any error or interrupt nothing of the new one is
        left. Raises InputError for sizes, dtype, fill, seed or a path that cannot be, or too little room on the disk;
        WorkbenchError if the disk fills up or cannot be written.
        """
        path = Path(path)
        rows, width = _whole(rows), _whole(width)
        check_shape(rows, width, dtype)
        if fill not in FILLS:
            raise InputError(f"fill must be one of {', '.join(FILLS)}, got {fill!r}")
        if not isinstance(_whole(seed), int) or isinstance(seed, bool) or seed < 0:
            raise InputError(f"seed must be a whole number, 0 or more, got {seed!r}")
        content = f"random rows, seed {seed}" if fill == "random" else "zeros"
        needed = rows * row_formats.row_bytes(dtype, width) if fill == "random" else 0
        with reporting(progress, path.name) as say, writing(path, dtype, width, content, needed) as writer:
            if fill == "zero":
                writer.append_zeros(rows)
            else:
                for chunk, first in enumerate(range(0, rows, writer.chunk_rows)):
                    draw = np.random.Generator(np.random.SFC64([seed, chunk]))
                    writer.append(row_formats.random_rows(draw, min(writer.chunk_rows, rows - first), width, dtype))
                    say(writer.rows / rows)
        return cls.open(path)

    @classmethod
    def from_rows(
        cls,
        path: str | Path,
        values: Any,
        dtype: str = "fp16",
        *,
        content: str = "given rows",
        progress: Report | None = None,
    ) -> EngramTable:
        """Write given rows as a table and open it. ``values`` is an array [rows, width] or any iterable of such pieces.

        Floating-point values are rounded to ``dtype``; uint8 arrays [n, row bytes] are taken as stored rows (fp8: codes, then
        scales). ``content`` says in up to 64 bytes what the rows are. Files and errors as in ``create``; InputError also
        for values that are not finite in ``dtype`` and for pieces that do not fit together.
        """
        path, whole = Path(path), hasattr(values, "shape")
        pieces = iter(_pieces(values) if whole else values)
        first = next(pieces, None)
        if first is None or np.ndim(first) != 2 or not np.size(first):
            got = "none" if first is None else list(np.shape(first))
            raise InputError(f"a table needs rows [n, width], got {got}")
        columns, stored = np.shape(first)[1], np.asarray(first).dtype == np.uint8
        width = row_formats.width_of(dtype, columns) if stored else columns
        check_shape(1, width, dtype)
        rows = len(values) if whole else 0
        needed = rows * row_formats.row_bytes(dtype, width)
        with reporting(progress, path.name) as say, writing(path, dtype, width, content, needed) as writer:
            piece: Any = first
            while piece is not None:
                _append(writer, np.asarray(piece))
                if rows:
                    say(writer.rows / rows)
                piece = next(pieces, None)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, *, in_memory: bool = False, advice: Literal["random", "none"] = "random") -> EngramTable:
        """Open a table read-only, after checking its header and size. ``in_memory`` reads all of it into this process's memory,
        so that no row is ever waited for; ``advice`` "none" leaves the system to read ahead, for comparison.

        A file that has been cut short meanwhile is an error at the next gather. A disk that fails under a mapped page is not:
        the system ends the process (SIGBUS). Where that matters, read into memory, where it is an error, or check beforehand
        with ``verify``, which reads every row.

        Raises InputError, with what to do, for a file that is missing, empty, cut short, too long, damaged, of another version,
        or no table at all, and for a table that does not fit in memory.
        """
        path = Path(path)
        if advice not in ("random", "none"):
            raise InputError(f"advice must be 'random' or 'none', got {advice!r}")
        try:
            file = FileIO(path)
            try:
                header = Header.read(file.read(PAGE) or b"", path, os.fstat(file.fileno()).st_size)
                if in_memory and (size := header.rows * header.row_bytes) > available_bytes():
                    free = size_text(available_bytes())
                    raise InputError(f"{path} holds {size_text(size)} of rows but {free} of memory are free; open it mapped")
                return cls(path, header, file, in_memory, advice)
            except BaseException:
                file.close()
                raise
        except OSError as error:  # missing, a folder, not to be read
            raise InputError(f"{path} cannot be opened ({error.strerror}); give the path of an Engram table") from None

    def close(self) -> None:
        """Let go of the file. A gather under way in another thread still ends well; a later one is refused."""
        file, mapped = self._file, self._map
        self._file = self._map = self._raw = None
        if mapped is not None:
            with suppress(BufferError):  # a gather still reads it; the mapping goes when that is done
                mapped.close()
        if file is not None:
            file.close()

    def __enter__(self) -> EngramTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (str(self.path.resolve()), self.in_memory, self._advice)

    def __repr__(self) -> str:
        held = "in memory" if self.in_memory else "mapped"
        return f"EngramTable({str(self.path)!r}: {self.rows:,} x {self.width} {self.dtype}, {self.content}, {held})"

    # -- what it is ------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        return self.header.rows

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.header.width

    @property
    def dtype(self) -> str:
        """What is stored: "fp16", "bf16" or "fp8"."""
        return self.header.dtype

    @property
    def value_dtype(self) -> np.dtype:
        """What ``gather`` returns: float16 for fp16, else float32."""
        return row_formats.value_dtype(self.header.dtype)

    @property
    def row_bytes(self) -> int:
        return self.header.row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as stored."""
        return self.header.rows * self.header.row_bytes

    @property
    def content(self) -> str:
        """What the rows are, in words: "random rows, seed 0"."""
        return self.header.content

    # -- reading ---------------------------------------------------------------------------------------------------------

    def gather(self, row_ids: Any, out: np.ndarray | None = None) -> np.ndarray:
        """Row numbers, integers of any shape -> values ``row_ids.shape + (width,)``: float16 for fp16, else float32, exact.

        ``out``, contiguous and of that shape and type, is filled and returned. Other threads run meanwhile.
        Raises InputError for numbers that are not integers or outside 0..rows-1, or an ``out`` that does not fit;
        WorkbenchError if the table was closed or its file has been cut short.
        """
        raw = self._readable()
        ids, shape = self.check_ids(row_ids)
        out = self.room(out, shape)
        flat = out.reshape(len(ids), self.width)
        if self.dtype == "fp16":
            # "clip" because numpy's default mode writes through a copy; the numbers were checked above
            np.take(raw.view(np.float16), ids, axis=0, out=flat, mode="clip")
            return out
        stored = np.empty((min(DECODED_ROWS, len(ids)), self.row_bytes), np.uint8)
        for first in range(0, len(ids), DECODED_ROWS):
            part = ids[first : first + DECODED_ROWS]
            np.take(raw, part, axis=0, out=stored[: len(part)], mode="clip")
            row_formats.decode(stored[: len(part)], self.dtype, flat[first : first + len(part)])
        return out

    def gather_raw(self, row_ids: Any, out: np.ndarray | None = None) -> np.ndarray:
        """The same rows as they are stored: uint8 ``row_ids.shape + (row_bytes,)``."""
        raw = self._readable()
        ids, shape = self.check_ids(row_ids)
        out = _room(out, (*shape, self.row_bytes), np.dtype(np.uint8))
        np.take(raw, ids, axis=0, out=out.reshape(len(ids), self.row_bytes), mode="clip")
        return out

    def all_values(self) -> np.ndarray:
        """Every row's values [rows, width]: of fp16 the mapped file itself, not to be written to; else decoded into memory.

        Raises InputError if decoded they do not fit in memory.
        """
        raw = self._readable()
        if self.dtype != "fp16" and (size := self.rows * self.width * self.value_dtype.itemsize) > available_bytes():
            needs = f"{size_text(size)} but {size_text(available_bytes())} of memory are free"
            raise InputError(f"{self.path.name} decoded takes {needs}; gather rows of it")
        return raw.view(np.float16) if self.dtype == "fp16" else self.gather(np.arange(self.rows))

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """What ``gather_raw`` gave for row numbers [n], to values [n, width]; of fp16 it is a view."""
        return row_formats.decode(np.ascontiguousarray(stored), self.dtype)

    def check_ids(self, row_ids: Any) -> tuple[np.ndarray, tuple[int, ...]]:
        """Row numbers [n] ready to index with, and their shape. Raises InputError as ``gather`` does."""
        given = np.asarray(row_ids)
        if given.dtype.kind not in "iu":
            raise InputError(f"row numbers must be integers, got {given.dtype} {list(given.shape)}")
        if given.size:
            unsigned = given.view(given.dtype.str.replace("i", "u"))  # a negative number becomes larger than any row
            if int(unsigned.max()) >= self.rows:
                low, high = int(given.min()), int(given.max())
                raise InputError(f"row numbers must lie in 0..{self.rows - 1} of {self.path.name}, got {low}..{high}")
        return np.ascontiguousarray(given, np.intp).reshape(-1), given.shape

    def room(self, out: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
        """``out`` if it takes the values of row numbers of that shape, or an array that does. InputError as ``gather``."""
        return _room(out, (*shape, self.width), self.value_dtype)

    def pages(self, ids: np.ndarray) -> int:
        """How many pages of the file hold these rows (numbers ascending, none twice): what must be read if none is cached."""
        if not len(ids):
            return 0
        start = self.header.data_offset + ids * self.row_bytes
        first, last = start // PAGE, (start + self.row_bytes - 1) // PAGE
        return int((last - first + 1).sum() - np.count_nonzero(first[1:] == last[:-1]))

    def drop_pages(self) -> None:
        """Let the system forget the rows it holds in memory, so that the next gather reads them from the disk.

        Other processes that map the file keep theirs. Raises WorkbenchError where the system offers no way.
        """
        if self.in_memory or self._map is None or not hasattr(os, "posix_fadvise") or not hasattr(mmap, "MADV_DONTNEED"):
            raise WorkbenchError(f"the pages of {self.path.name} cannot be dropped here; only a mapped table on Linux has them")
        file = self._opened()
        self._map.madvise(mmap.MADV_DONTNEED)  # mapped pages would stay
        os.fsync(file.fileno())  # and so would those not on disk yet
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def verify(self, progress: Report | None = None) -> Literal[True]:
        """Read every row from the file and hold it against its checksum. Raises WorkbenchError naming the damaged rows.

        Parts that were never written, in a table of zeros, are told by the file system and not read.
        """
        header, row_bytes = self.header, self.row_bytes
        with FileIO(self.path) as file, reporting(progress, f"verifying {self.path.name}") as say:
            if not os.path.samestat(os.fstat(file.fileno()), os.fstat(self._opened().fileno())):
                raise WorkbenchError(f"{self.path} is another file now than when it was opened; open it again")
            stored = bytearray(4 * header.chunks)
            read_into(file, memoryview(stored), header.sums_offset)
            if zlib.crc32(stored) != header.sums_crc:
                raise WorkbenchError(f"{self.path}: the checksums themselves are damaged; {MAKE_ANEW}")
            expected = np.frombuffer(stored, "<u4")
            chunk_bytes = header.chunk_rows * row_bytes
            written = np.zeros(header.chunks, bool)
            for start, end in data_ranges(file.fileno(), PAGE, PAGE + self.nbytes):
                written[(start - PAGE) // chunk_bytes : (end - 1 - PAGE) // chunk_bytes + 1] = True
            buffer = memoryview(bytearray(min(chunk_bytes, self.nbytes)))
            zeros = zero_sum(chunk_bytes)
            damaged = []
            for chunk in range(header.chunks):
                nbytes = min(chunk_bytes, self.nbytes - chunk * chunk_bytes)
                if written[chunk]:
                    read_into(file, buffer[:nbytes], PAGE + chunk * chunk_bytes)
                    found = zlib.crc32(buffer[:nbytes])
                    say((chunk + 1) / header.chunks)
                else:
                    found = zeros if nbytes == chunk_bytes else zero_sum(nbytes)
                if found != expected[chunk]:
                    damaged.append(chunk)
        if damaged:
            low, high = damaged[0] * header.chunk_rows, min(self.rows, (damaged[-1] + 1) * header.chunk_rows) - 1
            places = f"{len(damaged)} of {header.chunks} parts, within rows {low:,}..{high:,}"
            raise WorkbenchError(f"{self.path}: rows differ from what was written ({places}); {MAKE_ANEW}")
        return True

    def _opened(self) -> FileIO:
        if self._file is None:
            raise self._closed()
        return self._file

    def _closed(self) -> WorkbenchError:
        return WorkbenchError(f"the table {self.path} is closed; open it again with EngramTable.open")

    def _readable(self) -> np.ndarray:
        file, raw = self._opened(), self._raw
        if raw is None:
            raise self._closed()
        # Reading a mapped page beyond the file's end would end this process; asking costs about a microsecond.
        try:
            size = self.header.file_bytes if self.in_memory else os.fstat(file.fileno()).st_size
        except (OSError, ValueError):  # another thread closed it since the first line
            raise self._closed() from None
        if size != self.header.file_bytes:
            if self._file is None:  # closed since, and its number may already be another file's
                raise self._closed()
            what = "been cut short" if size < self.header.file_bytes else "grown"
            sizes = f"{size:,} bytes, not {self.header.file_bytes:,}"
            raise WorkbenchError(f"{self.path} has {what} since it was opened ({sizes}); {MAKE_ANEW}")
        return raw


def _open_again(path: str, in_memory: bool, advice: Literal["random", "none"]) -> EngramTable:
    return EngramTable.open(path, in_memory=in_memory, advice=advice)


def _whole(value: Any) -> Any:
    """numpy's whole numbers as Python's; anything else as it is."""
    return int(value) if isinstance(value, np.integer) else value


def _pieces(values: Any) -> Iterator[Any]:
    """Slices of an array [rows, width], about CHUNK_BYTES each."""
    if np.ndim(values) != 2 or not np.size(values):
        raise InputError(f"a table needs rows [n, width], got {list(np.shape(values))}")
    step = max(1, CHUNK_BYTES // (4 * values.shape[1]))
    return (values[first : first + step] for first in range(0, len(values), step))


def _append(writer: TableWriter, piece: np.ndarray) -> None:
    if piece.dtype == np.uint8:
        writer.append(row_formats.check_stored(piece, writer.dtype, writer.width))
        return
    if piece.ndim != 2 or piece.shape[1] != writer.width:
        raise InputError(f"every piece of a table must be [n, {writer.width}], got {list(piece.shape)} after row {writer.rows}")
    try:
        writer.append(row_formats.encode(piece, writer.dtype))
    except InputError as error:
        raise InputError(f"rows {writer.rows} and on: {error}") from None


def _room(out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray) or out.dtype != dtype or out.shape != shape:
        got = f"{out.dtype} {list(out.shape)}" if isinstance(out, np.ndarray) else type(out).__name__
        raise InputError(f"out must be a numpy array {dtype} {list(shape)}, got {got}")
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise InputError("out must be contiguous and writable; give a fresh array or a slice along its first axis")
    return out
