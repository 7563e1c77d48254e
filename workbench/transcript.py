"""Prompts from files: plain text, or the transcript of a chat or an agent, one message a line as JSON.

A line is ``{"role": ..., "content": ...}`` as chat services write it: content is text or a list of text parts, an assistant may
have ``tool_calls``, and a tool answers with the role "tool". A line may also hold ``{"messages": [...]}``. Our models know no
chat template, so each message becomes ``role: text`` and a line end; hidden reasoning and ids are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import InputError, given_path

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEXT_PARTS = ("text", "input_text", "output_text")
MAX_BYTES = 2**26
MAX_NAME = 64
ERRORS_TOLD = 10


@dataclass(frozen=True, slots=True)
class Transcript:
    """Who said what, in order: ``parts`` are (role, text); a tool call is a part of its own, "assistant calls NAME"."""

    parts: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The prompt: every part under its role, and a last role for the model to answer in unless it spoke last."""
        return "".join(self._pieces())

    def _pieces(self) -> Iterator[str]:
        yield from (f"{role}: {text}\n" for role, text in self.parts)
        if not self.parts[-1][0].startswith("assistant"):
            yield "assistant:"

    def token_roles(self, offsets: Sequence[tuple[int, int]]) -> list[list[Any]]:
        """[role, first token, token after the last] of each part, from the characters [start, stop) each token was made from.

        A token across two parts belongs to the one it ends in.
        """
        roles = [role for role, _ in self.parts] + ["assistant"]
        ends, end = [], 0
        for piece in self._pieces():
            end += len(piece)
            ends.append(end)
        found: list[list[Any]] = []
        part, begun = 0, -1
        for token, (start, stop) in enumerate(offsets):
            last = max(start, stop - 1)
            while part < len(ends) - 1 and last >= ends[part]:
                part += 1
            if part != begun:
                found.append([roles[part], token, token])
                begun = part
            found[-1][2] = token + 1
        return found


def read_prompt(path: str | Path) -> str | Transcript:
    """The text of a UTF-8 file, or the Transcript of one whose name ends in .jsonl. InputError says what is wrong with it."""
    path = given_path("a prompt file", path)
    if not path.is_file():
        raise InputError(f"prompt file {str(path)!r} does not exist; give the path of a text or .jsonl file")
    if path.suffix.lower() == ".jsonl":
        return read_transcript(path)
    return _text_of(path)


def read_transcript(path: str | Path) -> Transcript:
    """The transcript in a JSON-lines file. What is wrong with its lines is told line by line, in one InputError."""
    path = given_path("a transcript", path)
    if not path.is_file():
        raise InputError(f"transcript {str(path)!r} does not exist; give the path of a .jsonl file")
    return parse_transcript(_text_of(path), path.name)


def parse_transcript(text: str, name: str = "transcript") -> Transcript:
    """The transcript that JSON lines describe; ``name`` is for errors."""
    parts: list[tuple[str, str]] = []
    wrong: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold other line separators
        if not line.strip():
            continue
        try:
            parts += _parts_of_line(line)
        except InputError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - ERRORS_TOLD} more lines" if len(wrong) > ERRORS_TOLD else ""
        raise InputError(f"{name}: {'; '.join(wrong[:ERRORS_TOLD])}{more}")
    if not parts:
        raise InputError(f'{name} holds no message; expected lines such as {{"role": "user", "content": "Hello"}}')
    return Transcript(tuple(parts))


def _text_of(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path.name} is larger than {MAX_BYTES // 2**20} MiB; give a part of it")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"prompt file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _parts_of_line(line: str) -> list[tuple[str, str]]:
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
        raise InputError(f"no JSON ({why})") from None
    messages = told.get("messages") if isinstance(told, dict) and "role" not in told else [told]
    if not isinstance(messages, list):
        raise InputError('a message is an object with "role" and "content"')
    return [part for message in messages for part in _parts_of_message(message)]


def _parts_of_message(message: Any) -> list[tuple[str, str]]:
    if not isinstance(message, dict):
        raise InputError(f'a message is an object with "role" and "content", got {message!r:.40}')
    role = message.get("role")
    if role not in ROLES:
        raise InputError(f"role {role!r:.40} is unknown; expected one of {', '.join(ROLES)}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise InputError("tool_calls is a list, and only an assistant has it")
    content = message.get("content")
    if content is None and not calls:
        raise InputError("the message has neither content nor tool_calls")
    text = _text("content", content)
    parts = [(role if role != "tool" else _named("tool", message.get("name")), text)] if text or not calls else []
    return parts + [_call(call) for call in calls]


def _text(what: str, content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(_text("a part", part) for part in content)
    if isinstance(content, dict) and content.get("type") in TEXT_PARTS:
        content = content.get("text")
    if isinstance(content, dict):
        raise InputError(f"a part of type {content.get('type')!r:.40} holds no text; leave it out")
    if content is not None and not isinstance(content, str):
        raise InputError(f"{what} must be text or a list of text parts, got {content!r:.40}")
    return _checked(content or "")


def _call(call: Any) -> tuple[str, str]:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise InputError(f"a tool call names its function, got {call!r:.60}")
    given = function.get("arguments", "")
    return _named("assistant calls", name), _checked(given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))


def _named(what: str, name: Any) -> str:
    if name is None:
        return what
    if not isinstance(name, str):
        raise InputError(f"a tool's name must be text, got {name!r:.40}")
    return f"{what} {' '.join(_checked(name).split())[:MAX_NAME]}".strip()


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("it holds half a character that is no Unicode text") from None
    return text
