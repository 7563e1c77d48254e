"""The file of a host table: one page of header, the rows, and a checksum of every 4 MiB of them.

    0                 header: magic, version, shape, dtype, sizes, what the rows are; CRC-32 of the page in its last 4 bytes
    4096              rows, ``row_bytes`` each, without gaps
    ``sums_offset``   one CRC-32 per ``chunk_rows`` rows; their own CRC-32 stands in the header

Little-endian throughout. A file is written under another name, its header last, and renamed once it is on disk: what bears a
table's name is whole.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from workbench.errors import InputError, WorkbenchError
from workbench.memory import row_formats
from workbench.runtime import size_text

MAGIC = b"WBENGRAM"
VERSION = 1
PAGE = 4096
CHUNK_BYTES = 4 * 2**20
LARGEST_BYTES, LARGEST_WIDTH = 2**62, 2**31
_FIELDS = struct.Struct("<8s QII QQQQ I 64s")
_VERSION = struct.Struct("<8sI")  # what every version begins with
_CRC = struct.Struct("<I")
NO_ROOM = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}
MAKE_ANEW = "make it anew with EngramTable.create or copy it again"


@dataclass(frozen=True, slots=True)
class Header:
    """What the first page says, in this order; sizes in bytes."""

    dtype: str
    rows: int
    width: int
    row_bytes: int
    chunk_rows: int  # rows under one checksum
    data_offset: int
    sums_offset: int
    file_bytes: int
    sums_crc: int
    content: str  # in words: "random rows, seed 0"

    @classmethod
    def of(cls, dtype: str, rows: int, width: int, content: str, sums_crc: int) -> Header:
        row_bytes = row_formats.row_bytes(dtype, width)
        chunk_rows = max(1, CHUNK_BYTES // row_bytes)
        sums_offset = PAGE + 4 * math.ceil(rows * row_bytes / 4)
        file_bytes = sums_offset + 4 * math.ceil(rows / chunk_rows)
        return cls(dtype, rows, width, row_bytes, chunk_rows, PAGE, sums_offset, file_bytes, sums_crc, content)

    @property
    def chunks(self) -> int:
        return math.ceil(self.rows / self.chunk_rows)

    def pack(self) -> bytes:
        values = [value.encode() if isinstance(value, str) else value for value in astuple(self)]
        page = bytearray(PAGE)
        _VERSION.pack_into(page, 0, MAGIC, VERSION)
        _FIELDS.pack_into(page, _VERSION.size, *values)
        _CRC.pack_into(page, PAGE - _CRC.size, zlib.crc32(page[: -_CRC.size]))
        return bytes(page)

    @classmethod
    def read(cls, page: bytes, path: Path, file_bytes: int) -> Header:
        """Check a file's first page and its size. Raises InputError saying what is wrong with it and what to do."""
        if not page:
            raise InputError(f"{path} is empty; {MAKE_ANEW}")
        if page[: len(MAGIC)] != MAGIC:
            raise InputError(f"{path} is not an Engram table (it does not begin with {MAGIC.decode()}); give a table's path")
        if len(page) < PAGE:
            raise InputError(f"{path} is cut short: {len(page)} bytes do not hold a table's header; {MAKE_ANEW}")
        version = _VERSION.unpack_from(page)[1]
        if version != VERSION:
            raise InputError(
                f"{path} is an Engram table of version {version}, this workbench reads version {VERSION}; {MAKE_ANEW}"
            )
        if _CRC.unpack_from(page, PAGE - _CRC.size)[0] != zlib.crc32(page[: -_CRC.size]):
            raise InputError(f"{path} has a damaged header (its checksum does not fit); {MAKE_ANEW}")
        values = list(_FIELDS.unpack_from(page, _VERSION.size))
        dtype, content = (values[i].rstrip(b"\0").decode(errors="replace") for i in (0, -1))
        found = cls(*[dtype, *values[1:-1], content])
        try:
            check_shape(found.rows, found.width, dtype)
            expected = cls.of(dtype, found.rows, found.width, content, found.sums_crc)
        except InputError as error:
            raise InputError(f"{path} cannot be read: {error}; {MAKE_ANEW}") from None
        if found != expected:
            raise InputError(f"{path} has a header that contradicts itself; {MAKE_ANEW}")
        if file_bytes != found.file_bytes:
            what = "is cut short" if file_bytes < found.file_bytes else "goes on after its end"
            sizes = f"a table of {found.rows:,} rows has {found.file_bytes:,} bytes, not {file_bytes:,}"
            raise InputError(f"{path} {what}: {sizes}; {MAKE_ANEW}")
        return found


def check_shape(rows: int, width: int, dtype: str) -> None:
    """Raises InputError for a table that cannot be."""
    for name, value in (("rows", rows), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a positive whole number, got {value!r}")
    if width > LARGEST_WIDTH or rows * row_formats.row_bytes(dtype, width) > LARGEST_BYTES:
        raise InputError(f"{rows:,} rows of {width:,} values are more than a table can hold")


class TableWriter:
    """Appends stored rows to a table that nobody can see yet; ``writing`` makes one and ends it."""

    def __init__(self, fd: int, path: Path, dtype: str, width: int) -> None:
        self.fd, self.path, self.dtype, self.width = fd, path, dtype, width
        self.rows = 0
        shape = Header.of(dtype, 0, width, "", 0)
        self.row_bytes, self.chunk_rows = shape.row_bytes, shape.chunk_rows
        self._sums: list[int] = []
        os.lseek(fd, PAGE, os.SEEK_SET)

    def append(self, raw: np.ndarray) -> None:
        """Stored rows [n, row bytes]."""
        first = 0
        while first < len(raw):
            filled = self.rows % self.chunk_rows
            part = raw[first : first + self.chunk_rows - filled]
            data = np.ascontiguousarray(part).data.cast("B")
            if not filled:
                self._sums.append(0)
            self._sums[-1] = zlib.crc32(data, self._sums[-1])
            self._write(data)
            self.rows, first = self.rows + len(part), first + len(part)

    def append_zeros(self, rows: int) -> None:
        """That many rows of zeros into an empty table; where the file system can, they take no room on disk."""
        assert not self.rows
        whole, rest = divmod(rows, self.chunk_rows)
        self._sums = whole * [zero_sum(self.chunk_rows * self.row_bytes)]
        if rest:
            self._sums.append(zero_sum(rest * self.row_bytes))
        with explained(self.path):
            os.ftruncate(self.fd, PAGE + rows * self.row_bytes)
        self.rows = rows

    def finish(self, content: str) -> Header:
        """Checksums, then the header, and all of it on disk."""
        sums = np.asarray(self._sums, "<u4").tobytes()
        header = Header.of(self.dtype, self.rows, self.width, content, zlib.crc32(sums))
        with explained(self.path):
            os.ftruncate(self.fd, header.sums_offset)
            os.lseek(self.fd, header.sums_offset, os.SEEK_SET)
            self._write(memoryview(sums))
            os.fsync(self.fd)
            os.lseek(self.fd, 0, os.SEEK_SET)
            self._write(memoryview(header.pack()))
            os.fsync(self.fd)
        return header

    def _write(self, data: memoryview) -> None:
        with explained(self.path):
            while data:
                data = data[os.write(self.fd, data) :]


@contextmanager
def writing(path: Path, dtype: str, width: int, content: str, needed_bytes: int = 0) -> Iterator[TableWriter]:
    """A writer whose rows become the table ``path`` when the block ends, and nothing at all if it ends with an error.

    An older table of that name is replaced at the end; it stays whole for those who have it open. Raises InputError for a place
    that cannot take a table: no folder, a folder, a file that is no table, less free room than ``needed_bytes``;
    WorkbenchError if the folder cannot be written in or the disk fills up.
    """
    folder = path.parent
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is not a folder; make it first or give the table another path")
    # unlike Path.exists, these raise nothing in a folder that may not be entered; os.open below says it
    if os.path.isdir(path) or (os.path.exists(path) and not _begins_as_table(path)):
        raise InputError(f"{path} exists and is not an Engram table; it was left alone, give the table another path")
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        needs = f"{path} needs {size_text(needed_bytes)} but {size_text(free)} are free in {folder}"
        raise InputError(f"{needs}; free some room or choose another folder")
    partial = folder / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    with explained(path):
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            writer = TableWriter(fd, path, dtype, width)
            yield writer
            writer.finish(content)
        finally:
            os.close(fd)
        with explained(path):
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
    _flush_folder(folder)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the system says while ``path`` is written, as a WorkbenchError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in NO_ROOM:
            what, advice = "has no room left on its disk", "free some room or choose another folder"
        else:
            what, advice = "cannot be written", "choose a folder you may write in"
        raise WorkbenchError(f"{path} {what} ({reason}); nothing was kept of it; {advice}") from error


def zero_sum(nbytes: int) -> int:
    """The checksum of that many zero bytes."""
    return zlib.crc32(bytes(nbytes))


def read_into(file: FileIO, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer`` from a file's bytes at ``offset``. Raises WorkbenchError if the disk cannot, or the file ends."""
    file.seek(offset)
    while buffer:
        try:
            n = file.readinto(buffer[:CHUNK_BYTES]) or 0
        except OSError as error:
            raise WorkbenchError(
                f"{file.name} cannot be read at byte {file.tell()} ({error.strerror}); check the disk"
            ) from error
        if not n:
            raise WorkbenchError(f"{file.name} ends at byte {file.tell()}, before its rows do; {MAKE_ANEW}")
        buffer = buffer[n:]


def data_ranges(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of start..end that may hold anything but zeros: all of it, without the holes a file system tells of."""
    while start < end:
        try:
            first = os.lseek(fd, start, os.SEEK_DATA)
            last = os.lseek(fd, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the file's end
                return
            first, last = start, end
        except AttributeError:  # this system knows no holes
            first, last = start, end
        if first < end:
            yield first, min(last, end)
        start = last


def _begins_as_table(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
    return False


def _flush_folder(folder: Path) -> None:
    """The new name, too, is on disk; not every system lets a folder be flushed."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
