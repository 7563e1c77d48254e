"""Saved traces: they load equal, and whatever else lies in a folder is refused in one line, before it can do harm."""

import dataclasses
import io
import json
import random
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.synthetic import synthetic_trace
from tests.test_trace import assert_same
from workbench.decoded import decoded
from workbench.errors import InputError
from workbench.figures.query import query_strip
from workbench.figures.text import text_view
from workbench.trace import Timeline, Trace
from workbench.trace_files import ARRAYS_FILE, MANIFEST_FILE, MAX_BYTES, shipped_traces


@pytest.fixture(scope="module")
def trace() -> Trace:
    return dataclasses.replace(synthetic_trace(61, needle=13), notes={"seed": 3, "topk": None, "text": "Ж\u2028<b>"})


@pytest.fixture
def folder(trace: Trace, tmp_path: Path) -> Path:
    return trace.save(tmp_path / "trace")


def refused(folder: Path) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(InputError) as error:
        Trace.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))


def rewrite(folder: Path, manifest: dict[str, Any]) -> Path:
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return folder


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / ARRAYS_FILE) as stored:
        return dict(stored)


def test_a_saved_trace_loads_equal(trace, folder):
    again = Trace.load(folder)
    assert_same(again, dataclasses.replace(trace, config=json.loads(json.dumps(trace.config))))
    assert again.origin == again.timeline.origin == "recorded" and {s.origin for s in again.timeline.spans} == {"recorded"}
    assert sorted(path.name for path in folder.iterdir()) == [ARRAYS_FILE, MANIFEST_FILE]
    assert_same(Trace.load(again.save(folder)), again)  # and once more, over itself


def test_what_was_modelled_stays_modelled_and_nothing_loaded_counts_as_measured(trace, folder, tmp_path):
    spans = tuple(dataclasses.replace(span, origin="modelled") for span in trace.timeline.spans)
    modelled = dataclasses.replace(trace, origin="modelled", timeline=Timeline("modelled", spans))
    again = Trace.load(modelled.save(tmp_path / "modelled"))
    assert {again.origin, again.timeline.origin, *(s.origin for s in again.timeline.spans)} == {"modelled"}
    assert Trace.load(rewrite(folder, manifest_of(folder) | {"origin": "measured"})).origin == "recorded"


def test_a_half_saved_trace_keeps_the_rest_exact_and_scores_to_a_thousandth(trace, tmp_path):
    again = Trace.load(trace.save(tmp_path / "half", half=True))
    assert (tmp_path / "half" / ARRAYS_FILE).stat().st_size < (trace.save(tmp_path / "full") / ARRAYS_FILE).stat().st_size
    for one, other in zip(trace.layers, again.layers, strict=True):
        for f in dataclasses.fields(one):
            if not f.name.startswith("index_"):
                assert_same(getattr(one, f.name), getattr(other, f.name), f.name)
        if one.kind == "csa":
            assert other.index_keys.dtype == np.float16
            for t in (3, 30, 60):
                np.testing.assert_allclose(
                    other.index_scores(t), one.index_scores(t), atol=1e-3 * np.abs(one.index_scores(t)).max()
                )


def test_an_empty_trace_survives(tmp_path):
    empty = Trace("model", "what", "cpu", {}, np.zeros(0, np.int32), (), 0)
    assert_same(Trace.load(empty.save(tmp_path)), empty)


def test_saving_into_a_file_is_refused(trace, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file; give a folder"):
        trace.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("missing", [MANIFEST_FILE, ARRAYS_FILE, "both"])
def test_what_is_no_trace_folder_is_refused(folder, missing):
    for name in (MANIFEST_FILE, ARRAYS_FILE):
        if missing in (name, "both"):
            (folder / name).unlink()
    assert "no saved trace" in refused(folder)


def test_paths_that_are_no_folder_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "no saved trace" in refused(tmp_path / "file")
    assert "no saved trace" in refused(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no trace 'nowhere': give a folder"):
        Trace.load("nowhere")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", [MANIFEST_FILE, ARRAYS_FILE])
def test_truncated_files_are_refused(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    refused(folder)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("name", [MANIFEST_FILE, ARRAYS_FILE])
def test_damaged_bytes_are_refused_or_harmless_and_never_crash(folder, name, seed):
    """Any other exception fails this test. A flip in a text may pass unseen; arrays carry check sums."""
    draw, content = random.Random(seed), bytearray((folder / name).read_bytes())
    for _ in range(draw.choice([1, 1, 3, 50])):
        content[draw.randrange(len(content))] = draw.randrange(256)
    (folder / name).write_bytes(content)
    try:
        loaded = Trace.load(folder)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert loaded.length == 61


def test_a_flipped_bit_inside_the_compressed_data_is_noticed(folder):
    content = bytearray((folder / ARRAYS_FILE).read_bytes())
    with zipfile.ZipFile(folder / ARRAYS_FILE) as stored:
        large = max(stored.infolist(), key=lambda info: info.compress_size)
    for offset in (40, 200, 1000):
        flipped = bytearray(content)
        flipped[large.header_offset + 60 + offset] ^= 0x10
        (folder / ARRAYS_FILE).write_bytes(flipped)
        refused(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "3",
        '"trace"',
        "{}",
        "{",
        "[" * 100_000,
        '{"format": "other"}',
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
def test_a_foreign_manifest_is_refused(folder, content):
    (folder / MANIFEST_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(folder)


def test_another_version_is_refused(folder):
    assert "version 1" in refused(rewrite(folder, manifest_of(folder) | {"version": 2}))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"\x80\x04\x95junk.", b"x" * 5000])
def test_foreign_arrays_are_refused(folder, content):
    (folder / ARRAYS_FILE).write_bytes(content)
    refused(folder)


def test_a_single_numpy_array_in_place_of_the_archive_is_refused(folder):
    with (folder / ARRAYS_FILE).open("wb") as out:
        np.save(out, np.zeros(3))
    refused(folder)


class Bomb:
    """An object whose unpickling would be noticed."""

    went_off = False

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return set_off, ()


def set_off() -> None:
    Bomb.went_off = True


def test_pickled_objects_are_never_opened(folder):
    arrays = arrays_of(folder) | {"token_ids": np.array([Bomb()] * 61, object)}
    np.savez(folder / ARRAYS_FILE, **arrays)
    manifest = manifest_of(folder)
    for declared in (manifest["arrays"]["token_ids"], ["object", [61]], ["O", [61]]):
        manifest["arrays"]["token_ids"] = declared
        refused(rewrite(folder, manifest))
    assert not Bomb.went_off


def test_a_manifest_that_asks_for_too_much_is_refused_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_a, **_k: pytest.fail("the arrays were opened"))
    manifest = manifest_of(folder)
    for shape in ([MAX_BYTES], [2**40, 2**40], [2**62, 4], [-1, 5], [2**64], [1e300], ["5"], [None]):
        manifest["arrays"]["token_ids"] = ["int32", shape]
        refused(rewrite(folder, manifest))


def npz(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return out.getvalue()


def npy(shape: tuple[int, ...], dtype: str, data: bytes) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue() + data


def test_a_zip_bomb_is_refused_before_it_unfolds(folder):
    """A member far larger than the manifest says is not even begun."""
    members = {name: npy(a.shape, a.dtype.str, a.tobytes()) for name, a in arrays_of(folder).items()}
    members["next_ids"] = npy((30_000_000,), "<i4", bytes(120_000_000))
    (folder / ARRAYS_FILE).write_bytes(npz(members))
    assert (folder / ARRAYS_FILE).stat().st_size < 1_000_000
    assert "differs from its manifest" in refused(folder)


@pytest.mark.parametrize("honest", [True, False])
def test_a_header_that_promises_more_than_the_file_holds_is_refused_without_allocating(folder, honest):
    """numpy would set aside gigabytes for the promised shape before it noticed."""
    members = {name: npy(a.shape, a.dtype.str, a.tobytes()) for name, a in arrays_of(folder).items()}
    members["next_ids"] = npy((2_000_000_000,), "<i4", bytes(64))
    (folder / ARRAYS_FILE).write_bytes(npz(members))
    manifest = manifest_of(folder)
    if honest:  # the manifest tells the same lie, below the limit
        manifest["arrays"]["next_ids"] = ["int32", [2_000_000_000]]
    tracemalloc.start()
    refused(rewrite(folder, manifest))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000


@pytest.mark.parametrize("change", ["missing", "extra", "dtype", "shape", "renamed"])
def test_arrays_that_differ_from_the_manifest_are_refused(folder, change):
    arrays = arrays_of(folder)
    if change == "missing":
        del arrays["layer.1.selected"]
    elif change == "extra":
        arrays["layer.9.selected"] = np.zeros(3)
    elif change == "dtype":
        arrays["layer.1.selected"] = arrays["layer.1.selected"].view(np.uint32)
    elif change == "shape":
        arrays["layer.1.selected"] = arrays["layer.1.selected"].T
    else:
        arrays["layer.1.chosen"] = arrays.pop("layer.1.selected")
    np.savez(folder / ARRAYS_FILE, **arrays)
    refused(folder)


def resave(folder: Path, arrays: dict[str, np.ndarray], **plain: Any) -> Path:
    """A folder whose manifest and arrays agree with each other, whatever they say."""
    np.savez(folder / ARRAYS_FILE, **arrays)
    declared = {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()}
    return rewrite(folder, manifest_of(folder) | {"arrays": declared} | plain)


@pytest.mark.parametrize(
    "plain",
    [
        {"prompt_length": -1},
        {"prompt_length": 62},
        {"prompt_length": "many"},
        {"token_texts": ["too few"]},
        {"token_texts": None},
        {"layers": [{"layer": 0}]},
        {"layers": [{"layer": 0, "kind": "csa", "ratio": 4, "colour": "red"}]},
        {"layers": [{"layer": 0, "kind": "dense", "ratio": 0}]},
        {"layers": [{"layer": 0, "kind": "csa", "ratio": 4}]},
        {"layers": [{"layer": 0, "kind": "window", "ratio": 4}]},
        {"layers": 5},
        {"timeline": {"device": "x"}, "spans": [[1]]},
        {"timeline": {"colour": "x"}},
        {"spans": []},
        {"engram": [{}]},
    ],
)
def test_a_manifest_with_impossible_values_is_refused(folder, plain):
    refused(resave(folder, arrays_of(folder), **plain))


@pytest.mark.parametrize(
    "name", ["layer.1.selected", "layer.2.entry_probs", "layer.0.sink_probs", "engram.0.gates", "layer.0.window_probs"]
)
def test_rows_for_another_number_of_tokens_are_refused(folder, name):
    arrays = arrays_of(folder)
    arrays[name] = arrays[name][:-1]
    assert "rows for 61 tokens" in refused(resave(folder, arrays))


def changed(array: np.ndarray, how: str) -> np.ndarray:
    if how == "not finite":
        array = array.copy()
        array.flat[-1] = np.nan
        return array
    return {"short": array[:-1], "deeper": array[..., None], "text": array.astype("U8"), "complex": array.astype(complex)}[how]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, how) for name in ("step_starts", "cache_reserved", "cache.window") for how in ("short", "deeper", "text")),
        *((name, "complex") for name in ("token_ids", "top_probs", "next_ids", "layer.1.index_queries", "engram.0.rows")),
        ("layer.1.selected_probs", "not finite"),
        ("layer.2.entry_probs", "not finite"),
        ("layer.1.selected_scores", "deeper"),
        ("layer.1.index_keys", "short"),
        ("layer.1.index_keys", "not finite"),
        ("top_probs", "not finite"),
        ("span.times", "not finite"),
    ],
)
def test_arrays_that_no_figure_could_draw_are_refused(folder, name, how):
    arrays = arrays_of(folder)
    arrays[name] = changed(arrays[name], how)
    assert "damaged" not in refused(resave(folder, arrays))


def test_entries_that_are_not_there_and_steps_out_of_order_are_refused(folder):
    arrays = arrays_of(folder)
    beyond = arrays["layer.1.selected"].copy()
    beyond[60, 0] = 15  # entries 0..14
    assert "beyond its 15" in refused(resave(folder, arrays | {"layer.1.selected": beyond}))
    assert "one after the other" in refused(resave(folder, arrays | {"step_starts": arrays["step_starts"][::-1].copy()}))
    manifest = manifest_of(resave(folder, arrays))
    manifest["layers"][1]["layer"] = 0
    assert "each layer once" in refused(rewrite(folder, manifest))
    assert "model of a trace is text" in refused(resave(folder, arrays, model=["x"]))
    for timeline in ({"origin": 5}, {"origin": "guessed"}, {"device": None}):
        said = {"origin": "measured", "device": "", "note": ""} | timeline
        assert "whole steps and an origin" in refused(resave(folder, arrays, model="m", timeline=said))


def test_half_a_character_in_a_text_is_kept_and_what_json_cannot_hold_leaves_the_earlier_trace(trace, tmp_path):
    odd = dataclasses.replace(trace, token_texts=("\ud83d", "\x00", *trace.token_texts[2:]))
    folder = odd.save(tmp_path / "odd")
    assert Trace.load(folder).token_texts == odd.token_texts
    with pytest.raises(InputError, match="plain values in notes"):
        dataclasses.replace(trace, notes={"a": {1, 2}}).save(folder)
    assert Trace.load(folder).token_texts == odd.token_texts


@pytest.mark.parametrize("texts", [("a",) * 60, (None,) * 62, ("a",) * 60 + (b"b",)])
def test_a_trace_made_by_hand_without_a_text_for_each_token_is_told_so(trace, texts, tmp_path):
    odd = dataclasses.replace(trace, token_texts=texts)
    for look in (
        lambda: query_strip(odd, 1, 60),
        lambda: text_view(odd, 1, "max", 30),
        lambda: decoded(odd).find("a"),
    ):
        with pytest.raises(InputError, match="a text for each; that of token"):
            look()
    if b"b" not in texts:
        refused(odd.save(tmp_path / "odd"))


@pytest.mark.parametrize("path", [None, 5, b"x", "a\0b", ""])
def test_what_is_no_path_is_refused(trace, path):
    for act in (Trace.load, trace.save):
        with pytest.raises(InputError, match="must be a path"):
            act(path)


def test_spans_that_run_backwards_are_refused(folder):
    arrays = arrays_of(folder)
    arrays["span.times"] = arrays["span.times"][:, ::-1].copy()
    refused(resave(folder, arrays))


def test_a_failed_save_leaves_the_earlier_trace(trace, folder, monkeypatch):
    def full(*_a: Any, **_k: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        trace.save(folder)
    monkeypatch.undo()
    assert Trace.load(folder).length == 61


def test_shipped_recordings_are_found_by_how_their_names_begin(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.trace_files.SHIPPED", tmp_path)
    assert shipped_traces() == ()
    for name in ("cuda-b", "cuda-a", "needle", "[x]"):
        synthetic_trace(11).save(tmp_path / name)
    (tmp_path / "cuda-empty").mkdir()
    assert shipped_traces("cuda") == ("cuda-a", "cuda-b") and shipped_traces("[") == ("[x]",)
    assert [Trace.load(name).length for name in shipped_traces()] == [11] * 4
