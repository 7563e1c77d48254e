"""Selections of a real model, as its server told them: a capture file, read as a Trace. `workbench.ask_server` makes one.

SGLang servers started with ``--enable-return-indexer-topk`` answer a request that says ``return_indexer_topk`` with
``meta_info["indexer_topk"]``: base64 of int32 [tokens, indexer layers, top-k], -1 where nothing was left (sgl-project/sglang
pull requests 24392 and 26684; since the second, entries are counted within the request). A row belongs to a token that was
fed to the model, so the last generated one has none. vLLM's (47279, continued as 49555) put an .npy file into the base64.
There are no probabilities and no scores in it, so a trace made from it has none.

A capture can be larger than memory (V4-Flash, 128k tokens: 5.6 GB), so its file is mapped and decoded piece by piece.
"""

from __future__ import annotations

import binascii
import io
import json
import mmap
import operator
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from workbench.config import HybridConfig, LatentConfig, ModelConfig
from workbench.decoded import NOTE as CHARACTERS
from workbench.decoded import SpelledCharacters
from workbench.errors import InputError, given_path
from workbench.presets import Preset, presets
from workbench.trace import LayerTrace, Timeline, Trace
from workbench.transcript import Transcript

FORMAT, VERSION = "workbench-capture", 1
WHAT = "selections only, captured from a server"
MAX_TEXT_BYTES = 2**28  # of a capture file beside its selections: ids, texts, the answer
MEMORY_BYTES = 2**28  # chosen layers beyond this are kept in mapped files beside the capture
PIECE_BYTES = 2**24  # decoded at once
CHOOSING = {"csa": "CSA", "mla-dsa": "MLA + DSA"}  # the kinds of layers whose choice a server returns
HOW_TO_START = (
    "start SGLang with --enable-return-indexer-topk (and data-parallel attention, without which it records nothing); "
    "only models with an indexer, DeepSeek-V3.2 and V4, have selections"
)
_PAYLOAD = re.compile(rb'(?<!\\)"indexer_topk"\s*:\s*"')  # a quote inside a JSON string has a backslash before it
_OURS = re.compile(rb'^\s*\{\s*"format"\s*:\s*"workbench-capture"')


def known_tokens(prompt: str | Sequence[int] | Transcript, tokenizer: Any) -> dict[str, Any]:
    """What is known of the prompt before the server sees it: ``prompt`` (text), ``token_ids``, ``token_texts``, and of a
    transcript ``roles``, as a trace notes them."""
    known: dict[str, Any] = {}
    encoder = None if tokenizer is None else read_tokenizer(tokenizer)
    text = prompt.text if isinstance(prompt, Transcript) else prompt
    if isinstance(text, str):
        if not text:
            raise InputError("the prompt is empty; type some text")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise InputError("the prompt holds half a character that is no Unicode text; type it again")
        known["prompt"] = text
        if encoder is not None:
            encoder.encode_special_tokens = True  # a typed "<|bos|>" is text like any other
            encoded = encoder.encode(text)
            known["token_ids"] = encoded.ids
            if isinstance(prompt, Transcript):
                known["roles"] = prompt.token_roles(encoded.offsets)
    else:
        try:
            known["token_ids"] = [operator.index(i) for i in text]
        except TypeError:
            known["token_ids"] = None
        if known["token_ids"] is None or isinstance(text, bytes):
            raise InputError(f"a prompt must be text or whole numbers, got {prompt!r:.60}")
        if not known["token_ids"] or not 0 <= min(known["token_ids"]) <= max(known["token_ids"]) < 2**31:
            raise InputError("a prompt of token ids needs at least one, and none below 0 or beyond 31 bits")
    if encoder is not None:
        known["token_texts"] = texts_of(encoder, known["token_ids"])
        known[CHARACTERS] = _spelled(encoder, known["token_ids"], known["token_texts"])
    return known


def _spelled(tokenizer: Any, ids: Sequence[int], texts: Sequence[str]) -> list[list[Any]]:
    """Characters that several tokens spell together, as a trace notes them."""
    spelled = SpelledCharacters(lambda some: str(tokenizer.decode_batch([some], skip_special_tokens=False)[0]))
    spelled.update(ids, texts)
    return spelled.found


def read_tokenizer(source: Any) -> Any:
    """A ``tokenizers.Tokenizer``: as given, or from a tokenizer.json or the folder that holds it."""
    if hasattr(source, "decode_batch"):
        return source
    from tokenizers import Tokenizer

    path = given_path("tokenizer", source)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"no tokenizer at {path}; give the model's tokenizer.json or the folder it is in")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library's own errors have no common class
        raise InputError(f"{path} is no tokenizer.json: {' '.join(str(error).split())}") from None


def texts_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token's own text; an id the tokenizer does not know shows as a number."""
    size = tokenizer.get_vocab_size()
    texts = tokenizer.decode_batch([[i] if 0 <= i < size else [] for i in ids], skip_special_tokens=False)
    return [text if 0 <= i < size else f"[{i}]" for i, text in zip(ids, texts, strict=True)]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the numbers of a capture are arranged: [``tokens``, one row for each of ``layers``, ``topk``]."""

    tokens: int
    layers: tuple[int, ...]
    topk: int
    ratio: int
    kind: str

    def gigabytes(self, layers: int) -> float:
        return 4e-9 * self.tokens * self.topk * layers


def config_of(preset: str | Preset | ModelConfig) -> HybridConfig | LatentConfig:
    """The configuration behind a preset's name, a Preset or a configuration; InputError unless it is V3.2's or V4's kind."""
    found = presets[preset] if isinstance(preset, str) else preset
    config = found.config if isinstance(found, Preset) else found
    if not isinstance(config, HybridConfig | LatentConfig) or not choosing_layers(config):
        name = preset if isinstance(preset, str) else getattr(found, "name", type(found).__name__)
        raise InputError(f"captures of DeepSeek-V4 and V3.2 are read; {name!r} has no layers of these kinds; try 'v4-flash'")
    return config


def choosing_layers(config: ModelConfig) -> tuple[int, ...]:
    """Numbers of the layers whose indexer chooses, in order: the second axis of what a server returns."""
    return tuple(i for i, kind in enumerate(config.layer_kinds) if kind in CHOOSING)


class CaptureFile:
    """An open capture file: its JSON without the selections, and these decoded piece by piece from the mapped file."""

    def __init__(self, path: Path, named: str) -> None:
        self.named = named
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise InputError(f"{named} is empty; capture again")
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.mapped.close()

    def _read(self) -> None:
        match = _PAYLOAD.search(self.mapped)
        start = match.end() if match else 0
        stop = self.mapped.find(b'"', start) if match else 0
        if len(self.mapped) - (stop - start) > MAX_TEXT_BYTES or stop < 0:
            raise InputError(f"{self.named} holds more than selections, or only half of them; capture again")
        try:
            self.told = json.loads(self.mapped[:start] + self.mapped[stop:])
        except (ValueError, RecursionError):
            raise InputError(f"{self.named} is not the JSON of a server's answer; capture again") from None
        if isinstance(self.told, dict) and self.told.get("format", FORMAT) != FORMAT:
            raise InputError(f"{self.named} is no capture: its format is {str(self.told['format'])!r:.60}")
        if isinstance(self.told, dict) and self.told.get("version", VERSION) != VERSION:
            raise InputError(
                f"{self.named} is a capture of version {self.told['version']!r:.20}; this workbench reads {VERSION}"
            )
        holders = list(_holders(self.told))
        if len(holders) > 1:
            raise InputError(f"{self.named} holds the selections of {len(holders)} prompts; capture one at a time")
        if not match or not holders:
            raise InputError(f"{self.named} returned no selections (meta_info.indexer_topk): {HOW_TO_START}")
        self.meta: dict[str, Any] = holders[0]
        self.top: dict[str, Any] = self.told if isinstance(self.told, dict) else {}
        answer = self.top.get("answer", self.top)
        self.answer: dict[str, Any] = answer if isinstance(answer, dict) else {}
        self.start, characters = start, stop - start
        padding = sum(c == ord("=") for c in self.mapped[max(start, stop - 2) : stop])
        self.nbytes = characters // 4 * 3 - padding
        if characters % 4 or self.nbytes <= 0:
            raise InputError(f"{self.named}: its selections are cut off or no base64; capture again")
        self.first, self.shape = 0, self.top.get("shape")
        if self.shape is not None and not (isinstance(self.shape, list) and len(self.shape) == 3):
            raise InputError(f"{self.named}: a shape is [tokens, layers, top-k], got {self.shape!r:.60}")
        if self.bytes(0, min(6, self.nbytes)) == npy.MAGIC_PREFIX:
            self._read_npy_header()

    def _read_npy_header(self) -> None:
        """vLLM puts an .npy file into the base64."""
        head = io.BytesIO(self.bytes(0, min(self.nbytes, 4096)))
        try:
            version = npy.read_magic(head)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, by_columns, dtype = read(head)
        except ValueError:
            raise InputError(f"{self.named}: the .npy file among its selections is damaged; capture again") from None
        if by_columns or dtype != np.dtype("<i4"):
            raise InputError(f"{self.named}: selections are int32, row by row; these are {dtype}")
        self.first, self.shape = head.tell(), list(shape)
        self.nbytes -= self.first

    def bytes(self, start: int, stop: int) -> bytes:
        """Decoded bytes ``start`` to ``stop``."""
        low = start // 3
        characters = self.mapped[self.start + 4 * low : self.start + 4 * -(-stop // 3)]
        try:
            return binascii.a2b_base64(characters, strict_mode=True)[start - 3 * low : stop - 3 * low]
        except binascii.Error as error:
            raise InputError(f"{self.named}: its selections are no base64 ({error}); capture again") from None

    def tokens_fed(self) -> int | None:
        """Tokens the model read, of the prompt and its own without the last; None if the answer does not say."""
        prompt, new = self.meta.get("prompt_tokens"), self.meta.get("completion_tokens")
        return prompt + new - 1 if isinstance(prompt, int) and isinstance(new, int) else None

    def layout(self, config: HybridConfig | LatentConfig, name: str) -> Layout:
        """The arrangement, held against everything the file says about it; InputError if ``config`` is another model's."""
        layers, topk = choosing_layers(config), int(config.index_topk)
        numbers, a_token = self.nbytes // 4, len(layers) * topk
        tokens = numbers // a_token
        said = {"its shape": self.shape and list(self.shape)[1:], "its layer count": self.meta.get("indexer_topk_num_layers")}
        wrong = [what for what, value in said.items() if value not in (None, [len(layers), topk], len(layers))]
        fed = self.tokens_fed()
        if self.nbytes % 4 or tokens * a_token != numbers or wrong or (fed is not None and tokens not in (fed, fed + 1)):
            held = f"{numbers:,} numbers" + (f" for {fed:,} tokens" if fed else "")
            held += f" in the shape {self.shape!r:.60}" if self.shape else ""
            raise InputError(
                f"{self.named} is no capture of {name}: it holds {held}, and {name} has {len(layers)} layers that choose "
                f"{topk} entries for each token; {self._fitting(fed)}"
            )
        kind = config.layer_kinds[layers[0]]
        if tokens < config.compress_ratios[layers[0]]:
            raise InputError(f"{self.named} has {tokens} tokens, fewer than one entry is made from; capture a longer prompt")
        return Layout(tokens, layers, topk, config.compress_ratios[layers[0]], kind)

    def _fitting(self, fed: int | None) -> str:
        fits = []
        for name, preset in presets.items():
            layers = choosing_layers(preset.config)
            a_token = len(layers) * int(preset.config.index_topk or 0)
            if a_token and fed and self.nbytes in (4 * fed * a_token, 4 * (fed + 1) * a_token):
                fits.append(repr(name))
        if fits:
            return f"it fits preset {' or '.join(fits)}"
        return "give the preset of the model the server runs (one of your own if it was started with another top-k)"

    def pieces(self, layout: Layout) -> Iterator[tuple[int, np.ndarray]]:
        """(first token, int32 [tokens, layers, K]) in turn."""
        row = 4 * len(layout.layers) * layout.topk
        count = max(3, PIECE_BYTES // row // 3 * 3)
        for start in range(0, layout.tokens, count):
            stop = min(start + count, layout.tokens)
            block = self.bytes(self.first + start * row, self.first + stop * row)
            yield start, np.frombuffer(block, "<i4").reshape(stop - start, len(layout.layers), layout.topk)


def _holders(value: Any) -> Iterator[dict[str, Any]]:
    """The objects, however deep, that hold selections."""
    if isinstance(value, dict):
        if isinstance(value.get("indexer_topk"), str):
            yield value
        for below in value.values():
            yield from _holders(below)
    elif isinstance(value, list):
        for below in value:
            if isinstance(below, dict | list):
                yield from _holders(below)


def is_capture(path: Path) -> bool:
    """True for a file that `capture` wrote, or a server's answer with selections in its first megabyte."""
    with path.open("rb") as file:
        start = file.read(2**20)
    return bool(_OURS.match(start) or (start.lstrip()[:1] == b"{" and _PAYLOAD.search(start)))


def trace_of(
    file: str | Path,
    preset: str | Preset | ModelConfig | None = None,
    *,
    layers: Sequence[int] | None = None,
    prompt: str | Sequence[int] | Transcript | None = None,
    tokenizer: Any = None,
) -> Trace:
    """What `Trace.from_capture` returns; arguments as there."""
    file = given_path("a capture", file)
    if not file.is_file():
        raise InputError(f"no capture at {file}; make one with wb.capture(url, prompt), or give a server's answer as a file")
    with closing(CaptureFile(file, file.name)) as found:
        chosen = preset if preset is not None else found.top.get("preset")
        if not isinstance(chosen, str | Preset | HybridConfig | LatentConfig):
            fitting = found._fitting(found.tokens_fed())
            raise InputError(f"{file.name} does not name its model; say preset=, such as 'v4-flash' ({fitting})")
        config = config_of(chosen)
        name = chosen if isinstance(chosen, str) else getattr(chosen, "name", "the given configuration")
        layout = found.layout(config, name)
        wanted = _wanted(layout, layers)
        selections = _selections(found, layout, wanted, file)
        ids, texts, prompt_length, notes = _tokens(found, layout, prompt, tokenizer)
        server = str(found.top.get("server") or file.name)
        title = presets[chosen].title if isinstance(chosen, str) else getattr(chosen, "title", config.model_type)
        model = str(found.answer.get("model") or title)
    no_window, no_sink = np.zeros((layout.tokens, 0, 0), np.float16), np.zeros((layout.tokens, 0), np.float16)
    return Trace(
        model=model,
        what=WHAT,
        device=server,
        config=config.to_dict(),
        token_ids=ids,
        token_texts=tuple(texts),
        prompt_length=prompt_length,
        layers=tuple(LayerTrace(n, layout.kind, layout.ratio, no_window, no_sink, selected=selections[n]) for n in wanted),
        timeline=Timeline("recorded", (), server),
        origin="recorded",
        notes={"capture": file.name} | notes,
    )


def _wanted(layout: Layout, layers: Sequence[int] | None) -> tuple[int, ...]:
    try:
        wanted = layout.layers if layers is None else tuple(sorted({operator.index(n) for n in layers}))
    except TypeError:  # no list, or not of whole numbers
        wanted = ()
    if not wanted or not set(wanted) <= set(layout.layers):
        raise InputError(f"the layers that choose are {layout.layers}, got layers={layers!r:.60}; give a list of some of them")
    return wanted


def _selections(found: CaptureFile, layout: Layout, wanted: tuple[int, ...], file: Path) -> dict[int, np.ndarray]:
    """Layer -> int32 [tokens, K]: in memory if small, else in mapped files beside the capture, made once."""
    shape = layout.tokens, layout.topk
    if 1e9 * layout.gigabytes(len(wanted)) <= MEMORY_BYTES:
        arrays = {n: np.empty(shape, np.int32) for n in wanted}
        _fill(found, layout, arrays)
        return arrays
    folder = file.with_name(file.name + ".layers")
    stamp = file.stat().st_mtime_ns
    paths = {n: folder / f"layer-{n}.npy" for n in wanted}
    missing = [n for n, path in paths.items() if not _is_made(path, shape, stamp)]
    free = shutil.disk_usage(file.parent).free
    if 1e9 * layout.gigabytes(len(missing)) > free:
        fit = int(free / 1e9 / layout.gigabytes(1))
        some = f"choose at most {fit}, such as layers={wanted[:fit]}" if fit else "capture a shorter prompt"
        raise InputError(
            f"{len(missing)} layers of {layout.tokens:,} tokens take {layout.gigabytes(len(missing)):.1f} GB beside "
            f"{file.name}, where {free / 1e9:.1f} GB are free; {some}"
        )
    if missing:
        folder.mkdir(exist_ok=True)
        parts = {n: paths[n].with_name(paths[n].name + ".part") for n in missing}
        try:
            made = {n: npy.open_memmap(parts[n], mode="w+", dtype=np.int32, shape=shape) for n in missing}
            _fill(found, layout, made)
            for n, array in made.items():
                array.flush()
                parts[n].replace(paths[n])
                os.utime(paths[n], ns=(stamp, stamp))  # so that the next reading knows what it was made from
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
    return {n: np.load(paths[n], mmap_mode="r", allow_pickle=False) for n in wanted}


def _is_made(path: Path, shape: tuple[int, int], stamp: int) -> bool:
    if not path.is_file() or path.stat().st_mtime_ns != stamp:
        return False
    with suppress(ValueError, OSError):
        held = np.load(path, mmap_mode="r", allow_pickle=False)
        return held.shape == shape and held.dtype == np.int32
    return False


def _fill(found: CaptureFile, layout: Layout, arrays: Mapping[int, np.ndarray]) -> None:
    """Decode the chosen layers into ``arrays``. Raises InputError for what no model could have selected."""
    for start, block in found.pieces(layout):
        t = np.arange(start, start + len(block))
        complete = (t + 1) // layout.ratio  # entries a query may look at
        for n, array in arrays.items():
            rows = block[:, layout.layers.index(n)]
            beyond = (rows.max(axis=1) >= complete) | (rows.min(axis=1) < -1)
            if beyond.any():
                at = int(beyond.argmax())
                value = int(rows[at].max() if rows[at].max() >= complete[at] else rows[at].min())
                raise InputError(
                    f"{found.named}: in layer {n} token {t[at]} selects entry {value}, of which {complete[at]} were complete; "
                    "SGLang before pull request 26684 returned places in its cache: update it, or this is another model"
                )
            order = np.sort(rows, axis=1)
            twice = ((order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)).any(axis=1)
            if twice.any():
                at = int(t[int(twice.argmax())])
                raise InputError(
                    f"{found.named}: in layer {n} token {at} selects an entry twice; the server did not record this token"
                )
            array[start : start + len(block)] = rows


def _tokens(
    found: CaptureFile, layout: Layout, prompt: str | Sequence[int] | Transcript | None, tokenizer: Any
) -> tuple[np.ndarray, list[str], int, dict[str, Any]]:
    """Ids (-1 where unknown), texts, how many belong to the prompt, and what the trace notes of its roles and characters."""
    known = found.top if prompt is None else known_tokens(prompt, tokenizer)
    ids, texts, new = known.get("token_ids") or [], known.get("token_texts") or [], found.answer.get("output_ids") or []
    count = found.meta.get("prompt_tokens")
    if not all(isinstance(x, list) for x in (ids, texts, new)) or not all(type(i) is int and 0 <= i < 2**31 for i in ids + new):
        raise InputError(f"{found.named}: token ids must be lists of whole numbers")
    if (ids and isinstance(count, int) and len(ids) != count) or (texts and len(texts) != len(ids)):
        raise InputError(
            f"{found.named}: the server read {count} prompt tokens, and {len(ids)} ids and {len(texts)} texts are given; "
            "give the prompt exactly as it was sent, and the model's own tokenizer"
        )
    length = min(count if isinstance(count, int) else len(ids) or layout.tokens, layout.tokens)
    every = np.full(layout.tokens, -1, np.int32)
    line = (ids or [-1] * length) + new
    every[: len(line)] = line[: layout.tokens]
    notes = {name: known[name] for name in ("roles", CHARACTERS) if known.get(name)}
    if tokenizer is not None and (not texts or new):
        encoder = read_tokenizer(tokenizer)
        texts = texts_of(encoder, every.tolist()) if (every >= 0).any() else []
        notes |= {CHARACTERS: found_there} if (found_there := _spelled(encoder, every.tolist(), texts)) else {}
    shown = [str(text) for text in texts[: layout.tokens]]
    shown += [f"[{i}]" if i >= 0 else f"[token {len(shown) + j}]" for j, i in enumerate(every[len(shown) :].tolist())]
    return every, shown, length, notes


def summary_lines(trace: Trace) -> list[str]:
    """A capture in a few lines: how much was selected, and from how far away (over at most 1,024 queries)."""
    lines = [f"{trace.label}: {trace.length:,} tokens, {len(trace.layers)} layers that choose; no probabilities in a capture"]
    rows = np.unique(np.linspace(0, trace.length - 1, min(trace.length, 1024)).astype(np.int64))
    for layer in trace.layers:
        assert layer.selected is not None
        kept = np.asarray(layer.selected[rows]).astype(np.int64)
        mask = kept >= 0
        age = rows[:, None] - ((kept + 1) * layer.ratio - 1)
        middle = f"{np.median(age[mask]):,.0f}" if mask.any() else "–"
        lines.append(
            f"layer {layer.layer:>3} {CHOOSING[layer.kind]}: at the end {int(mask[-1].sum()):,} of {layer.entries:,} entries "
            f"selected; half of all selections lie within {middle} tokens of their query"
        )
    return lines
