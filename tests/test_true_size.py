"""True-size layers, tested on presets shrunk to a few channels: what is filled, counted, stopped, saved, refused and timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench as wb
from tests.model.test_kv_cache import storage_bytes
from workbench import cost, true_size
from workbench.config import DenseConfig, LatentConfig, SharedStreamConfig
from workbench.errors import InputError
from workbench.measurements import ONE_LAYER, OVER_LAYERS, LayerMeasurement
from workbench.true_size import DECODE_ROOM, MAX_LENGTH, true_size_layer

FLASH = wb.presets["v4-flash"]
SMALL = replace(
    FLASH,
    config=replace(
        FLASH.config,
        hidden_size=52,
        num_attention_heads=3,
        head_dim=24,
        qk_rope_head_dim=6,
        q_lora_rank=19,
        o_groups=3,
        o_lora_rank=7,
        index_n_heads=5,
        index_head_dim=13,
        index_topk=11,
        sliding_window=17,
    ),
)
STREAM = replace(
    wb.presets["v4.1-flash"],
    config=SharedStreamConfig(
        vocab_size=7,
        hidden_size=52,
        num_attention_heads=6,
        head_dim=24,
        qk_rope_head_dim=6,
        q_lora_rank=19,
        o_groups=3,
        o_lora_rank=7,
        compress_ratios=(0, 2, 2, 1, 1, 1),
        kv_source_layer_ids=(1, 3),
        index_source_layer_ids=(1, 3, 5),
        candidate_source_layer_id=3,
        candidate_topk_blocks=5,
        candidate_block_size=4,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=3,
        index_n_heads=5,
        index_head_dim=13,
        index_topk=11,
        sliding_window=17,
        rms_norm_eps=1e-6,
    ),
)
LATENT = replace(
    wb.presets["v3.2"],
    config=LatentConfig(
        vocab_size=7,
        hidden_size=52,
        num_hidden_layers=4,
        num_attention_heads=3,
        q_lora_rank=19,
        kv_lora_rank=23,
        qk_nope_head_dim=7,
        qk_rope_head_dim=6,
        v_head_dim=5,
        intermediate_size=3,
        index_n_heads=5,
        index_head_dim=13,
        index_topk=11,
        n_routed_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=3,
        n_group=2,
        topk_group=1,
    ),
)
GQA, MHA = (
    replace(
        wb.presets[name],
        config=DenseConfig(
            vocab_size=7,
            hidden_size=52,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=kv_heads,
            head_dim=10,
            intermediate_size=3,
        ),
    )
    for name, kv_heads in (("gqa-8", 2), ("mha", 6))
)
KINDS = [
    *((SMALL, kind) for kind in ("window", "csa", "hca")),
    *((STREAM, kind) for kind in ("window", "csa2-full", "csa2-reindex", "csa2-reuse")),
    *((LATENT, kind) for kind in ("mla-dsa", "mla")),
    (GQA, "gqa"),
    (MHA, "mha"),
]
PRIMES = (1, 127, 401, 1031)


def layer(preset=SMALL, kind="csa", **settings):
    return true_size_layer(preset, kind, **{"dtype": torch.float32, "device": "cpu"} | settings)


def attend(made, cache, length):
    """Every layer's forward on the first ``length`` states at once; the last one's output."""
    x, at, output, handed_on = made._states(0, length), made.sublayer.positions(0, length), None, ()
    for i, attention in enumerate(made.sublayer.layers):
        output = attention(x, at, cache.layers[i] if cache else None, *(handed_on or ((None,) if made.sublayer.shares else ())))
        if made.sublayer.shares:
            output, *handed_on = output
    return output


def owner_of(preset, kind):
    """A preset of which the owner of the stream that ``kind`` reads is the first Full layer."""
    ratio = true_size.one_layer(preset, kind).compress_ratios[0]
    sources = [s for s in preset.config.kv_source_layer_ids if preset.config.compress_ratios[s] == ratio]
    assert sources
    ratios = (ratio,)
    source = 0 if preset.config.candidate_source_layer_id in sources else -1
    config = replace(
        preset.config,
        compress_ratios=ratios,
        kv_source_layer_ids=(0,),
        index_source_layer_ids=(0,),
        candidate_source_layer_id=source,
    )
    return replace(preset, config=config)


def contents(made):
    """Every value a cache holds, and its counts, in one list."""
    marks = [true_size._saved(store) for _, store in made._stores(made.cache)]
    return [mark[key] for mark in marks for key in sorted(mark)]


def same_contents(one, other, tolerance=0.0):
    pairs = list(zip(contents(one), contents(other), strict=True))
    for a, b in pairs:
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
        else:
            assert a == b
    return len(pairs)


@pytest.mark.parametrize(("preset", "kind"), KINDS)
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_filling_leaves_the_cache_that_attending_to_every_token_would(preset, kind, storage):
    filled, attended = layer(preset, kind, storage=storage), layer(preset, kind, storage=storage)
    filled.fill(401, chunk=401)
    with torch.inference_mode():
        attend(attended, attended.cache, 401)
    assert same_contents(filled, attended, 1e-5)  # matrices of another size round differently


@pytest.mark.parametrize(("preset", "kind"), KINDS)
def test_a_fill_cut_anywhere_and_measured_on_the_way_gives_the_same_cache(preset, kind):
    once, cut = layer(preset, kind), layer(preset, kind)
    once.fill(1031)
    cut.fill(401, chunk=13)
    cut.fill(1031, chunk=127, measure_at=(600, 1031))
    assert cut.cache.length == 1031 and same_contents(once, cut, 1e-5)


@pytest.mark.parametrize(("preset", "kind"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_held_equal_the_formula_and_the_memory_behind_them(preset, kind, dtype):
    made = layer(preset, kind, dtype=dtype)
    for length in PRIMES:
        made.fill(length, chunk=100)
        expected = cost.kv_bytes(made.config, length, "fp32" if dtype is torch.float32 else "bf16")
        assert made.cache.nbytes_by_part() == {part: expected[part] for part in made.cache.nbytes_by_part()}
        assert made.cache.nbytes == expected["total"]
        assert made.cache.nbytes + made.cache.nbytes_reserved == storage_bytes(made.cache)


def test_the_room_reserved_is_exactly_what_was_announced_and_decoding_into_it_copies_nothing():
    made = layer(kind="csa")
    made.fill(401)
    allocated = made.cache.nbytes + made.cache.nbytes_reserved
    assert made.bytes_needed(401) == made.weight_bytes + allocated + made._work_bytes(401, true_size.CHUNK)
    rows = made.cache.layers[0].index._rows.data_ptr()
    for _ in range(DECODE_ROOM):
        made.decode_step()
    assert made.cache.layers[0].index._rows.data_ptr() == rows and made.cache.length == 401 + DECODE_ROOM
    assert made.decode_step().length == 402 + DECODE_ROOM  # moves, and goes on


@pytest.mark.parametrize(("preset", "kind"), KINDS)
def test_a_decode_step_is_the_layers_own_forward_at_that_position_and_reads_what_the_formula_says(preset, kind):
    made, whole = layer(preset, kind), layer(preset, kind)
    made.fill(400)
    step = made.decode_step()
    with torch.inference_mode():
        every = attend(whole, None, 401)
    expected = cost.decode_bytes(made.config, 401, "fp32")
    if kind in ("csa2-reindex", "csa2-reuse"):  # what the owner of the stream reads for itself is not this layer's
        owner = cost.decode_bytes(true_size.one_layer(owner_of(preset, kind), "csa2-full"), 401, "fp32")
        expected = {part: expected[part] - owner[part] for part in expected}
    assert step.read == {part: expected[part] for part in step.read} and sum(step.read.values()) == expected["total"]
    torch.testing.assert_close(step.output, every[:, -1:], rtol=0, atol=1e-5)
    assert step.length == made.cache.length == 401 and step.seconds > 0 and every.std() > 0.01


def test_a_reusing_layer_counts_its_own_window_and_fills_its_owners_stream():
    (found,) = (made := layer(STREAM, "csa2-reuse")).fill(401, measure_at=(401,))
    assert made.config.layer_kinds == ("csa2-full", "csa2-reuse") and found.held_bytes == found.held["window"] == 17 * 24 * 4
    assert made.cache.layers[0].compressed.length == 200 and made.cache.nbytes_by_part()["compressed"] == 200 * 24 * 4
    assert made.layers == layer(STREAM, "csa2-full").layers == 1  # of ratio 2; those of ratio 1 cost something else
    assert found.weight_bytes < made.weight_bytes and found.read["compressed"] == 11 * 24 * 4


def test_a_measurement_names_bytes_seconds_and_bandwidth(monkeypatch):
    monkeypatch.setattr(true_size, "copy_bandwidth", lambda device: 1e9)
    (early, late) = (made := layer(kind="csa")).fill(1031, measure_at=(401, 1031))
    assert (early.length, late.length, late.steps) == (401, 1031, 8) and late.label == ONE_LAYER == "one layer, measured"
    assert late.held == made.cache.nbytes_by_part() and late.read_bytes == cost.decode_bytes(made.config, 1031, "fp32")["total"]
    assert late.floor_s == (late.read_bytes + made.weight_bytes) / 1e9 and late.over_floor == late.step_s / late.floor_s
    total = late.over_layers(made.layers)
    assert made.layers == 21 and total.held_bytes == 21 * late.held_bytes and total.step_s == 21 * late.step_s
    assert total.label == "measured per layer x layers (21)" and total.label.startswith(OVER_LAYERS)
    stored = LayerMeasurement.from_dict(total.to_dict())
    assert stored == replace(total, origin="recorded")
    with pytest.raises(InputError, match="a total over 21"):
        total.over_layers(2)
    with pytest.raises(InputError, match="step_s"):
        LayerMeasurement.from_dict({"kind": "csa"} | {k: v for k, v in total.to_dict().items() if k != "step_s"})


def test_stopping_keeps_whole_chunks_and_the_fill_goes_on_from_there():
    made, once, asked = layer(kind="hca"), layer(kind="hca"), iter([False, False, True])
    seen = []
    assert made.fill(1031, chunk=200, progress=lambda *part: seen.append(part), should_stop=lambda: next(asked)) == []
    assert made.cache.length == 400 and seen == [(200, 1031), (400, 1031)]
    made.fill(1031, chunk=200)
    once.fill(1031, chunk=200)
    assert same_contents(made, once, 1e-5)


@pytest.mark.parametrize("where", ["index_tail", "compressed", "index"])
def test_an_interruption_between_two_parts_undoes_its_chunk_and_nothing_else(monkeypatch, where):
    made, calm = layer(kind="csa"), layer(kind="csa")
    made.fill(401, chunk=401)
    calm.fill(401, chunk=401)
    store = getattr(made.cache.layers[0], where)
    method = "keep" if where == "index_tail" else "append"
    real = getattr(type(store), method)

    def interrupted(self, *arguments):
        real(self, *arguments)
        if self is store:
            raise KeyboardInterrupt

    monkeypatch.setattr(type(store), method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.fill(1031, chunk=100)
    with pytest.raises(KeyboardInterrupt):
        while True:  # a decode step completes a block every fourth time
            made.decode_step()
    monkeypatch.undo()
    calm.fill(made.cache.length, chunk=1)
    assert same_contents(made, calm, 1e-5)


@pytest.mark.parametrize(("preset", "kind"), KINDS)
def test_a_saved_cache_is_resumed_and_goes_on_to_the_same_end(tmp_path, preset, kind):
    made, other = layer(preset, kind), layer(preset, kind)
    made.fill(401)
    path = made.save(tmp_path / "layer.safetensors")
    assert other.resume(path) == 401 and same_contents(made, other)
    made.fill(1031)
    other.fill(1031)
    assert same_contents(made, other)
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


def test_an_empty_cache_can_be_saved_too(tmp_path):
    made = layer()
    assert made.resume(made.save(tmp_path / "nothing")) == 0 and made.cache.nbytes == 0


@pytest.mark.parametrize("cut", [0, 7, 300, -1])
def test_a_truncated_file_is_refused_with_one_clear_error_and_the_cache_stays(tmp_path, cut):
    made = layer()
    made.fill(127)
    path = made.save(tmp_path / "layer")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="damaged, truncated or no saved layer"):
        made.resume(path)
    assert made.cache.length == 127
    with pytest.raises(InputError, match="missing"):
        made.resume(tmp_path / "missing")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "hca"}, "kind is 'csa', not 'hca'"),
        ({"seed": 5}, "seed is 0, not 5"),
        ({"storage": "bf16"}, "storage is 'fp32', not 'bf16'"),
        ({"preset": replace(SMALL, name="other")}, "preset is 'v4-flash', not 'other'"),
    ],
)
def test_a_cache_of_other_settings_is_refused_by_name(tmp_path, settings, named):
    made = layer()
    made.fill(127)
    with pytest.raises(InputError, match=named):
        layer(**settings).resume(made.save(tmp_path / "layer"))


def test_a_foreign_file_and_one_that_contradicts_itself_are_refused(tmp_path):
    made = layer()
    made.fill(127)
    path = made.save(tmp_path / "layer")
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    ring = next(name for name in tensors if name.endswith("ring"))
    for changed, words in (
        ((tensors, {}), "holds no workbench-true-size-layer"),
        ((tensors, about | {"length": "120"}), "damaged"),
        ((tensors, about | {"length": "many"}), "damaged"),
        ((tensors, about | {"counts": "{}"}), "damaged"),
        ((tensors | {ring: tensors[ring][:, :1].clone()}, about), r"expected \[1, 17, 24\] values"),
        (({k: v for k, v in tensors.items() if k != ring}, about), "damaged"),
    ):
        save_file(changed[0], path, metadata=changed[1])
        with pytest.raises(InputError, match=words):
            made.resume(path)
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(InputError, match="no saved layer"):
        made.resume(tmp_path / "pickle")


def test_what_does_not_fit_is_refused_before_it_starts_with_bytes_and_the_longest_length(monkeypatch):
    made = layer(kind="csa")
    free = made.bytes_needed(5000) - made.weight_bytes
    monkeypatch.setattr(true_size, "available_bytes", lambda device="cpu": float(free))
    longest = made.longest_fit()
    assert 5000 <= longest < 5000 + 4  # entries close every four tokens
    with pytest.raises(InputError, match=rf"needs {made.bytes_needed(MAX_LENGTH):,} bytes at 1,048,576 .* {longest:,} tokens"):
        made.fill(MAX_LENGTH)
    assert made.cache.length == 0 and made.cache.nbytes_reserved == storage_bytes(made.cache) < 10**5
    made.fill(longest)
    with pytest.raises(InputError, match="the weights of one csa layer need .* but 0.0 MB are free"):
        monkeypatch.setattr(true_size, "available_bytes", lambda device="cpu": 1000.0)
        layer()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: true_size_layer("v5", "csa"), "v5"),
        (lambda: true_size_layer("v4-flash", "mla"), "csa, hca, window"),
        (lambda: true_size_layer("v3.2", "gqa"), "mla, mla-dsa"),
        (lambda: layer(dtype=torch.float16), "float16"),
        (lambda: layer(seed=-1), "seed .* got -1"),
        (lambda: layer(storage="int3"), "int3"),
        (lambda: layer(device="gpu"), "gpu"),
        (lambda: layer().fill(-1), "got -1"),
        (lambda: layer().fill(MAX_LENGTH + 1), "1,048,576"),
        (lambda: layer().fill(10, chunk=0), "chunk"),
        (lambda: layer().fill(10, measure_at=(11,)), "measure_at"),
        (lambda: layer().bytes_needed(2.5), "2.5"),
    ],
)
def test_bad_settings_get_one_clear_error(call, named):
    with pytest.raises(InputError, match=named):
        call()


def test_a_filled_layer_cannot_shrink():
    made = layer()
    made.fill(127)
    with pytest.raises(InputError, match="127 tokens already"):
        made.fill(126)


def test_the_growth_chart_takes_a_filled_layer_and_agrees_with_the_formula():
    made = layer(kind="csa")
    made.fill(1031, chunk=100, measure_at=(500,))
    trace = made.trace
    chart = wb.KVCacheGrowth(trace)
    assert "one layer, measured" in chart.figure.layout.title.text and "DeepSeek-V4-Flash csa" in trace.label
    assert trace.step_end(trace.steps - 1) == 1031 and trace.step_end(5) == 500
    assert "NOT EQUAL" not in chart.panel.value and "= equal" in chart.panel.value
    compressed = next(area for area in chart.figure.data if area.name == "compressed")
    assert compressed.y[-1] == (1031 // 4) * 24 * 4


def test_two_layers_of_one_seed_are_equal_and_of_another_are_not():
    one, same, other = layer(seed=3), layer(seed=3), layer(seed=4)
    weights = [made.sublayer.layers[0].wkv.weight for made in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    before = torch.random.get_rng_state()
    layer(seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
