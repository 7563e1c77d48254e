"""Model folders that are unsound, foreign or too large are refused with the reason, and nothing in them is ever executed."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from tests.test_checkpoint import rewrite, same_weights, settings, stored, toy
from workbench import checkpoint
from workbench.checkpoint import load, save
from workbench.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(toy(), tmp_path / "toy", dtype=torch.float32)


def change(name: str, value: torch.Tensor | None):
    def damage(folder: Path) -> None:
        tensors = stored(folder)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
        rewrite(folder, tensors)

    return damage


def configure(**values):
    return lambda folder: (folder / "config.json").write_text(json.dumps(settings(folder) | values))


def text(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


def truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) - 7])


def renamed_pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"embed.weight": [1.0]}))


def renamed_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1.0]))


def index_to(target: object):
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embed.weight": target}}))

    return damage


def with_nan(name: str):
    def damage(folder: Path) -> None:
        tensors = stored(folder)
        tensors[name].view(-1)[1] = torch.nan
        rewrite(folder, tensors)

    return damage


EMBED, WQ_B = torch.zeros(31, 32), "layers.1.attn.wq_b.weight"
FP8_NAN = torch.full((24, 11), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (text("config.json", "{"), "cannot be read as JSON"),
        (text("config.json", "[" * 100000), "cannot be read as JSON"),
        (text("config.json", "[]"), "JSON object, got list"),
        (configure(model_type="gpt2"), "gpt2"),
        (configure(hidden_size=48), "do not match.*unfit: .*has shape"),
        (configure(hidden_size=10**9), "do not match.*unfit"),
        (configure(hidden_size=10**18), "no model that can be built"),
        (configure(hidden_size=32.5), "no model that can be built|wrong type"),
        (
            configure(num_hidden_layers=10**6, layer_types=["sliding_attention"] * 10**6, mlp_layer_types=["moe"] * 10**6),
            "shard",
        ),
        (change("embed.weight", None), "1 missing: embed.weight"),
        (change("layers.1.ffn.experts.2.w1.weight", None), "missing: layers.1.ffn.experts.2.w1.weight"),
        (change("layers.9.odd", EMBED), "1 unexpected: layers.9.odd"),
        (change("layers.1.attn.nothing.scale", EMBED), "unexpected: layers.1.attn.nothing.scale"),
        (change("embed.weight", EMBED[:30]), r"embed.weight has shape \[30, 32\] instead of \[31, 32\]"),
        (change("model.embed_tokens.weight", EMBED), "twice"),
        (change("embed.weight", EMBED.to(torch.float8_e4m3fn)), "F8_E4M3 without scales"),
        (change("embed.weight", EMBED.long()), "I64 without scales"),
        (change("layers.0.ffn.gate.tid2eid", torch.zeros(31, 2)), "tid2eid is stored as F32"),
        (change("layers.0.ffn.gate.tid2eid", torch.full((31, 2), 3)), r"experts 0\.\.2"),
        (change("embed.scale", torch.ones(1, 1)), "F32 with scales"),
        (with_nan("layers.1.attn.attn_sink"), "'layers.1.attn.attn_sink'.*NaN"),
        (with_nan("layers.2.ffn.experts.1.w2.weight"), "'layers.2.ffn.experts.1.w2.weight'.*NaN"),
        (lambda f: (change(WQ_B, FP8_NAN)(f), change("layers.1.attn.wq_b.scale", torch.ones(1, 1))(f)), f"'{WQ_B}'.*NaN"),
        (
            lambda f: (change(WQ_B, FP8_NAN)(f), change("layers.1.attn.wq_b.scale", torch.ones(5, 5))(f)),
            f"'{WQ_B}'.*do not tile",
        ),
        (configure(quantization_config={"weight_block_size": [0, 8]}), "weight_block_size"),
        (truncate, "damaged, truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged, truncated"),
        (text("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "damaged, truncated"),
        (renamed_pickle, "pickle or zip.*safetensors"),
        (renamed_zip, "pickle or zip.*safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pickled weights.*convert"),
        (lambda f: (f / "model.safetensors").unlink(), r"no \*.safetensors"),
        (index_to("../elsewhere.safetensors"), "lists '../elsewhere.safetensors'"),
        (index_to("/etc/passwd"), "lists '/etc/passwd'"),
        (index_to(7), "lists 7"),
        (index_to("absent.safetensors"), "lacks absent.safetensors"),
        (text("tokenizer.json", "{}"), "tokenizer.json cannot be read"),
    ],
)
def test_an_unsound_folder_is_refused_with_the_reason(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_a_long_list_of_problems_is_one_short_message(folder):
    tensors = {name.replace("layers.1", "layers.8"): tensor for name, tensor in stored(folder).items()}
    with pytest.raises(InputError) as refused:
        load(rewrite(folder, tensors))
    assert "missing" in str(refused.value) and "unexpected" in str(refused.value) and len(str(refused.value)) < 600


def test_a_pickle_is_never_executed(folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(InputError, match="never opened"):
            load(folder)
    assert not (tmp_path / "executed").exists()


def test_an_unknown_name_lists_what_ships(monkeypatch, tmp_path):
    save(toy(), tmp_path / "tiny-one")
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path)
    assert same_weights(load("tiny-one", dtype=torch.float32), load(tmp_path / "tiny-one"))
    with pytest.raises(InputError, match=r"'tiny-two'.*'tiny-one'"):
        load("tiny-two")


def test_a_model_that_does_not_fit_is_refused_with_both_numbers(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "available_bytes", lambda: 1e5)
    needed = sum(tensor.nbytes for tensor in toy().state_dict().values())
    with pytest.raises(InputError, match=rf"needs {needed / 1e6:.1f} MB of memory but 0.1 MB"):
        load(folder)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder):
    Tokenizer(models.WordLevel({"<unk>": 0, "far": 31}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match="token id 31.*31 tokens"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float32"])
def test_other_compute_dtypes_are_refused(folder, dtype):
    with pytest.raises(InputError, match="dtype must be one of"):
        load(folder, dtype=dtype)
