"""The bars on speed and memory, with room for a busy machine; ``workbench bench attention`` measures them properly."""

import pytest
import torch

from benchmarks import attention as bench

CPU = torch.device("cpu")


def test_the_work_of_a_prefill_grows_with_what_is_seen_and_that_of_a_token_is_counted():
    model = bench.make(CPU, "fp32")
    first, later = bench.prefill_flops(model, 0), bench.prefill_flops(model, 16384)
    # What is added are index scores of two CSA layers and the entries of all four; one more window's worth is seen besides.
    scores = 2 * 1024 * 4096 * 2 * bench.CONFIG.index_n_heads * (bench.CONFIG.index_head_dim + 1)
    assert first < later and scores < later - first < 1.3 * scores
    with torch.inference_mode():
        moved, operations = bench.decode_work(model, 16384)
    assert 10e6 < moved < 60e6
    assert operations < 700  # this is what decoding costs; it was 1,074 with the general forms (model/one_token.py)


@pytest.mark.slow
def test_prefill_and_decode_are_faster_than_transformers_and_decode_hardly_slows_with_length(transformers_oracle):
    ours = bench.make(CPU, "fp32")
    with torch.inference_mode():
        speed = bench.speed(ours, bench.their_model(ours), 16384, 2)
        growth = bench.growth(ours, 4096, 65536)
    assert speed["prefill ratio"] > 3 and speed["decode ratio"] > 2 and growth["ratio"] < 2


@pytest.mark.slow
def test_memory_grows_linearly_and_a_long_recorded_run_is_small():
    found = bench.memory(1)
    assert found["ratio"] < bench.BARS["peak growth"]
    assert found["recorded run bytes"] < bench.BARS["recorded GB"] * 1e9
