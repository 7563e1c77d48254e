"""Where Engram rows come from: what the prefetcher asks of a table on the host, and how a ``wb.EngramTable`` answers."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.runtime import available_bytes, size_text

CHUNK_ROWS = 2**16  # moved to a device at a time


class RowSource(Protocol):
    """Rows [rows, width] on the host. ``in_memory`` says that reading them cannot block on a disk."""

    width: int
    in_memory: bool

    @property
    def dtype(self) -> torch.dtype: ...

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Row numbers [n] -> values [n, width], into ``out`` where given; without it autograd may follow."""

    def resident(self, device: torch.device) -> Tensor:
        """All rows, on ``device``."""


class TableSource(nn.Module):
    """A ``wb.EngramTable`` or anything with its ``rows``, ``width`` and ``gather(row_ids, out=None)``, as a RowSource.

    A module, so that a model can have one in place of rows of its own (``use_tables``); nothing of it is learnt.
    """

    def __init__(self, table: Any) -> None:
        super().__init__()
        missing = [name for name in ("rows", "width", "gather") if not hasattr(table, name)]
        if missing:
            raise InputError(f"a table needs rows, width and gather(row_ids, out), {type(table).__name__} lacks {missing}")
        self.table, self.rows, self.width = table, int(table.rows), int(table.width)
        self.dtype = torch.from_numpy(table.gather(np.zeros(0, np.int64))).dtype
        self.in_memory = bool(getattr(table, "in_memory", False))
        self._resident: Tensor | None = None

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """rows [n] -> values [n, width], into ``out`` if given."""
        values = self.table.gather(rows.numpy(), out=None if out is None else out.numpy())
        return out if out is not None else torch.from_numpy(values)

    def resident(self, device: torch.device) -> Tensor:
        """All rows [rows, width], a copy on ``device`` that is kept.

        Raises InputError for a table that fills more than half of the device's free memory.
        """
        if self._resident is None or self._resident.device != device:
            self._resident = None
            nbytes = self.rows * self.width * self.dtype.itemsize
            if nbytes > available_bytes(device) / 2:
                raise InputError(
                    f"a table of {size_text(nbytes)} does not fit on {device}; use prefetch='prefetch' or 'serial'"
                )
            held = torch.empty(self.rows, self.width, dtype=self.dtype, device=device)
            for first in range(0, self.rows, CHUNK_ROWS):
                rows = torch.arange(first, min(self.rows, first + CHUNK_ROWS))
                held[first : first + len(rows)] = self.gather(rows).to(device)
            self._resident = held
        return self._resident

    @property
    def weight(self) -> Tensor:
        """All rows [rows, width], to be read only: of a mapped fp16 table the file itself, else gathered into memory."""
        whole = getattr(self.table, "all_values", None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(whole() if whole else self.table.gather(np.arange(self.rows)))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight  # a model that is saved has its rows
