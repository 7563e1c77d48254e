"""The KV cache: what it says it holds is what it holds, it grows in steps, and a broken one is refused."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.slow_reference import CONFIG, ENGRAM, in_pieces, random_config, random_ids, random_model, random_pieces
from workbench import cost
from workbench.errors import InputError, WorkbenchError
from workbench.model.formats import STORAGES, PlainFormat
from workbench.model.kv_cache import PARTS, GrowingRows, KVCache

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


def test_a_model_in_half_precision_counts_its_state_right():
    model = random_model(WITH_ENGRAM)
    for part in (p for n, p in model.named_parameters() if not any(k in n for k in ("table", "hc_", "ape", "attn_sink"))):
        part.data = part.data.to(torch.bfloat16)
    cache = model.new_cache()
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
