"""The text of a trace as people read it: characters that several tokens spell together, and where a string occurs in it.

A trace holds each token's own text, in which the pieces of a character show as U+FFFD. A run therefore notes the characters
that its tokens spell together, ``notes["characters"]``: [first token, last token, text] each, in the order of the text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

from workbench.trace import Trace

PIECE = "\ufffd"  # what stands for bytes that are no character by themselves
MOST_PIECES = 8  # a character has four bytes at most, and a token may end one and begin another
NOTE = "characters"
Tokens = tuple[int, int]  # first and last


class SpelledCharacters:
    """Finds the characters that tokens spell together while a text grows. ``found`` is what a trace notes of them."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        """``decode`` makes text of token ids."""
        self.found: list[list[Any]] = []
        self._decode, self._next = decode, 0

    def update(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Look at the tokens that came since the last call; both arguments hold all so far. Bytes that spell nothing stay."""
        while self._next < len(texts):
            t = self._next
            last = self._end_of(t, ids, texts) if PIECE in texts[t] else t
            if last is None:
                return  # perhaps the next token completes it
            self._next = last + 1

    def _end_of(self, first: int, ids: Sequence[int], texts: Sequence[str]) -> int | None:
        for last in range(first + 1, first + MOST_PIECES):
            if last >= len(texts):
                return None
            if PIECE not in texts[last]:
                break
            text = self._decode(list(ids[first : last + 1]))
            if PIECE not in text:
                self.found.append([first, last, text])
                return last
        return first


class Decoded:
    """A trace's text in units: a token, or the tokens that spell characters together."""

    def __init__(self, trace: Trace) -> None:
        self._texts = trace.token_texts[: trace.length]
        if len(self._texts) < trace.length or not set(map(type, self._texts)) <= {str}:
            texts = (*self._texts, None)
            trace.token_text(next(t for t, text in enumerate(texts) if not isinstance(text, str)))
        self._spelled: dict[int, tuple[int, str]] = {}  # first token -> last token, text
        self._first: dict[int, int] = {}  # a later token of such a unit -> its first
        noted, end = trace.notes.get(NOTE), 0
        for line in noted if isinstance(noted, list) else []:
            if not isinstance(line, list | tuple) or len(line) != 3 or not isinstance(line[2], str):
                continue
            first, last, text = line
            if isinstance(first, int) and isinstance(last, int) and end <= first < last < trace.length:
                self._spelled[first], end = (last, text), last + 1
                self._first |= dict.fromkeys(range(first + 1, last + 1), first)

    def unit(self, t: int) -> Tokens:
        """First and last token of the unit that token ``t`` belongs to."""
        first = self._first.get(t, t)
        return first, self._spelled[first][0] if first in self._spelled else first

    def text(self, first: int) -> str:
        """Of the unit that begins with token ``first``."""
        return self._spelled[first][1] if first in self._spelled else self._texts[first]

    @cached_property
    def _pieces(self) -> list[str]:
        """One text a token; those of a unit hold all of it in the first."""
        pieces = list(self._texts)
        for first, (last, text) in self._spelled.items():
            pieces[first : last + 1] = [text, *[""] * (last - first)]
        return pieces

    @cached_property
    def whole(self) -> str:
        return "".join(self._pieces)

    @cached_property
    def _plain(self) -> _Searched:
        return _Searched(self._pieces, self.whole)

    @cached_property
    def _folded(self) -> _Searched:
        return _Searched(self._pieces, self.whole, fold=True)

    def find(self, needle: str, match_case: bool = False) -> list[Tokens]:
        """First and last token of each place where ``needle`` stands, in order; matches do not overlap. None for "".

        Without ``match_case`` characters are compared by Unicode's case folding, one by one: "ss" finds "ß" whole, and "s" does
        not find half of it. Letters with accents of their own and with combining ones are different texts.
        """
        searched = self._plain if match_case else self._folded
        return [(self.unit(first)[0], self.unit(last)[1]) for first, last in searched.find(needle)]


class _Searched:
    """The text joined once, folded or not, with the token that each place in it belongs to."""

    def __init__(self, pieces: list[str], whole: str, fold: bool = False) -> None:
        self._fold, self._text = fold, whole.casefold() if fold else whole
        lengths = [len(piece.casefold()) for piece in pieces] if fold else list(map(len, pieces))
        self._starts = list(accumulate(lengths, initial=0))[:-1]
        # A character may fold to several, of which a match must not take a part. Where none does there is nothing to check.
        self._inside = set[int]()
        if len(self._text) != len(whole):
            at = 0
            for character in whole:
                width = len(character.casefold())
                self._inside.update(range(at + 1, at + width))
                at += width

    def find(self, needle: str) -> list[Tokens]:
        needle = needle.casefold() if self._fold else needle
        found: list[Tokens] = []
        at = self._text.find(needle) if needle else -1
        while at >= 0:
            end = at + len(needle)
            whole = at not in self._inside and end not in self._inside
            if whole:
                found.append((self._token_at(at), self._token_at(end - 1)))
            at = self._text.find(needle, end if whole else at + 1)
        return found

    def _token_at(self, place: int) -> int:
        """Of tokens without text that stand there too, the one after them."""
        return bisect_right(self._starts, place) - 1


_DECODED: WeakKeyDictionary[Trace, Decoded] = WeakKeyDictionary()


def decoded(trace: Trace) -> Decoded:
    """The text of ``trace``, made once."""
    if trace not in _DECODED:
        _DECODED[trace] = Decoded(trace)
    return _DECODED[trace]
