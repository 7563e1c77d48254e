"""Released number formats: golden codes, exactness, rounding, and refusal of what is not a number."""

import pytest
import torch

from workbench.errors import InputError
from workbench.model.quant import (
    decode_scale,
    dequantise_fp4,
    dequantise_fp8_blocks,
    quantise_fp4,
    quantise_fp8_blocks,
)

ONE = torch.tensor([127], dtype=torch.uint8)  # 2^0
CODES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_each_fp4_code_has_its_value_and_the_low_half_byte_comes_first():
    packed = torch.tensor([(2 * i + 1) << 4 | 2 * i for i in range(8)] * 2, dtype=torch.uint8)
    values = dequantise_fp4(packed, ONE)
    assert values.tolist() == CODES * 2
    assert values[8].signbit()  # code 8 is minus zero


@pytest.mark.parametrize("dtype", [torch.int8, torch.float4_e2m1fn_x2])
def test_fp4_bytes_mean_the_same_in_every_container(dtype):
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    scale = torch.tensor([[120, 121, 122, 123]] * 4, dtype=torch.uint8)
    assert torch.equal(dequantise_fp4(packed.view(dtype), scale.view(torch.float8_e8m0fnu)), dequantise_fp4(packed, scale))


def test_an_e8m0_byte_is_a_power_of_two():
    scales = decode_scale(torch.tensor([0, 1, 126, 127, 128, 254], dtype=torch.uint8))
    assert scales.tolist() == [2.0**-127, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127]


def test_fp4_rounds_ties_to_even_codes():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    given = torch.cat([ties, -ties, torch.zeros(16)])
    packed, scale = quantise_fp4(given)
    rounded = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    assert scale.float().tolist() == [1.0]
    assert torch.equal(dequantise_fp4(packed, scale), torch.cat([rounded, -rounded, torch.zeros(16)]))


def test_fp4_picks_the_nearest_value_of_the_grid():
    values = random(7, 96)
    packed, scale = quantise_fp4(values)
    grid = torch.tensor(CODES) * scale.float().unsqueeze(-1)  # [7, 3, 16]
    nearest = (values.view(7, 3, 32, 1) - grid.unsqueeze(-2)).abs().amin(-1)
    error = (values - dequantise_fp4(packed, scale)).abs().view(7, 3, 32)
    assert torch.allclose(error, nearest, atol=1e-7)
    assert (values.view(7, 3, 32).abs().amax(-1) <= 6 * scale.float()).all()
    assert (values.view(7, 3, 32).abs().amax(-1) > 3 * scale.float()).all()  # the next smaller power would overflow


def test_representable_fp4_values_survive_exactly_over_the_whole_exponent_range():
    blocks = torch.tensor(CODES * 2) * torch.tensor([[2.0**-125], [2.0**-40], [1.0], [2.0**100], [2.0**125]])
    packed, scale = quantise_fp4(blocks)
    assert torch.equal(dequantise_fp4(packed, scale), blocks)


@pytest.mark.parametrize("block", [(128, 128), (32, 32), (3, 5)])
def test_fp8_blocks_share_one_scale_even_where_the_last_block_is_cut_short(block):
    values = random(131, 97) * torch.logspace(-3, 3, 97)
    weight, scale = quantise_fp8_blocks(values, block)
    assert scale.shape == (-(-131 // block[0]), -(-97 // block[1]))
    expected = torch.empty_like(values)
    for row in range(131):  # the slow way: each element looks its scale up
        for column in range(97):
            expected[row, column] = weight[row, column].float() * scale[row // block[0], column // block[1]].float()
    assert torch.equal(dequantise_fp8_blocks(weight, scale, block), expected)
    # E4M3 keeps 4 significant bits; below 2^-6 of a scale values are subnormal, 2^-9 apart.
    coarse = scale.float().repeat_interleave(block[0], 0)[:131].repeat_interleave(block[1], 1)[:, :97]
    assert ((values - expected).abs() <= torch.maximum(values.abs() / 16, coarse * 2.0**-10)).all()


@pytest.mark.parametrize(
    ("shape", "tiles", "size"), [((131, 97), (2, 1), (128, 128)), ((131, 97), (5, 4), (32, 32)), ((192, 15), (2, 5), (128, 3))]
)
def test_the_block_size_follows_from_the_shapes(shape, tiles, size):
    weight, scale = random(*shape).to(torch.float8_e4m3fn), random(*tiles, seed=1).abs()
    assert torch.equal(dequantise_fp8_blocks(weight, scale), dequantise_fp8_blocks(weight, scale, size))


def test_fp8_rounds_to_nearest_even_and_keeps_its_largest_value():
    values = torch.tensor([[448.0, -448.0, 17.0, 19.0, 2.0**-9, 2.0**-10]])  # 17 lies between 16 and 18, 19 between 18 and 20
    weight, scale = quantise_fp8_blocks(values, (1, 6))
    assert scale.float().item() == 1.0
    assert weight.float().tolist() == [[448.0, -448.0, 16.0, 20.0, 2.0**-9, 0.0]]


def test_float_scales_and_stacked_experts_are_accepted():
    weight = random(3, 8, 8).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(2)) + 0.5
    out = dequantise_fp8_blocks(weight, scale, (4, 4))
    assert torch.equal(out[2, 5, 1], weight[2, 5, 1].float() * scale[2, 1, 0])


def test_blocks_of_zeros_stay_zero():
    assert not dequantise_fp8_blocks(*quantise_fp8_blocks(torch.zeros(5, 7))).any()
    assert not dequantise_fp4(*quantise_fp4(torch.zeros(3, 64))).any()


NAN_BYTE = torch.tensor([255], dtype=torch.uint8)
FP8_NAN = torch.tensor([[0x7F]], dtype=torch.uint8).view(torch.float8_e4m3fn)
FP8_ONE = torch.ones(1, 1).to(torch.float8_e4m3fn)
ZEROS = torch.zeros(16, dtype=torch.uint8)


@pytest.mark.parametrize(
    "broken",
    [
        lambda: quantise_fp4(torch.full((32,), torch.nan)),
        lambda: quantise_fp8_blocks(torch.full((2, 2), torch.inf)),
        lambda: dequantise_fp4(ZEROS, NAN_BYTE),
        lambda: dequantise_fp8_blocks(FP8_NAN, torch.ones(1, 1)),
        lambda: dequantise_fp8_blocks(FP8_ONE, torch.full((1, 1), torch.inf)),
        lambda: decode_scale(NAN_BYTE),
        lambda: dequantise_fp8_blocks((torch.ones(1, 1) * 4).to(torch.float8_e4m3fn), torch.tensor([[254]], dtype=torch.uint8)),
    ],
)
def test_nan_and_infinity_are_refused(broken):
    with pytest.raises(InputError, match="NaN or infinity"):
        broken()


@pytest.mark.parametrize(
    "mismatched",
    [
        lambda: dequantise_fp4(ZEROS, torch.ones(2)),
        lambda: dequantise_fp4(torch.zeros(16), ONE),
        lambda: quantise_fp4(torch.zeros(33)),
        lambda: dequantise_fp8_blocks(random(7, 5).to(torch.float8_e4m3fn), torch.ones(5, 1)),
        lambda: dequantise_fp8_blocks(random(7, 5).to(torch.float8_e4m3fn), torch.ones(2, 1), (2, 5)),
        lambda: dequantise_fp8_blocks(random(7, 5), torch.ones(1, 1)),
        lambda: decode_scale(torch.ones(1, dtype=torch.int64)),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_refused(mismatched):
    with pytest.raises(InputError, match="expected|must|multiple|tile"):
        mismatched()
