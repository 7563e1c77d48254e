"""Asking a model's server what its indexers selected, over HTTP, with nothing but the standard library.

`workbench.captures` says in which format servers answer, and reads it.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workbench.captures import FORMAT, VERSION, CaptureFile, config_of, known_tokens
from workbench.errors import InputError, WorkbenchError, given_path, whole_number
from workbench.transcript import Transcript

MAX_ANSWER_BYTES = 16 * 2**30  # V4-Flash at 128k tokens answers with 7.5 GB of base64
READ_BYTES = 2**20
ERROR_CHARACTERS = 500
LONGEST_WAIT_S = 7 * 24 * 3600


def capture(
    url: str,
    prompt: str | Sequence[int] | Transcript,
    *,
    out: str | Path | None = None,
    preset: str | None = None,
    tokenizer: Any = None,
    max_new_tokens: int = 1,
    api_key: str | None = None,
    timeout_s: float = 600.0,
    max_bytes: int = MAX_ANSWER_BYTES,
) -> Path:
    """Ask the SGLang server at ``url`` to read ``prompt`` and keep its answer as a capture file, whose path is returned.

    ``url`` is http or https; without a path it means ``/generate``. Nothing but this address is contacted: no proxy from the
    environment, no redirect. ``prompt`` is text, token ids or a Transcript (sent as its text, with no chat
    template). The server does not return the prompt's tokens, so give ``tokenizer`` (a folder or file with the model's
    tokenizer.json) to see their texts: ids are then sent. ``out`` is a new file (default: ``capture-<time>.json`` here);
    ``preset`` is noted in it for `Trace.from_capture`. ``api_key`` is sent as a bearer token and not kept. ``timeout_s`` bounds
    every wait and the answer as a whole, ``max_bytes`` its size.
    Raises InputError for arguments that cannot be used, WorkbenchError for what goes wrong with the server.
    """
    address, shown = _address(url)
    if whole_number("max_new_tokens", max_new_tokens) < 1:
        raise InputError(f"max_new_tokens must be 1 or more (the server has to generate), got {max_new_tokens}")
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s <= LONGEST_WAIT_S:
        raise InputError(f"timeout_s must be a number of seconds above 0, at most {LONGEST_WAIT_S:,}, got {timeout_s!r:.60}")
    if whole_number("max_bytes", max_bytes) < 1:
        raise InputError(f"max_bytes must be 1 or more, got {max_bytes}")
    if api_key is not None and not (isinstance(api_key, str) and api_key.isascii() and api_key.isprintable()):
        raise InputError("api_key must be text of plain ASCII characters, without line ends; copy the key again")
    if preset is not None:
        config_of(preset)
    known = known_tokens(prompt, tokenizer)
    path = given_path("out", out) if out is not None else Path(time.strftime("capture-%Y%m%d-%H%M%S.json"))
    if path.exists():
        raise InputError(f"{path} exists; give the name of a new file as out=")
    asked = {"input_ids": known["token_ids"]} if "token_ids" in known else {"text": known["prompt"]}
    asked |= {"sampling_params": {"max_new_tokens": max_new_tokens, "temperature": 0}, "return_indexer_topk": True}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    head = {"format": FORMAT, "version": VERSION, "server": shown, "preset": preset} | known
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(json.dumps(head)[:-1].encode() + b', "answer": ')
            for piece in _answer(address, json.dumps(asked).encode(), headers, shown, timeout_s, max_bytes):
                file.write(piece)
            file.write(b"}\n")
        with closing(CaptureFile(part, shown)) as found:
            if preset is not None:
                found.layout(config_of(preset), preset)
        part.replace(path)
    except OSError as error:
        raise WorkbenchError(f"the answer cannot be kept in {path}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def _address(url: str) -> tuple[str, str]:
    """The address to ask, and the server's name to show."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{url!r} is no address; give one such as http://host:30000") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{url!r} is no http or https address; give one such as http://host:30000")
    if parts.username is not None or parts.password is not None:
        raise InputError("an address with a name or password in it is not used; give the server's key as api_key=")
    try:
        parts.hostname.encode("idna")
    except UnicodeError:
        raise InputError(f"{parts.hostname!r:.80} is no name of a host; give an address such as http://host:30000") from None
    if port == 0 or ("[" in parts.netloc and ":" not in parts.hostname):  # what would be asked is not what is written
        raise InputError(f"{url!r} is no address; give one such as http://host:30000")
    if any(c.isspace() or not c.isprintable() for c in url):
        raise InputError(f"{url!r} holds a space or a control character; give an address such as http://host:30000")
    if not (parts.path + parts.query).isascii():
        raise InputError(f"{url!r} has letters beyond ASCII behind its host; write them as %XX")
    path = parts.path if parts.path not in ("", "/") else "/generate"
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    shown = f"{parts.scheme}://{host}" + (f":{port}" if port else "")
    return f"{shown}{path}" + (f"?{parts.query}" if parts.query else ""), shown


@contextmanager
def _cut_at(deadline: float, connection: socket.socket) -> Iterator[threading.Event]:
    """Ends what ``connection`` waits for at ``deadline``, however little at a time the other side sends, and sets the event."""
    over = threading.Event()

    def cut() -> None:
        over.set()
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        yield over
    finally:
        timer.cancel()


def _answer(
    address: str, asked: bytes, headers: dict[str, str], shown: str, timeout_s: float, max_bytes: int
) -> Iterator[bytes]:
    """The body of the server's answer in pieces; every way it can fail is one WorkbenchError.

    http.client looks at no proxy and follows no redirect.
    """
    deadline = time.monotonic() + timeout_s
    late = f"{shown} did not finish its answer within {timeout_s:g} s; a long prompt may need a larger timeout_s"
    parts = urlsplit(address)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    taken = 0
    try:
        with closing(connect(str(parts.hostname), parts.port, timeout=timeout_s)) as connection:
            connection.connect()
            with _cut_at(deadline, connection.sock) as over:
                try:
                    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                    connection.request("POST", target, asked, {"Connection": "close"} | headers)
                    with closing(connection.getresponse()) as response:
                        if response.status != http.client.OK:
                            raise WorkbenchError(_refusal(response, shown))
                        while piece := response.read1(READ_BYTES):
                            taken += len(piece)
                            if taken > max_bytes:
                                raise WorkbenchError(
                                    f"{shown} answers with more than {max_bytes:,} bytes; shorten the prompt or raise max_bytes"
                                )
                            yield piece
                        if response.length and not over.is_set():
                            short = f"{response.length:,} bytes short of its answer"
                            raise WorkbenchError(f"{shown} broke off, {short}; ask again")
                finally:
                    if over.is_set():
                        raise WorkbenchError(late) from None
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, TimeoutError):
            raise WorkbenchError(late) from None
        raise WorkbenchError(f"{shown} cannot be reached: {' '.join(str(error).split()) or type(error).__name__}") from None


def _refusal(response: http.client.HTTPResponse, shown: str) -> str:
    """Why there is no answer, in the server's own words where it has some."""
    if 300 <= response.status < 400:
        where = str(response.headers.get("Location", "somewhere else"))[:ERROR_CHARACTERS]
        return f"{shown} redirects to {where!r}; give that address yourself if you trust it"
    with suppress(OSError, http.client.HTTPException):
        return f"{shown} refused ({response.status}): {_said(response.read(2**16))}"
    return f"{shown} refused ({response.status}) without saying why"


def _said(body: bytes) -> str:
    """A server's own words, quoted: what could act in a terminal (control characters, writing direction) is escaped."""
    text = body.decode("utf-8", "replace")
    with suppress(ValueError, AttributeError):
        told = json.loads(text)
        told = told.get("error", told)
        text = str(told.get("message", told) if isinstance(told, dict) else told)
    text = " ".join(text.split())
    return repr(text if len(text) <= ERROR_CHARACTERS else text[: ERROR_CHARACTERS - 1] + "…")
