"""A loopback server that speaks SGLang's documented format for returned selections. No model runs in it: the selections are
those of a synthetic trace, so that what comes out at the other end can be held against them."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from workbench.trace import Trace


def selections(trace: Trace) -> np.ndarray:
    """int32 [tokens, layers that choose, K] of a trace."""
    return np.stack([layer.selected for layer in trace.layers if layer.indexes], axis=1)


def answer(numbers: np.ndarray, **changes: Any) -> dict[str, Any]:
    """What a server says after reading as many tokens as ``numbers`` has rows, and generating one."""
    meta = {
        "prompt_tokens": len(numbers),
        "completion_tokens": 1,
        "indexer_topk": base64.b64encode(numbers.astype("<i4").tobytes()).decode(),
    }
    return {"text": " so", "output_ids": [7], "meta_info": meta | changes}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        self.server.act(self, body)

    def log_message(self, *_: Any) -> None:
        pass

    def say(self, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


Act = Callable[[Handler, dict[str, Any]], None]


def giving(told: Any, status: int = 200) -> Act:
    body = told if isinstance(told, bytes) else json.dumps(told).encode()
    return lambda handler, _: handler.say(body, status)


def trickling(seconds: float) -> Act:
    """A server that sends a little, again and again, and never ends."""

    def act(handler: Handler, _: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                handler.wfile.write(b" ")
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.02)

    return act


def dripping(begun: bytes, seconds: float) -> Act:
    """A server that has sent ``begun`` and then a letter, again and again."""

    def act(handler: Handler, _: Any) -> None:
        handler.wfile.write(begun)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                handler.wfile.write(b"a")
            except OSError:
                return
            time.sleep(0.02)

    return act


@contextmanager
def serving(act: Act) -> Iterator[tuple[str, list[Any]]]:
    """Address of a server that acts so, and the list of what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.act, server.asked = act, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
