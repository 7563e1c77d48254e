"""A model whose Engram rows live in files computes what it did with rows of its own."""

from __future__ import annotations

import os
import sys

import pytest
import torch

import workbench as wb
from tests.slow_reference import random_ids
from workbench.errors import InputError, WorkbenchError
from workbench.memory.rows import TableSource
from workbench.model.engram import HostTable, table_path, use_tables, write_tables


@pytest.fixture(params=["tiny-v4-engram", "tiny-v41"])
def model(request):
    return wb.load(request.param, device="cpu")


@pytest.mark.parametrize("settings", [{}, {"hot_rows": 300}, {"in_memory": True}], ids=["mapped", "hot rows", "in memory"])
def test_logits_are_the_same_bit_for_bit(model, tmp_path, settings):
    ids = random_ids(model.config, 1, 90)
    with torch.inference_mode():
        expected = model(ids)
        paths = write_tables(model, tmp_path / "rows")
        assert paths == [table_path(tmp_path / "rows", layer) for layer in model.config.engram.layer_ids]
        use_tables(model, tmp_path / "rows", **settings)
        for policy in ("prefetch", "serial", "resident"):
            assert torch.equal(model(ids, prefetch=policy), expected)
        cache = model.new_cache()
        pieces = [model(piece, cache) for piece in ids.split([50, 1, 39], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=1e-5)


def test_rows_rounded_to_fp8_change_logits_a_little(model, tmp_path):
    ids = random_ids(model.config, 1, 60)
    with torch.inference_mode():
        expected = model(ids)
        write_tables(model, tmp_path, dtype="fp8")
        use_tables(model, tmp_path)
        changed = (model(ids) - expected).abs()
    assert 0 < float(changed.mean()) < 0.2


def test_a_table_that_does_not_fit_leaves_the_model_as_it_was(model, tmp_path):
    layer = model.config.engram.layer_ids[-1]
    with pytest.raises(InputError, match="engram-layer"):
        use_tables(model, tmp_path)  # nothing there
    write_tables(model, tmp_path)
    path = table_path(tmp_path, layer)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut short"):
        use_tables(model, tmp_path)
    path.unlink()
    wb.EngramTable.create(path, 11, 7).close()
    with pytest.raises(InputError, match="11 rows of 7 values"):
        use_tables(model, tmp_path)
    assert all(isinstance(model.blocks[i].engram.table, HostTable) for i in model.config.engram.layer_ids)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets nobody cut an open mapped file")
def test_a_file_cut_short_under_a_model_is_an_error_that_names_layer_and_file(model, tmp_path):
    ids = random_ids(model.config, 1, 30)
    write_tables(model, tmp_path)
    use_tables(model, tmp_path)
    layer = model.config.engram.layer_ids[0]
    os.truncate(table_path(tmp_path, layer), 8192)
    for policy in ("prefetch", "serial", "resident"):
        with torch.inference_mode(), pytest.raises(WorkbenchError, match=f"layer {layer} could not be.*cut short since"):
            model(ids, prefetch=policy)


def test_a_copy_of_all_rows_is_made_once(model, tmp_path):
    write_tables(model, tmp_path)
    use_tables(model, tmp_path, hot_rows=50)
    source = model.blocks[model.config.engram.layer_ids[0]].engram.table
    held = source.resident(torch.device("cpu"))
    assert source.resident(torch.device("cpu")) is held and torch.equal(held, source.weight)
    assert source.table.counts.asked == len(held)  # weight went past the cache


def test_a_model_that_reads_from_files_is_saved_with_its_rows(model, tmp_path):
    ids = random_ids(model.config, 1, 30)
    write_tables(model, tmp_path / "rows")
    use_tables(model, tmp_path / "rows")
    assert any(isinstance(module, TableSource) for module in model.modules())
    from workbench import checkpoint

    checkpoint.save(model, tmp_path / "saved")
    with torch.inference_mode():
        assert torch.equal(wb.load(tmp_path / "saved", device="cpu")(ids), model(ids))


def test_models_without_engram_have_no_tables(tmp_path):
    model = wb.load("tiny-v4", device="cpu")
    for act in (write_tables, use_tables):
        with pytest.raises(InputError, match="no Engram"):
            act(model, tmp_path)
