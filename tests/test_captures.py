"""Selections from a server: asked for over loopback in the documented format, read back equal, or refused in one clear line.

No SGLang server was at hand: these tests hold the reader against the documented format, not against the program.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import workbench as wb
from tests.capture_server import answer, dripping, giving, selections, serving, trickling
from tests.synthetic import FAMILIES, synthetic_trace
from workbench import captures, cli
from workbench.config import read_config
from workbench.errors import InputError, WorkbenchError
from workbench.figures.text import text_view
from workbench.transcript import Transcript, parse_transcript

SOURCES = {"V4": synthetic_trace(97, seed=5), "V3.2": synthetic_trace(61, seed=6, kinds=FAMILIES["deepseek_v32"])}
V4 = SOURCES["V4"]
NUMBERS, CONFIG = selections(V4), read_config(V4.config)


def written(folder: Path, told: object) -> Path:
    path = folder / "answer.json"
    path.write_text(json.dumps(told), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", SOURCES)
def test_what_a_server_selected_comes_back_as_a_trace(tmp_path, family):
    source = SOURCES[family]
    with serving(giving(answer(selections(source)))) as (url, asked):
        file = wb.capture(url, source.token_ids.tolist(), out=tmp_path / "c.json")
    ((path, body, _),) = asked
    assert path == "/generate" and body["return_indexer_topk"] is True and body["input_ids"] == source.token_ids.tolist()
    trace = wb.Trace.from_capture(file, preset=read_config(source.config))
    chosen = [layer for layer in source.layers if layer.indexes]
    assert [x.layer for x in trace.layers] == [x.layer for x in chosen]
    for layer, recorded in zip(trace.layers, chosen, strict=True):
        np.testing.assert_array_equal(layer.selected, recorded.selected)
        assert layer.selection_only and not recorded.selection_only
        assert (layer.kind, layer.ratio, layer.entries) == (recorded.kind, recorded.ratio, recorded.entries)
    np.testing.assert_array_equal(trace.token_ids, source.token_ids)
    assert "selections only" in trace.label and trace.origin == "recorded" and url in trace.device
    assert not list(tmp_path.glob("*.part"))


def test_a_capture_saves_and_loads_like_any_trace(tmp_path):
    trace = wb.Trace.from_capture(written(tmp_path, answer(NUMBERS)), preset=CONFIG, layers=[3])
    again = wb.Trace.load(trace.save(tmp_path / "trace"))
    assert [x.layer for x in again.layers] == [3] and again.layers[0].selection_only
    np.testing.assert_array_equal(again.layers[0].selected, NUMBERS[:, 1])


def test_a_text_needs_a_tokenizer_to_show_its_tokens(tmp_path):
    tokenizer = SimpleNamespace(
        encode=lambda text: SimpleNamespace(ids=[ord(c) for c in text]),
        decode_batch=lambda ids, skip_special_tokens: ["".join(map(chr, line)) for line in ids],
        get_vocab_size=lambda: 256,
    )
    text = "x" * 97
    with serving(giving(answer(NUMBERS))) as (url, asked):
        plain = wb.capture(url, text, out=tmp_path / "plain.json")
        known = wb.capture(url, text, out=tmp_path / "known.json", tokenizer=tokenizer)
    assert asked[0][1]["text"] == text and asked[1][1]["input_ids"] == [120] * 97
    assert wb.Trace.from_capture(plain, CONFIG).token_texts[:2] == ("[token 0]", "[token 1]")
    assert wb.Trace.from_capture(plain, CONFIG, prompt=text, tokenizer=tokenizer).token_texts == ("x",) * 97
    assert wb.Trace.from_capture(known, CONFIG).token_texts == ("x",) * 97
    with pytest.raises(InputError, match="exactly as it was sent"):
        wb.Trace.from_capture(plain, CONFIG, prompt=text[1:], tokenizer=tokenizer)


def test_a_transcript_is_sent_as_its_text(tmp_path):
    chat = parse_transcript('{"role": "user", "content": "Hello"}')
    with serving(giving(answer(NUMBERS))) as (url, asked):
        wb.capture(url, chat, out=tmp_path / "c.json")
    assert asked[0][1]["text"] == "user: Hello\nassistant:"


def test_generated_tokens_are_there_but_the_last(tmp_path):
    told = answer(NUMBERS, prompt_tokens=95, completion_tokens=3) | {"output_ids": [4, 5, 6]}
    trace = wb.Trace.from_capture(written(tmp_path, told), CONFIG, prompt=list(range(95)))
    assert trace.prompt_length == 95 and trace.token_ids[-3:].tolist() == [94, 4, 5] and len(trace.token_texts) == 97


def test_npy_inside_base64_is_read_too(tmp_path):
    file = io.BytesIO()
    np.save(file, NUMBERS.astype(np.int32))
    told = {"choices": [{"indexer_topk": base64.b64encode(file.getvalue()).decode(), "text": 'a "indexer_topk": "trap'}]}
    trace = wb.Trace.from_capture(written(tmp_path, told), CONFIG)
    np.testing.assert_array_equal(trace.layers[1].selected, NUMBERS[:, 1])


def test_text_that_looks_like_the_field_is_not_taken_for_it(tmp_path):
    told = {"text": '"indexer_topk": "AAAA"', '"indexer_topk': "BBBB"} | answer(NUMBERS)
    np.testing.assert_array_equal(wb.Trace.from_capture(written(tmp_path, told), CONFIG).layers[0].selected, NUMBERS[:, 0])


def changed(**places: int) -> np.ndarray:
    numbers = NUMBERS.copy()
    for place, value in places.items():
        numbers[tuple(map(int, place[1:].split("_")))] = value
    return numbers


WRONG = {
    "no selections": ({"text": "hi", "meta_info": {"prompt_tokens": 3}}, "--enable-return-indexer-topk"),
    "null": (answer(NUMBERS, indexer_topk=None), "--enable-return-indexer-topk"),
    "another top-k": (answer(NUMBERS[:, :, :4]), "2 layers that choose 5 entries"),
    "another layer count": (answer(NUMBERS, indexer_topk_num_layers=21), "2 layers that choose"),
    "another length": (answer(NUMBERS, prompt_tokens=50), "50 tokens"),
    "a cache slot": (answer(changed(_90_0_1=4096)), "selects entry 4096, of which 22 were complete"),
    "the future": (answer(changed(_40_1_0=10)), "layer 3 token 40 selects entry 10, of which 10"),
    "below -1": (answer(changed(_40_1_0=-2)), "selects entry -2"),
    "never recorded": (answer(changed(_90_0_0=0, _90_0_1=0)), "token 90 selects an entry twice"),
    "no base64": (answer(NUMBERS, indexer_topk="*" * 4 * 97 * 10), "no base64"),
    "cut off": (answer(NUMBERS, indexer_topk="AAA"), "cut off"),
    "empty": (answer(NUMBERS, indexer_topk=""), "cut off"),
    "two prompts": ([answer(NUMBERS), answer(NUMBERS)], "2 prompts"),
    "a later version": ({"format": "workbench-capture", "version": 9, "answer": answer(NUMBERS)}, "version 9"),
    "ids of another kind": ({"token_ids": ["a"], "answer": answer(NUMBERS)}, "lists of whole numbers"),
    "a strange shape": ({"shape": 7, "answer": answer(NUMBERS)}, "a shape is"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_capture_that_cannot_be_right_is_refused(tmp_path, name):
    told, said = WRONG[name]
    with pytest.raises(InputError, match=said.replace("[", r"\[")):
        wb.Trace.from_capture(written(tmp_path, told), CONFIG)


@pytest.mark.parametrize("content", [b"", b"<html>", b'{"meta_info": {"indexer_topk": "AAAA', b"[" * 100_000])
def test_a_file_that_is_no_answer_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError):
        wb.Trace.from_capture(path, CONFIG)


def test_the_preset_that_fits_is_named(tmp_path):
    numbers = np.full((8, 21, 512), -1, np.int32)
    path = written(tmp_path, answer(numbers))
    with pytest.raises(InputError, match=r"no capture of v3.2.*fits preset 'v4-flash'"):
        wb.Trace.from_capture(path, "v3.2")
    with pytest.raises(InputError, match=r"say preset=.*fits preset 'v4-flash'"):
        wb.Trace.from_capture(path)
    assert [x.layer for x in wb.Trace.from_capture(path, "V4 Flash").layers] == list(range(2, 43, 2))
    fewer = written(tmp_path, answer(numbers[:, :, :256]))
    with pytest.raises(InputError, match="of your own if it was started with another top-k"):
        wb.Trace.from_capture(fewer, "v4-flash")
    mine = replace(wb.presets["v4-flash"], config=replace(wb.presets["v4-flash"].config, index_topk=256))
    assert wb.Trace.from_capture(fewer, mine).layers[0].selected.shape == (8, 256)
    path = written(tmp_path, answer(numbers))
    with pytest.raises(InputError, match="V3.2"):
        wb.Trace.from_capture(path, "v4.1-flash")
    with pytest.raises(InputError, match="layers that choose are"):
        wb.Trace.from_capture(path, "v4-flash", layers=[3])


def test_large_layers_are_mapped_once_and_refused_where_they_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(captures, "MEMORY_BYTES", 0)
    monkeypatch.setattr(captures, "PIECE_BYTES", 400)
    path = written(tmp_path, answer(NUMBERS))
    trace = wb.Trace.from_capture(path, CONFIG)
    assert isinstance(trace.layers[0].selected, np.memmap)
    np.testing.assert_array_equal(trace.layers[1].selected, NUMBERS[:, 1])
    monkeypatch.setattr(captures, "_fill", lambda *_: pytest.fail("decoded a second time"))
    np.testing.assert_array_equal(wb.Trace.from_capture(path, CONFIG).layers[0].selected, NUMBERS[:, 0])
    monkeypatch.undo()
    monkeypatch.setattr(captures, "MEMORY_BYTES", 0)
    os.utime(path, ns=(1, 1))  # another capture of that name
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=97 * 5 * 4 + 10))
    with pytest.raises(InputError, match=r"2 layers of 97 tokens.*layers=\(1,\)"):
        wb.Trace.from_capture(path, CONFIG)
    assert [x.layer for x in wb.Trace.from_capture(path, CONFIG, layers=[1]).layers] == [1]


def test_a_damaged_capture_leaves_no_files_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(captures, "MEMORY_BYTES", 0)
    with pytest.raises(InputError):
        wb.Trace.from_capture(written(tmp_path, answer(changed(_90_0_1=4096))), CONFIG)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".part", ".npy")]


def test_128k_tokens_take_memory_for_the_chosen_layer_only(tmp_path):
    import tracemalloc

    tokens, topk = 131_072, 8
    config = replace(CONFIG, index_topk=topk)
    closed = (np.arange(tokens) + 1) // 4
    recent = closed[:, None] - 1 - np.arange(topk)
    numbers = np.where(recent >= 0, recent, -1).astype(np.int32)[:, None].repeat(2, 1)
    path = written(tmp_path, answer(numbers))
    tracemalloc.start()
    trace = wb.Trace.from_capture(path, config, layers=[3])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(trace.layers[0].selected, numbers[:, 1])
    held = trace.layers[0].selected.nbytes
    assert peak < held + 4 * captures.PIECE_BYTES + 40e6  # the texts and ids of 131,072 tokens beside them


# What can go wrong with a server.

SAID = {
    "an error": (
        giving({"error": {"message": "too long \x1b[31m\u202e <b>"}}, 400),
        r"refused \(400\): 'too long \\x1b\[31m\\u202e <b>'",
    ),
    "plain text": (giving(b"no such page", 404), r"refused \(404\): 'no such page'"),
    "no JSON": (giving(b"<html>"), "not the JSON"),
    "nothing selected": (giving({"text": "x", "meta_info": {}}), "--enable-return-indexer-topk"),
    "a redirect": (lambda h, _: h.say(b"", 302, Location="http://example.com/"), "redirects to 'http://example.com/'"),
    "half an answer": (lambda h, _: h.say(b'{"meta', length=100), "broke off"),
    "a trickle": (trickling(20.0), "within 0.3 s"),
    "silence": (lambda h, _: time.sleep(1.0), "within 0.3 s"),
    "a header without end": (dripping(b"HTTP/1.0 200 OK\r\nX: ", 3.0), "within 0.3 s"),
    "an error without end": (dripping(b"HTTP/1.0 500 No\r\n\r\n", 3.0), "within 0.3 s"),
    "another protocol": (lambda h, _: h.wfile.write(b"SSH-2.0-x\r\n"), "cannot be reached: SSH"),
    "a dropped connection": (lambda h, _: None, "cannot be reached"),
}


@pytest.mark.parametrize("name", SAID)
def test_a_server_that_fails_is_one_clear_error_and_leaves_no_file(tmp_path, name):
    act, said = SAID[name]
    with serving(act) as (url, asked), pytest.raises(WorkbenchError, match=said):
        wb.capture(url, "hello", out=tmp_path / "c.json", timeout_s=0.3 if "within" in said else 30.0)
    assert len(asked) == 1 and not list(tmp_path.iterdir())


def test_an_answer_larger_than_allowed_is_not_read_on(tmp_path):
    with serving(giving(answer(NUMBERS))) as (url, _), pytest.raises(WorkbenchError, match="more than 1,000 bytes"):
        wb.capture(url, "hello", out=tmp_path / "c.json", max_bytes=1000)
    assert not list(tmp_path.iterdir())


def test_another_model_is_told_before_the_file_is_kept(tmp_path):
    with serving(giving(answer(NUMBERS))) as (url, _), pytest.raises(InputError, match="no capture of v4-flash"):
        wb.capture(url, "hello", out=tmp_path / "c.json", preset="v4-flash")
    assert not list(tmp_path.iterdir())


def test_nobody_listening_and_the_key_stays_out_of_the_file(tmp_path):
    with serving(giving(answer(NUMBERS))) as (url, asked):
        file = wb.capture(url, "hello", out=tmp_path / "c.json", api_key="secret-key")
    assert asked[0][2] == "Bearer secret-key" and b"secret-key" not in file.read_bytes()
    with pytest.raises(WorkbenchError, match="cannot be reached"):
        wb.capture(url, "hello", out=tmp_path / "d.json", timeout_s=5.0)
    with pytest.raises(InputError, match="exists"):
        wb.capture(url, "hello", out=file)


def test_no_proxy_and_no_other_address_is_contacted(tmp_path, monkeypatch):
    with serving(giving(b"proxied", 500)) as (proxy, proxied), serving(giving(answer(NUMBERS))) as (url, asked):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        wb.capture(url, "hello", out=tmp_path / "c.json")
    assert len(asked) == 1 and not proxied


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("file:///etc/passwd", "x"), "no http or https"),
        (("localhost:30000", "x"), "no http or https"),
        (("http://", "x"), "no http or https"),
        (("http://me:pw@host", "x"), "api_key="),
        (("http://host/a b", "x"), "space"),
        ((None, "x"), "no"),
        (("http://host:99999999", "x"), "no address"),
        (("http://host", ""), "empty"),
        (("http://host", []), "at least one"),
        (("http://host", [1, "a"]), "whole numbers"),
        (("http://host", b"bytes"), "whole numbers"),
        (("http://host", [2**31]), "31 bits"),
        (("http://host", "half \ud83d"), "half a character"),
        (("http://host:0", "x"), "no address"),  # would ask port 80
        (("http://[v1.host]", "x"), "no address"),
        (("http://a..b", "x"), "no name of a host"),
        (("http://" + "a" * 64, "x"), "no name of a host"),
        (("http://host/\u00e9", "x"), "%XX"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_anything_is_sent(tmp_path, arguments, said):
    with pytest.raises(InputError, match=said):
        wb.capture(*arguments, out=tmp_path / "c.json")


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout_s": "3"},
        {"timeout_s": None},
        {"timeout_s": float("nan")},
        {"timeout_s": 1e12},
        {"max_bytes": None},
        {"max_bytes": 0},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"api_key": "a\nb"},
        {"api_key": "\u043a"},
        {"out": 5},
        {"out": "a\0b"},
        {"tokenizer": 5},
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_anything_is_sent(tmp_path, settings):
    with serving(giving(answer(NUMBERS))) as (url, asked), pytest.raises(InputError) as error:
        wb.capture(url, "hello", **({"out": tmp_path / "c.json"} | settings))
    assert not asked and "\n" not in str(error.value)


@pytest.mark.parametrize("layers", [1, "1", [[1]], [1, "a"], [1.0], [None], []])
def test_layers_that_are_no_list_of_numbers_are_refused(tmp_path, layers):
    with pytest.raises(InputError, match="the layers that choose are"):
        wb.Trace.from_capture(written(tmp_path, answer(NUMBERS)), CONFIG, layers=layers)
    with pytest.raises(InputError, match="must be a path"):
        wb.Trace.from_capture(None, CONFIG)


def test_a_captured_transcript_keeps_its_roles_and_split_characters_their_shape(tmp_path):
    model = wb.load("tiny-v4")
    chat = Transcript((("system", "Be short."), ("user", "\U0001f511 key?"), ("assistant calls find", "{}")))
    ids = model.tokenizer.encode(chat.text).ids
    numbers = np.full((len(ids), 2, 5), -1, np.int32)
    with serving(giving(answer(numbers))) as (url, asked):
        file = wb.capture(url, chat, tokenizer=model.tokenizer, out=tmp_path / "c.json")
    assert asked[0][1]["input_ids"] == ids
    for trace in (
        wb.Trace.from_capture(file, CONFIG),
        wb.Trace.from_capture(written(tmp_path, answer(numbers)), CONFIG, prompt=chat, tokenizer=model.tokenizer),
    ):
        assert [role for role, *_ in trace.notes["roles"]][:3] == ["system", "user", "assistant calls find"]
        page = text_view(trace, 1, "max", len(ids) - 1)
        assert all(role in page for role in (">system<", ">user<", ">assistant calls find<")) and "\U0001f511" in page


def test_import_reads_a_capture(capsys, tmp_path):
    numbers = np.full((8, 21, 512), -1, np.int32)
    numbers[7, :, 0] = 0
    path = written(tmp_path, answer(numbers))
    assert cli.main(["import", str(path), "--preset", "v4-flash", "--layers", "2", "4"]) == 0
    out = capsys.readouterr().out
    assert "DeepSeek-V4-Flash" in out and "no probabilities" in out and "layer   4 CSA: at the end 1 of 2 entries" in out
    assert cli.main(["import", str(path)]) == 2 and "say preset=" in capsys.readouterr().err
