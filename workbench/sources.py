"""Where published numbers come from, and how records of them are found by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from workbench.errors import InputError

Certainty = Literal["read in code", "published", "derived", "secondary", "uncertain"]
Format = Literal["bf16", "fp8", "fp4", "int8"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a number comes from, and how far to trust it."""

    text: str
    certainty: Certainty


class UnknownNameError(InputError, KeyError):
    """No record has this name; the message lists those there are."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class Named(Protocol):
    @property
    def name(self) -> str: ...


Record = TypeVar("Record", bound=Named)


class Records(Mapping[str, Record], Generic[Record]):
    """Records by name, forgiving about case, spaces and dashes; an unknown name raises InputError with those there are."""

    def __init__(self, what: str, records: Iterable[Record]) -> None:
        self._what = what
        self._records: dict[str, Record] = {record.name: record for record in records}
        self._by_key: dict[str, Record] = {_key(name): record for name, record in self._records.items()}

    def __getitem__(self, name: str) -> Record:
        found = self._by_key.get(_key(name)) if isinstance(name, str) else None
        if found is None:
            raise UnknownNameError(f"no {self._what} {name!r}; there are {', '.join(self._records)}")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter == ".")
