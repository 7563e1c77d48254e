"""What a packed KV cache costs a model, held against reading the same text through caches by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.checkpoint import load
from workbench.cost import kv_bytes
from workbench.errors import InputError
from workbench.training import tasks
from workbench.training.score import storage_cost

FEW = {"windows": 3, "streams": 2, "length": 128}


@pytest.fixture(scope="module")
def model():
    return load("tiny-v4", device="cpu")


def test_loss_and_divergence_are_those_of_token_by_token_reading(model):
    found = storage_cost(model, **FEW)
    text = np.asarray(model.tokenizer.encode(tasks.heldout_sample()).ids)
    starts = np.linspace(0, len(text) - 129, 3).astype(int)
    logs = {}
    for storage in ("fp32", "released"):
        rows = []
        for start in starts:
            cache = model.new_cache(storage=storage)
            with torch.inference_mode():
                rows.append(torch.cat([model(torch.tensor([[int(i)]]), cache)[0] for i in text[start : start + 128]]))
        logs[storage] = torch.stack(rows).double().log_softmax(-1).numpy()
        followed = np.stack([text[s + 1 : s + 129] for s in starts])[..., None]
        assert found["loss"][storage] == pytest.approx(-np.take_along_axis(logs[storage], followed, 2).mean(), abs=2e-3)
    exact, packed = logs["fp32"], logs["released"]
    assert found["kl"] == pytest.approx((np.exp(exact) * (exact - packed)).sum(-1).mean(), rel=0.3)
    assert found["changed"] == pytest.approx((exact.argmax(-1) != packed.argmax(-1)).mean(), abs=0.02)


def test_bytes_are_the_formulas_and_what_was_counted_is_said(model):
    found = storage_cost(model, "bf16", **FEW)
    assert found["kv_bytes"] == {s: kv_bytes(model.config, 128, s)["total"] for s in ("fp32", "bf16")}
    assert found["tokens"] == 3 * 128 and found["questions"] > 0 and found["storage"] == "bf16"
    assert "tiny-v4 (toy, trained), measured on" in found["label"]


def test_rougher_storage_differs_more_and_fp32_not_at_all(model):
    same, half, packed = (storage_cost(model, storage, **FEW) for storage in ("fp32", "bf16", "released"))
    assert same["kl"] == 0 == same["changed"] and 0 < half["kl"] < packed["kl"]
    assert same["loss"]["fp32"] == half["loss"]["fp32"] == packed["loss"]["fp32"]


def test_what_cannot_be_measured_is_one_clear_error(model):
    with pytest.raises(InputError, match="storage"):
        storage_cost(model, "fp7", **FEW)
    bare = load("tiny-v4", device="cpu")
    bare.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer"):
        storage_cost(bare)
