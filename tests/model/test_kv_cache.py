"""The KV cache: what it says it holds is what it holds, it grows in steps, and a broken one is refused."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.model.test_formats import DENSE, LATENT
from tests.slow_formats import rotated, stored_row
from tests.slow_reference import CONFIG, ENGRAM, SlowV4, in_pieces, random_config, random_ids, random_model, random_pieces
from workbench import cost
from workbench.config import DenseConfig, EngramConfig, HybridConfig, LatentConfig, ModelConfig, SharedStreamConfig
from workbench.errors import InputError, WorkbenchError
from workbench.model.families import model_class
from workbench.model.formats import STORAGES, PlainFormat
from workbench.model.kv_cache import PARTS, GrowingRows, KVCache
from workbench.model.language_model import LanguageModel

WITH_ENGRAM = replace(CONFIG, engram=ENGRAM)
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 15, 27, 28, 29, 63, 101, 257)


def tensors(thing: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor reachable from an object, found without knowing how the cache is built."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors(value, seen)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from tensors(value, seen)
    elif type(thing).__module__.startswith("workbench") and hasattr(thing, "__dict__"):
        yield from tensors(vars(thing), seen)


def storage_bytes(cache: KVCache) -> int:
    """Bytes of the distinct memory blocks behind all tensors of a cache."""
    blocks = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(cache, set())}
    return sum(blocks.values())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("seed", range(6))
def test_bytes_held_equal_the_closed_form_at_every_length(seed, storage):
    config = random_config(300 + seed, engram=seed % 2 == 0)
    model = random_model(config, seed)
    for batch in (1, 3):
        cache, ids = model.new_cache(batch, storage), random_ids(config, batch, max(LENGTHS))
        with torch.inference_mode():
            for length in LENGTHS:
                if length:
                    model(ids[:, cache.length : length], cache, "last")
                assert cache.length == length
                expected = cost.kv_bytes(config, length, storage)
                assert cache.nbytes_by_part() == {part: batch * expected[part] for part in PARTS}
                assert cache.nbytes == batch * expected["total"]
        model.fetcher.close()


@pytest.mark.parametrize("storage", STORAGES)
def test_an_empty_cache_holds_nothing(storage):
    cache = random_model(WITH_ENGRAM).new_cache(2, storage)
    assert cache.length == 0 and cache.nbytes == 0 and cache.nbytes_by_part() == dict.fromkeys(PARTS, 0)
    assert cache.nbytes_reserved == storage_bytes(cache)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sizes", [[1] * 40, [71], [300], [13, 1, 64, 1, 1, 29]])
def test_the_memory_really_allocated_is_what_is_held_plus_what_is_reserved(sizes, storage):
    model = random_model(WITH_ENGRAM)
    cache, ids = model.new_cache(1, storage), random_ids(CONFIG, 1, sum(sizes))
    with torch.inference_mode():
        for piece in ids.split(sizes, dim=1):
            model(piece, cache, "last")
            assert storage_bytes(cache) == cache.nbytes + cache.nbytes_reserved
    model.fetcher.close()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_model_in_half_precision_counts_its_state_right(storage):
    model = random_model(WITH_ENGRAM)
    for part in (p for n, p in model.named_parameters() if not any(k in n for k in ("table", "hc_", "ape", "attn_sink"))):
        part.data = part.data.to(torch.bfloat16)
    cache = model.new_cache(1, storage)
    with torch.inference_mode():
        assert torch.isfinite(model(random_ids(CONFIG, 1, 37), cache)).all()
    assert storage_bytes(cache) == cache.nbytes + cache.nbytes_reserved
    model.fetcher.close()


def test_growth_copies_seldom_however_many_rows_come_one_by_one():
    rows = GrowingRows(1, PlainFormat(3, torch.float32), torch.device("cpu"))
    blocks, everything = [], torch.randn(1, 5000, 3)
    for i in range(5000):
        rows.append(everything[:, i : i + 1])
        if not blocks or rows.read().untyped_storage().data_ptr() != blocks[-1]:
            blocks.append(rows.read().untyped_storage().data_ptr())
    assert len(blocks) <= 13  # 64 x 1.5^11 > 5000
    assert rows.nbytes_allocated <= 1.5 * rows.nbytes + 64 * 12
    assert torch.equal(rows.read(), everything)


def test_a_decoded_token_reallocates_only_when_a_part_is_full():
    model, ids = random_model(WITH_ENGRAM), random_ids(CONFIG, 1, 300)
    cache, changed, before = model.new_cache(), 0, set()
    with torch.inference_mode():
        for t in range(300):
            model(ids[:, t : t + 1], cache, "last")
            now = {
                store.read().untyped_storage().data_ptr()
                for layer in cache.layers
                for store in (layer.compressed, layer.index)
                if store is not None and store.length
            }
            changed += len(now - before)
            before = now
    assert changed <= 5 * 2  # five growing parts, 75 entries: 64, 96 rows
    model.fetcher.close()


V41 = SharedStreamConfig(
    vocab_size=53, hidden_size=24, num_attention_heads=2, head_dim=34, qk_rope_head_dim=4, q_lora_rank=8, o_groups=2,
    o_lora_rank=4, compress_ratios=(0, 2, 2, 2, 1, 1, 1, 1), kv_source_layer_ids=(1, 4), index_source_layer_ids=(1, 3, 4, 6),
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, index_n_heads=2, index_head_dim=18, index_topk=5,
    candidate_source_layer_id=4, candidate_topk_blocks=3, candidate_block_size=4, sliding_window=11,
)  # fmt: skip
V41_ENGRAM = EngramConfig(
    layer_ids=(0, 3), vocab_size=31, compressed_vocab_size=53, max_ngram_size=4, n_heads=2, head_dim=3, conv_kernel_size=0
)
V32 = LatentConfig(
    vocab_size=53, hidden_size=22, num_hidden_layers=3, num_attention_heads=5, q_lora_rank=7, kv_lora_rank=11,
    qk_nope_head_dim=9, qk_rope_head_dim=4, v_head_dim=13, intermediate_size=17, index_n_heads=3, index_head_dim=6,
    index_topk=7, first_k_dense_replace=1, n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=8, n_group=3,
    topk_group=2,
)  # fmt: skip
GQA = DenseConfig(
    vocab_size=53, hidden_size=22, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
    intermediate_size=17,
)  # fmt: skip
# One line per family: every configuration here has its bytes, allocations and reads held against the accounting.
FAMILIES = [
    pytest.param(CONFIG, id="v4"),
    pytest.param(WITH_ENGRAM, id="v4-engram"),
    pytest.param(replace(CONFIG, layer_kinds=("window",), mlp_kinds=("hash",), sliding_window=1), id="v4-window"),
    pytest.param(replace(CONFIG, head_dim=75, qk_rope_head_dim=2, index_head_dim=33, index_topk=1000), id="v4-odd-widths"),
    pytest.param(replace(V41, candidate_source_layer_id=-1, engram=V41_ENGRAM), id="v4.1"),
    pytest.param(replace(V41, candidate_source_layer_id=-1, index_topk=1000), id="v4.1-keeping-all"),
    pytest.param(V32, id="v3.2"),
    pytest.param(replace(V32, index_topk=0), id="mla"),
    pytest.param(GQA, id="gqa"),
    pytest.param(replace(GQA, num_key_value_heads=6), id="mha"),
]


def telling_lengths(config: ModelConfig) -> list[int]:
    """At least 12 lengths: none, one, odd ones, and those around the ends of blocks and of the window."""
    edges = {n * size for size in (*config.compress_ratios, config.sliding_window) if size for n in (1, 2, 5)}
    return sorted({0, 1, 2, 3, 17, 37, 51, 61, 83, *(edge + near for edge in edges for near in (-1, 0, 1) if edge < 80)})


@pytest.mark.parametrize("config", FAMILIES)
@pytest.mark.parametrize("storage", STORAGES)
def test_held_reserved_and_read_bytes_of_every_family_are_those_of_the_accounting(config, storage):
    model, batch, lengths = model_class(config).untrained(config), 3, telling_lengths(config)
    cache, ids = model.new_cache(batch, storage), random_ids(config, batch, max(lengths))
    assert len(lengths) >= 12
    with torch.inference_mode():
        for length in lengths:
            if length > cache.length + 1:
                model(ids[:, cache.length : length - 1], cache, "last")
            cache.reset_bytes_read()
            if length:
                model(ids[:, length - 1 : length], cache, "last")
            held, read = cost.kv_bytes(config, length, storage), cost.decode_bytes(config, length, storage)
            assert cache.nbytes_by_part() | {"total": cache.nbytes} == {part: batch * n for part, n in held.items()}
            assert storage_bytes(cache) == cache.nbytes + cache.nbytes_reserved
            del read["total"]
            assert cache.bytes_read_by_part() == {part: batch * n for part, n in read.items()}
    model.fetcher.close()


def test_a_long_context_reads_index_keys_of_the_candidate_pool_alone():
    """The accounting counts what must be read; up to two pools are read whole, which needs no gathering."""
    model, cache, pool = model_class(V41).untrained(V41), KVCache(V41, 1, "released", torch.device("cpu")), 3 * 4
    assert V41.candidate_pool(6) == pool
    with torch.inference_mode():
        for length in (1, pool - 1, pool, pool + 1, 2 * pool, 2 * pool + 1, 83):
            if length > cache.length + 1:
                model(random_ids(V41, 1, length - 1 - cache.length), cache, "last")
            cache.reset_bytes_read()
            model(random_ids(V41, 1, 1), cache, "last")
            read, expected = cache.bytes_read_by_part(), cost.decode_bytes(V41, length)
            more = (length - pool) * cost.index_key_bytes(V41) if pool < length <= 2 * pool else 0
            assert read == {part: n + more * (part == "index") for part, n in expected.items() if part != "total"}


def test_released_rows_are_really_smaller():
    model = random_model(replace(CONFIG, head_dim=64, qk_rope_head_dim=8, index_head_dim=32))
    with torch.inference_mode():
        sizes = []
        for storage in STORAGES:
            model(random_ids(CONFIG, 1, 300), cache := model.new_cache(1, storage), "last")
            rows = [store for layer in cache.layers for store in (layer.window, layer.compressed, layer.index) if store]
            sizes.append(sum(store.nbytes_allocated for store in rows))
    assert sizes[0] == 2 * sizes[1] and sizes[2] < 0.6 * sizes[1]


def every_term_random(config: ModelConfig, seed: int) -> LanguageModel:
    """A model of any family whose logits say something."""
    if isinstance(config, HybridConfig):
        return random_model(config, seed)
    model, g = model_class(config).untrained(config, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.head.weight.normal_(generator=g)
    return model


@pytest.mark.parametrize("storage", ["bf16", "released"])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(replace(CONFIG, index_topk=1000, mlp_kinds=("hash",) * 4), id="v4"),
        pytest.param(LATENT, id="v3.2"),
        pytest.param(replace(LATENT, index_topk=7), id="v3.2-choosing"),
        pytest.param(DENSE, id="gqa"),
    ],
)
def test_how_a_sequence_is_split_matters_little_even_when_its_cache_is_rounded(config, storage):
    """The same values are rounded in every split, but one that lies on a rounding edge may fall to either side: a coarse step.

    So most sequences agree to float32 accuracy, and the others are far closer than rounded and unrounded rows are.
    """
    near, coarse, rounding = 0, 0.0, []
    for seed in range(8):
        model, ids = every_term_random(config, seed), random_ids(config, 1, 41, seed)
        with torch.inference_mode():
            whole = model(ids, model.new_cache(1, storage))
            cache = model.new_cache(1, storage)
            pieces = torch.cat([model(p, cache) for p in ids.split(random_pieces(41, seed), dim=1)], dim=1)
            rounding.append(float((model(ids) - whole).abs().mean()))
        near += bool((whole - pieces).abs().max() < 1e-4)
        coarse = max(coarse, float((whole - pieces).abs().mean()))
    assert near >= 4 and coarse < min(rounding)


class Stored(list):
    """A list of float64 rows that keeps each as the cache format leaves it."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def append(self, row):
        super().append(np.array(self.keep(row.astype(np.float32).tolist())))


class SlowReleased(SlowV4):
    """The slow model with the released cache: keys, entries, index keys and index queries rounded one value at a time."""

    def __init__(self, model):
        super().__init__(model)
        layers = range(self.config.num_hidden_layers)
        rope = self.config.qk_rope_head_dim
        self.keys = [Stored(lambda row: stored_row(row, "fp8", 64, bf16_width=rope)) for _ in layers]
        for layer in layers:
            self.main[layer].entries = Stored(lambda row: stored_row(row, "fp8", 64, bf16_width=rope))
            self.index[layer].entries = Stored(self._index_row)

    @staticmethod
    def _index_row(row):
        return stored_row(np.array(rotated(row), np.float32).tolist(), "fp4", 32)

    def _rotate(self, x, position, compressed):
        out = super()._rotate(x, position, compressed)
        if x.shape == (self.config.index_n_heads, self.config.index_head_dim):  # index queries
            return np.array([self._index_row(q.astype(np.float32).tolist()) for q in out])
        return out


def test_a_released_cache_equals_the_slow_model_that_rounds_one_value_at_a_time():
    """Rounding edges apart (see above), and among the entries that near ties choose."""
    agreed = 0
    for seed in range(6):
        model, ids = random_model(CONFIG, seed), random_ids(CONFIG, 1, 31, seed)
        slow = SlowReleased(model).read(ids[0])
        with torch.inference_mode():
            cache = model.new_cache(1, "released")
            got = torch.cat([model(p, cache) for p in ids.split(random_pieces(31, seed), dim=1)], dim=1)[0]
            exact = model(ids)[0]
        gap = np.abs(got.double().numpy() - slow).max()
        agreed += bool(gap < 1e-3 < float((exact - got).abs().max()))
    assert agreed >= 4


@pytest.mark.parametrize("seed", range(3))
def test_reading_in_bfloat16_stays_close_to_float32_for_any_split(seed):
    """All entries are kept and experts follow the token id, so no near tie can flip; what remains is rounding, 2^-8 a value."""
    config = replace(CONFIG, index_topk=1000, mlp_kinds=("hash",) * 4)
    model, ids = random_model(config, seed), random_ids(config, 1, 61, seed)
    with torch.inference_mode():
        exact = model(ids)
        for sizes in ([61], [1] * 61, random_pieces(61, seed)):
            cache = model.new_cache(1, "bf16")
            got = torch.cat([model(piece, cache) for piece in ids.split(sizes, dim=1)], dim=1)
            assert 0 < (got - exact).abs().max() < 0.15 and (got - exact).abs().mean() < 0.02


def test_two_sequences_with_two_caches_may_take_turns():
    model = random_model(WITH_ENGRAM)
    lines = [random_ids(CONFIG, 1, 43, seed) for seed in (1, 2)]
    caches, parts = [model.new_cache(), model.new_cache()], [[], []]
    with torch.inference_mode():
        for first in range(0, 43, 3):
            for cache, line, out in zip(caches, lines, parts, strict=True):
                out.append(model(line[:, first : first + 3], cache))
    for line, out in zip(lines, parts, strict=True):
        assert (torch.cat(out, 1) - in_pieces(model, line, [43])).abs().max() < 1e-4
    model.fetcher.close()


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("place", ["engram", "attn_norm", "attn", "ffn"])
@pytest.mark.parametrize("held", [0, 17])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_cache_left_half_filled_is_refused(layer, place, held, error):
    """Wherever a call breaks off, no later call may quietly go on with some layers ahead of others."""
    model = random_model(replace(CONFIG, engram=replace(ENGRAM, layer_ids=(0, 1, 2, 3))))
    cache, ids = model.new_cache(), random_ids(CONFIG, 1, held + 5)

    def fail(*_: object) -> None:
        raise error("broken off")

    with torch.inference_mode():
        if held:
            model(ids[:, :held], cache)
        hook = getattr(model.blocks[layer], place).register_forward_pre_hook(fail)
        with pytest.raises((error, WorkbenchError)):
            model(ids[:, held:], cache)
        hook.remove()
        with pytest.raises(WorkbenchError, match="half-filled by an interrupted call.*new_cache"):
            model(ids[:, held:], cache)
    model.fetcher.close()


def test_a_refused_call_leaves_the_cache_usable():
    model, ids = random_model(WITH_ENGRAM), random_ids(CONFIG, 1, 29)
    cache = model.new_cache()
    with torch.inference_mode():
        first = model(ids[:, :13], cache)
        for bad in (torch.tensor([[99]]), torch.tensor([[1], [2]]), torch.zeros(1, 9000, dtype=torch.int64)):
            with pytest.raises(InputError):
                model(bad, cache)
        rest = model(ids[:, 13:], cache)
        assert (torch.cat([first, rest], 1) - model(ids)).abs().max() < 1e-4
    model.fetcher.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"storage": "fp8"}, "'fp8' is unknown; choose one of .*'fp32', 'bf16', 'released'"), ({"batch_size": 0}, "got 0")],
)
def test_unusable_caches_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        random_model().new_cache(**settings)


def test_a_cache_for_another_batch_size_is_refused():
    model = random_model()
    with pytest.raises(InputError, match="made for 2 sequences, got 1"):
        model(random_ids(CONFIG, 1, 3), model.new_cache(2))
