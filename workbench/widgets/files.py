"""Two buttons for trace files: one takes a file in, whatever its size, the other saves what is on show."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets as tl

from workbench import chrome_trace
from workbench.errors import WorkbenchError

log = logging.getLogger(__name__)


class TraceFiles(anywidget.AnyWidget):
    """Calls ``received(name, data)`` with a file that was chosen, ``failed(message)`` when one is refused, and ``to_save()``
    for (name, data) when the other button is pressed.

    Not ``ipywidgets.FileUpload``: that sends a file in one message, which a Jupyter server cuts off at 10 MiB, and keeps it in
    the notebook's saved state. Here nothing is kept.
    """

    _esm = (Path(__file__).parent / "files.js").read_text(encoding="utf-8")
    _css = ".wb-files {display: flex; flex-wrap: wrap; gap: 4px; margin: 2px} .wb-files .jupyter-button {width: auto}"
    can_save = tl.Bool(True).tag(sync=True)
    busy = tl.Bool(False).tag(sync=True)  # while a file is read, another must wait

    def __init__(
        self,
        received: Callable[[str, bytes], None],
        failed: Callable[[str], None],
        to_save: Callable[[], tuple[str, bytes]],
    ) -> None:
        super().__init__()
        self._received, self._failed, self._to_save = received, failed, to_save
        self._incoming: tuple[str, list[bytes]] = ("", [])
        self.on_msg(self._heard)

    def _heard(self, _: Any, message: Any, buffers: Any) -> None:
        try:
            if message.get("type") == "save":
                name, data = self._to_save()
                self.send({"type": "file", "name": name, "to": message["id"]}, buffers=[data])
            elif message.get("type") == "piece":
                self._take(message, buffers)
        except WorkbenchError as error:
            self._failed(str(error))
        except Exception as error:  # the page cannot show what a message handler raises
            log.exception("a message about a file could not be handled")
            self._failed(f"The file could not be handled ({type(error).__name__}: {error})")

    def _take(self, message: Any, buffers: Any) -> None:
        """One more piece of a file; a new one begins with piece 0, and what was there of another is forgotten."""
        given, name, index, count = message["id"], Path(str(message["name"])).name, message["index"], message["count"]
        if index == 0:
            self._incoming = (given, [])
        known, pieces = self._incoming
        if given != known or index != len(pieces):
            return  # a piece of a file that was given up
        pieces.append(bytes(buffers[0]))
        if sum(map(len, pieces)) > chrome_trace.MAX_BYTES:
            self._incoming = ("", [])
            self._failed(chrome_trace.too_large(name))
        elif len(pieces) < count:
            self.send({"type": "next", "id": given, "index": index + 1})
        else:
            self._incoming = ("", [])
            self._received(name, b"".join(pieces))
