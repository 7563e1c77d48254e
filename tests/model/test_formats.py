"""Packed cache rows: the rules of the releases bit for bit, golden values, sizes, and nothing lost on a second trip."""

import math
from dataclasses import replace

import pytest
import torch

from tests import slow_formats
from tests.slow_reference import CONFIG, random_config
from workbench import cost
from workbench.config import DenseConfig, LatentConfig, SharedStreamConfig
from workbench.errors import InputError
from workbench.model.formats import PackedFormat, PlainFormat, RotatedFormat, hadamard, row_formats
from workbench.presets import presets

V4_ENTRY = PackedFormat(512, "fp8", 64, bf16_width=64, align=8)
V4_KEY = PackedFormat(128, "fp4", 32)
V41_WINDOW, V41_ENTRY = PackedFormat(512, "fp8", 32), PackedFormat(512, "fp4", 16, "e4m3")
V32_LATENT, V32_KEY = PackedFormat(576, "fp8", 128, "fp32", bf16_width=64), PackedFormat(128, "fp8", 128, "fp32")
# Widths that no block divides, odd ones, and one with more than two blocks.
SMALL = [
    PackedFormat(64, "fp8", 64, bf16_width=8, align=8),
    PackedFormat(13, "fp8", 5, bf16_width=4, align=8),
    PackedFormat(70, "fp8", 32),
    PackedFormat(67, "fp4", 32),
    PackedFormat(39, "fp4", 16, "e4m3"),
    PackedFormat(33, "fp8", 16, "fp32", bf16_width=6),
    PackedFormat(5, "fp4", 32),
    PackedFormat(4, "fp8", 64, bf16_width=4, align=8),
]
ALL = [V4_ENTRY, V4_KEY, V41_WINDOW, V41_ENTRY, V32_LATENT, V32_KEY, *SMALL]
BLOCK = [0.11, -0.37, 0.9, 1.3, -2.2, 3.1, 0.02, 5.7]


def stored(form, rows):
    return form.decode(form.encode(rows))


def by_hand(form, rows):
    """The same row by row and value by value."""
    settings = (form.codes, form.block, form.scales, form.bf16_width)
    return torch.tensor([slow_formats.stored_row(row, *settings) for row in rows.tolist()])


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def telling_rows(width, seed):
    """Rows of many magnitudes, of values that lie half-way between codes, and of blocks that are zero or nearly so."""
    g = torch.Generator().manual_seed(seed)
    plain = torch.randn(8, width, generator=g) * torch.logspace(-9, 9, 8, base=2).unsqueeze(1)
    mixed = torch.randn(4, width, generator=g) * torch.exp2(torch.randint(-20, 12, (4, width), generator=g).float())
    ties = torch.randint(-32, 33, (4, width), generator=g) / 4.0 * torch.tensor([1.0, 0.125, 16.0, 2.0**-9]).unsqueeze(1)
    tiny = torch.randn(3, width, generator=g) * torch.tensor([1e-4, 1e-8, 1e-39]).unsqueeze(1)
    zeros = torch.zeros(1, width)
    one_large = torch.randn(1, width, generator=g)
    one_large[0, width // 2] = 2000.0
    return torch.cat([plain, mixed, ties, tiny, zeros, one_large])


@pytest.mark.parametrize("form", ALL, ids=str)
def test_a_stored_row_is_what_the_rules_say_bit_for_bit(form):
    rows = telling_rows(form.width, seed=form.width)
    expected, got = by_hand(form, rows), stored(form, rows)
    assert torch.equal(got, expected)
    assert torch.equal(got.signbit() | (got == 0), rows.signbit() | (got == 0))  # fractions have no minus zero


@pytest.mark.parametrize("form", [f for f in ALL if f.scales != "e4m3"], ids=str)
def test_the_largest_floats_are_stored_as_the_rules_say(form):
    rows = telling_rows(form.width, seed=3)[:8]
    rows = rows / rows.abs().amax(-1, keepdim=True) * 2.0**126
    assert torch.equal(stored(form, rows), by_hand(form, rows))


def test_the_golden_values_of_the_reference():
    block = torch.tensor(BLOCK * 4)
    fp8 = [0.109375, -0.375, 0.875, 1.25, -2.25, 3, 0.01953125, 5.5]
    mxfp4 = [0, -0.5, 1, 1.5, -2, 3, 0, 6]
    nvfp4 = [0, -0.46875, 0.9375, 1.40625, -1.875, 2.8125, 0, 5.625]
    assert stored(PackedFormat(32, "fp8", 32), block).tolist() == fp8 * 4
    assert stored(PackedFormat(32, "fp4", 32), block).tolist() == mxfp4 * 4
    assert stored(PackedFormat(32, "fp4", 16, "e4m3"), block).tolist() == nvfp4 * 4


def test_the_errors_on_gaussian_rows_are_those_of_the_reference():
    """2.7 %, 11.5 % and 9.5 % relative RMS error (reference/deepseek-v41.md, section 8)."""
    x = torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))
    error = [
        float((stored(form, x) - x).square().mean().sqrt()) for form in (V41_WINDOW, PackedFormat(512, "fp4", 32), V41_ENTRY)
    ]
    assert error == pytest.approx([0.027, 0.115, 0.095], abs=6e-4)


def test_the_bytes_of_a_row_lie_as_documented():
    """Codes, scales, BF16 channels, padding: 1.5 is E4M3 0x3C, and a block within 448 of scale 1 has the scale byte 127."""
    row = torch.tensor([[448.0, 1.5, -1.5, 2.0**-9, 1.0, -2.0]])
    packed = PackedFormat(6, "fp8", 4, bf16_width=2, align=8).encode(row)
    assert packed.tolist() == [[0x7E, 0x3C, 0xBC, 0x01, 127, 0x80, 0x3F, 0x00, 0xC0, 0, 0, 0, 0, 0, 0, 0]]
    four = PackedFormat(5, "fp4", 4).encode(torch.tensor([[6.0, -0.5, 1.0, 4.0, 6.0]]))
    assert four.tolist() == [[0x97, 0x62, 0x07, 127, 127]]  # the earlier value in the low half, an odd one alone
    wide = PackedFormat(2, "fp8", 128, "fp32").encode(torch.tensor([[448.0, -448.0]]))
    assert wide.tolist() == [[0x7E, 0xFE, 0, 0, 0x80, 0x3F]]


def test_every_finite_e4m3_code_reads_as_its_value():
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    form = PackedFormat(len(codes), "fp8", 256)
    for scale in (105, 127, 140):
        values = form.decode(torch.cat([codes, torch.tensor([scale], dtype=torch.uint8)]))
        expected = [float(slow_formats.E4M3[c & 0x7F]) * (-1 if c & 0x80 else 1) * 2.0 ** (scale - 127) for c in codes.tolist()]
        assert values.tolist() == expected
        assert torch.equal(form.encode(values)[:-1], codes) and form.encode(values)[-1] == scale


def test_every_pair_of_e2m1_codes_and_every_scale_reads_as_its_value():
    signed = [float(m) for m in slow_formats.E2M1] + [-float(m) for m in slow_formats.E2M1]
    every = torch.arange(256, dtype=torch.uint8)
    form, nv = PackedFormat(32, "fp4", 32), PackedFormat(32, "fp4", 16, "e4m3")
    for scale in range(1, 253):  # exactly those an encoder makes
        packed = torch.cat([every.view(16, 16), torch.full((16, 1), scale, dtype=torch.uint8)], dim=1)
        expected = [signed[n] * 2.0 ** (scale - 127) for byte in range(256) for n in (byte & 15, byte >> 4)]
        assert form.decode(packed).flatten().tolist() == expected
    for scale in range(1, 127):
        packed = torch.cat([every.view(16, 16), torch.full((16, 2), scale, dtype=torch.uint8)], dim=1)
        expected = [signed[n] * float(slow_formats.E4M3[scale]) for byte in range(256) for n in (byte & 15, byte >> 4)]
        assert nv.decode(packed).flatten().tolist() == expected


@pytest.mark.parametrize("form", ALL, ids=str)
def test_storing_what_was_stored_changes_nothing(form):
    rows = telling_rows(form.width, seed=11)
    if form.scales == "e4m3":  # by the rule itself a scale in E4M3's subnormal range may come out smaller the second time
        rows[:, :: form.block] = 8.0
    once = stored(form, rows)
    assert same_bits(stored(form, once), once)


@pytest.mark.parametrize("form", ALL, ids=str)
def test_rows_are_stored_one_by_one_as_they_are_together(form):
    """Shapes, slices of wider tensors, half precision and no rows at all make no difference."""
    rows = telling_rows(form.width, seed=5)[:12]
    packed = form.encode(rows)
    assert packed.dtype == torch.uint8 and packed.shape == (12, form.stored_width)
    for number, row in enumerate(rows):
        assert torch.equal(form.encode(row), packed[number])
        assert same_bits(form.decode(packed[number]), form.decode(packed)[number])
    folded = form.encode(rows.view(3, 2, 2, -1).transpose(0, 1))
    assert torch.equal(folded, packed.view(3, 2, 2, -1).transpose(0, 1))
    wide = torch.cat([rows, rows], dim=1)
    assert torch.equal(form.encode(wide[:, : form.width]), packed)
    assert torch.equal(form.encode(rows.bfloat16()), form.encode(rows.bfloat16().float()))
    nothing = form.encode(rows[:0].view(2, 0, form.width))
    assert nothing.shape == (2, 0, form.stored_width) and form.decode(nothing).shape == (2, 0, form.width)


def test_more_rows_than_are_worked_on_at_once_are_all_stored(monkeypatch):
    from workbench.model import formats

    rows = torch.randn(101, 70, generator=torch.Generator().manual_seed(2))
    whole = stored(SMALL[2], rows)
    monkeypatch.setattr(formats, "VALUES_AT_ONCE", 300)
    assert same_bits(stored(SMALL[2], rows), whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", [f for f in ALL if f.coded], ids=str)
def test_a_block_that_is_not_finite_reads_as_nan_and_spoils_no_other(form, bad):
    row = torch.full((form.width,), 6.0)  # exact in every format
    row[0] = bad
    got = stored(form, row)
    assert got[: min(form.block, form.coded)].isnan().all()
    assert (got[form.block :] == 6).all()


def test_e4m3_scales_saturate_where_the_largest_is_reached():
    form = PackedFormat(16, "fp4", 16, "e4m3")
    row = torch.full((16,), 1e6)
    row[1] = -448.0
    assert stored(form, row).tolist() == [6 * 448.0, -448.0] + [6 * 448.0] * 14


def test_a_hadamard_matrix_turns_rows_and_keeps_products():
    assert hadamard(torch.eye(4)).mul(2).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    g = torch.Generator().manual_seed(0)
    for width in (1, 2, 8, 12, 24, 32, 128, 35):
        q, k = torch.randn(5, width, generator=g), torch.randn(7, width, generator=g)
        assert torch.allclose(hadamard(q) @ hadamard(k).T, q @ k.T, atol=2e-5)
        assert torch.allclose(hadamard(hadamard(q)), q, atol=1e-5)
    for row, turned in zip(q := torch.randn(3, 16, generator=g), hadamard(q), strict=True):
        assert turned.tolist() == pytest.approx(slow_formats.rotated(row.tolist()), abs=1e-6)


def test_a_rotated_key_is_packed_after_turning_and_its_queries_alike():
    form, rows = RotatedFormat(PackedFormat(32, "fp4", 32)), telling_rows(32, seed=1)
    turned = stored(form.packed, hadamard(rows))
    assert same_bits(stored(form, rows), turned) and same_bits(form.as_queries(rows.view(3, -1, 32)).flatten(0, 1), turned)
    outlier = torch.zeros(1, 32)
    outlier[0, 3], outlier[0, 5] = 100.0, 1.0  # without turning, the small one is lost beside the large one
    small, kept = stored(form.packed, outlier), hadamard(stored(form, outlier))
    assert small[0, 5] == 0 and kept[0, 3] == pytest.approx(100, rel=0.2)


LATENT = LatentConfig(
    vocab_size=53, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=8, kv_lora_rank=20,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=16, index_head_dim=11,
)  # fmt: skip
SHARED = SharedStreamConfig(
    vocab_size=53, hidden_size=24, num_attention_heads=2, head_dim=32, qk_rope_head_dim=4, q_lora_rank=8, o_groups=2,
    o_lora_rank=4, compress_ratios=(0, 2), kv_source_layer_ids=(1,), index_source_layer_ids=(1,), n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=8, index_n_heads=2, index_head_dim=16, index_topk=3,
)  # fmt: skip
DENSE = DenseConfig(
    vocab_size=53, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
    intermediate_size=16,
)  # fmt: skip


def row_bytes(config, storage):
    return {p: f.stored_width * torch.empty(0, dtype=f.dtype).element_size() for p, f in row_formats(config, storage).items()}


def test_the_sizes_are_the_published_ones():
    v4 = row_bytes(presets["v4-flash"].config, "released")
    assert v4 == {"window": 584, "compressed": 584, "index": 68}
    assert row_bytes(replace(SHARED, head_dim=512, index_head_dim=128), "released") == {
        "window": 528, "compressed": 288, "index": 68,
    }  # fmt: skip
    released = replace(LATENT, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128)
    assert row_bytes(released, "released") == {"kv": 656, "index": 132}


@pytest.mark.parametrize("storage", ["fp32", "bf16", "released"])
def test_rows_of_any_width_are_as_large_as_the_accounting_says(storage):
    for width in (2, 8, 12, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 512, 576):
        v4 = replace(CONFIG, head_dim=4 * width, qk_rope_head_dim=2, index_head_dim=width)
        entry, key = cost.entry_bytes(v4, storage), cost.index_key_bytes(v4, storage)
        assert row_bytes(v4, storage) == {"window": entry, "compressed": entry, "index": key}
        stream = replace(SHARED, head_dim=width, qk_rope_head_dim=2, index_head_dim=width)
        assert row_bytes(stream, storage) == {
            "window": cost.window_entry_bytes(stream, storage),
            "compressed": cost.entry_bytes(stream, storage),
            "index": cost.index_key_bytes(stream, storage),
        }
        latent = replace(LATENT, kv_lora_rank=width, qk_rope_head_dim=6, index_head_dim=max(6, width))
        expected = {"kv": cost.entry_bytes(latent, storage), "index": cost.index_key_bytes(latent, storage)}
        assert row_bytes(latent, storage) == expected
        dense = replace(DENSE, head_dim=2 * width)
        assert row_bytes(dense, storage) == {"kv": cost.entry_bytes(dense, storage)}


def test_v4_entries_and_keys_are_stored_by_their_own_rules():
    for seed in range(6):
        config = random_config(seed)
        forms, rows = row_formats(config, "released"), telling_rows(config.head_dim, seed)
        expected = [slow_formats.stored_row(row, "fp8", 64, bf16_width=config.qk_rope_head_dim) for row in rows.tolist()]
        assert stored(forms["window"], rows).tolist() == stored(forms["compressed"], rows).tolist() == expected
        keys = torch.randn(9, config.index_head_dim, generator=torch.Generator().manual_seed(seed))
        by_hand = [slow_formats.stored_row(key, "fp4", 32) for key in hadamard(keys).tolist()]
        assert stored(forms["index"], keys).tolist() == by_hand


def test_plain_rows_are_only_rounded():
    rows = telling_rows(9, seed=4)
    assert PlainFormat(9, torch.float32).encode(rows) is rows
    assert stored(PlainFormat(9, torch.bfloat16), rows).dtype == torch.bfloat16
    assert stored(PlainFormat(9, torch.bfloat16), rows)[:8].tolist() == [
        [slow_formats.bf16(x) for x in row] for row in rows[:8].tolist()
    ]


def test_an_unknown_storage_is_refused_with_the_three_there_are():
    with pytest.raises(InputError, match="'int3' is unknown; choose one of .*fp32.*bf16.*released"):
        row_formats(CONFIG, "int3")


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "block"), [("fp8", 32), ("mxfp4", 32), ("nvfp4", 16)])
def test_v41_rows_equal_the_published_training_code_bit_for_bit(name, block):
    pytest.importorskip("nemo_automodel", reason="nemo-automodel is not installed")
    torch.compiler.set_stance("force_eager")
    from nemo_automodel.components.models.deepseek_v41.quantization import quantize_cache

    g = torch.Generator().manual_seed(0)
    for width in (512, 128, 45, 8):
        form = PackedFormat(width, *{"fp8": ("fp8", 32), "mxfp4": ("fp4", 32), "nvfp4": ("fp4", 16, "e4m3")}[name])
        for magnitude in (1.0, 1e-3, 1e-5, 30.0, 1e-38):
            rows = torch.randn(500, width, generator=g) * magnitude
            rows *= torch.exp2(torch.randint(-6, 6, rows.shape, generator=g).float())
            rows = torch.cat([rows, telling_rows(width, seed=width)])
            assert same_bits(stored(form, rows), quantize_cache(rows, format=name, block_size=block))
