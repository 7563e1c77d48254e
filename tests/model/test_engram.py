"""Engram: golden hash vectors, retrieval, gates, convolution, and state that makes decoding equal a prefill."""

import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.slow_reference import CONFIG, ENGRAM, SlowV4, in_pieces, ngram_rows, random_ids, random_model, random_pieces
from workbench.config import EngramConfig
from workbench.config.primes import is_prime, table_primes
from workbench.errors import InputError
from workbench.model.engram import HostTable, NgramHash, check_canonical_ids, engram_off, hash_multipliers
from workbench.training.recipes import _shared_stream

V41 = EngramConfig(layer_ids=(1, 14), vocab_size=16_000_000, compressed_vocab_size=99092, max_ngram_size=4, head_dim=256)
DEMO = EngramConfig(layer_ids=(1, 15), vocab_size=646_400, compressed_vocab_size=99092)
TOY = EngramConfig(layer_ids=(1, 14), vocab_size=1000, compressed_vocab_size=99092, n_heads=4)
WITH_ENGRAM = replace(CONFIG, engram=ENGRAM)


def test_primes_are_those_of_the_release_and_of_the_demo():
    released, demo = table_primes(V41), table_primes(DEMO)
    assert released[0][:3] == [16000057, 16000079, 16000081] and released[0][-1] == 16000463
    assert released[1][:3] == [16000477, 16000487, 16000499] and released[1][-1] == 16000889
    assert [sum(primes) for primes in released] == [384006168, 384016682]  # the published engram_num_embeddings
    assert demo[0] == [
        *(646403, 646411, 646421, 646423, 646433, 646453, 646519, 646523),
        *(646537, 646543, 646549, 646571, 646573, 646577, 646609, 646619),
    ]
    assert (demo[1][0], demo[1][7], demo[1][8], demo[1][15]) == (646631, 646771, 646781, 646879)


def test_is_prime_agrees_with_trial_division_and_is_not_fooled():
    sieve = [n > 1 and all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(2000)]
    assert [is_prime(n) for n in range(2000)] == sieve
    assert not any(map(is_prime, (3215031751, 341550071728321, 3825123056546413051)))  # strong pseudoprimes to small bases
    assert is_prime(2**61 - 1)


def test_multipliers_are_the_published_ones():
    assert hash_multipliers(1, 4, 99092) == [76632096046245, 4839876093313, 35959672319349, 73987337458391]
    assert hash_multipliers(14, 4, 99092) == [67716810739261, 51510806800915, 30921347202721, 82619226485591]
    assert hash_multipliers(1, 2, 99092) == hash_multipliers(1, 4, 99092)[:2]


@pytest.mark.parametrize("vocabulary", [1, 2, 29, 99092, 2**31])
def test_no_id_times_its_multiplier_overflows(vocabulary):
    for multiplier in hash_multipliers(3, 5, vocabulary, seed=11):
        assert multiplier % 2 == 1 and multiplier > 0 and multiplier * (vocabulary - 1) < 2**63


def test_rows_of_the_toy_are_the_golden_ones():
    ids, nothing = torch.tensor([[41, 93, 17, 208, 41, 93]]), torch.zeros(1, 0, dtype=torch.int64)
    first = NgramHash(TOY, 1)
    assert first.primes.tolist() == [1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049]
    assert (first(ids, nothing, pad=2) - first.offsets)[0].tolist() == [
        [408, 889, 888, 402, 486, 780, 446, 36],
        [519, 668, 597, 525, 868, 708, 415, 990],
        [110, 266, 959, 227, 901, 988, 415, 991],
        [259, 653, 509, 589, 515, 60, 355, 815],
        [431, 296, 32, 716, 681, 33, 114, 831],
        [519, 668, 597, 525, 761, 943, 547, 659],
    ]
    second = NgramHash(TOY, 14)
    assert second.primes.tolist() == [1051, 1061, 1063, 1069, 1087, 1091, 1093, 1097]
    assert (second(ids, nothing, pad=2) - second.offsets)[0, 0].tolist() == [989, 560, 572, 189, 718, 220, 876, 369]


def test_rows_of_the_release_are_the_golden_ones():
    """Tables of [384006168, 384016682] rows follow from the prime rule; see above."""
    ids, nothing = torch.tensor([[11, 222, 3333, 44444, 55555]]), torch.zeros(1, 0, dtype=torch.int64)
    golden = {
        1: ([5935489, 127360623, 134799720, 265484878, 376233586], [3985961, 127898922, 133984100, 257450266, 371683375]),
        14: ([12163276, 122529219, 130800596, 266532396, 383349447], [11675494, 124983207, 132856042, 263188438, 379293287]),
    }
    for layer, (first, last) in golden.items():
        rows = NgramHash(V41, layer)(ids, nothing, pad=2)[0][:, [0, 7, 8, 16, 23]]
        assert rows[0].tolist() == first and rows[4].tolist() == last


def test_looking_back_stops_for_good_at_a_masked_token():
    hashed, pad = NgramHash(V41, 1), 2
    masked = hashed(torch.tensor([[7, 5, -1, 9, 4, 8, 6]]), torch.zeros(1, 0, dtype=torch.int64), pad)[0]
    fresh = hashed(torch.tensor([[9, 4, 8, 6]]), torch.zeros(1, 0, dtype=torch.int64), pad)[0]
    assert torch.equal(masked[3:], fresh)  # as if the sequence began after it
    assert torch.equal(masked[2], hashed(torch.tensor([[pad]]), torch.zeros(1, 0, dtype=torch.int64), pad)[0, 0])
    through_cache = hashed(torch.tensor([[9, 4]]), torch.tensor([[5, -1]]), pad)[0]
    assert torch.equal(through_cache, fresh[:2])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_equal_the_slow_ones_with_any_look_back(size):
    engram = replace(ENGRAM, max_ngram_size=size)
    canonical = random_model(replace(CONFIG, engram=engram), seed=size).engram_canonical_ids
    ids = random_ids(CONFIG, 1, 23, seed=size)
    line, pad = canonical[ids], int(canonical[engram.pad_token_id])
    for layer in engram.layer_ids:
        hashed = NgramHash(engram, layer)
        slow = [ngram_rows(ids[0, : t + 1].tolist(), canonical.numpy(), engram, layer) for t in range(23)]
        for cut in (0, 1, 2, 5, 22):  # decoding has at most size - 1 ids to look back at
            past = line[:, max(0, cut - size + 1) : cut]
            assert hashed(line[:, cut:], past, pad)[0].tolist() == slow[cut:]
        assert min(map(min, slow)) >= 0 and max(map(max, slow)) < hashed.rows


def test_every_column_reads_its_own_part_of_the_table():
    hashed = NgramHash(TOY, 1)
    rows = hashed(torch.randint(0, 99092, (1, 5003), generator=torch.Generator().manual_seed(0)), torch.zeros(1, 0).long(), 2)
    low, high = rows[0].min(0).values, rows[0].max(0).values
    assert (low >= hashed.offsets).all() and (high < hashed.offsets + hashed.primes).all()
    assert (high - low > 0.9 * hashed.primes).all()  # spread over all of it


@pytest.mark.parametrize("length", [1, 2, 3, 9, 10, 11, 29, 47])
def test_prefill_equals_chunks_and_tokens_with_a_convolution_that_speaks(length):
    """Lengths around the 9 positions the convolution looks back; the weights of ``random_model`` are all random."""
    model, ids = random_model(WITH_ENGRAM), random_ids(WITH_ENGRAM, 1, length)
    assert all(model.blocks[i].engram.conv.abs().min() > 0 for i in ENGRAM.layer_ids)
    slow = SlowV4(model)
    expected = torch.from_numpy(slow.read(ids[0]))
    for sizes in ([length], [1] * length, random_pieces(length, 1), random_pieces(length, 2)):
        assert (in_pieces(model, ids, sizes)[0] - expected).abs().max() < 1e-4


def test_gates_and_rows_are_those_of_the_equations():
    model, ids = random_model(WITH_ENGRAM), random_ids(WITH_ENGRAM, 1, 31)
    slow, seen = SlowV4(model), {}
    slow.read(ids[0])
    for layer in ENGRAM.layer_ids:
        tap = model.blocks[layer].engram.gate_tap
        tap.register_forward_hook(lambda _module, _inputs, out, layer=layer: seen.update({layer: out}))
    with torch.inference_mode():
        model(ids)
    for layer in ENGRAM.layer_ids:
        assert seen[layer].rows[0].tolist() == slow.rows[layer]
        np.testing.assert_allclose(seen[layer].gates[0], np.stack(slow.gates[layer]), atol=1e-4)


def test_a_silent_convolution_leaves_the_gated_value():
    model = random_model(WITH_ENGRAM)
    engram = model.blocks[1].engram
    streams, memory = torch.randn(2, 5, CONFIG.hc_mult, CONFIG.hidden_size), torch.randn(2, 5, ENGRAM.memory_width)
    with torch.no_grad():
        engram.conv.zero_()
        out, _ = engram(streams, torch.zeros(2, 5, ENGRAM.rows_per_token, dtype=torch.int64), memory, None)
        *keys, value = engram.wkv(memory).chunk(CONFIG.hc_mult + 1, dim=-1)
        expected = streams + engram.gates(streams, torch.stack(keys, 2)).unsqueeze(-1) * value.unsqueeze(2)
    torch.testing.assert_close(out, expected)


def test_prefetched_and_serial_lookups_give_identical_logits():
    model, ids = random_model(WITH_ENGRAM), random_ids(WITH_ENGRAM, 3, 61)
    for sizes in ([61], [1] * 61, random_pieces(61, 5)):
        prefetched, serial = (in_pieces(model, ids, sizes, prefetch=policy) for policy in ("prefetch", "serial"))
        assert torch.equal(prefetched, serial)
    model.fetcher.close()


def test_the_table_stays_in_host_memory_and_in_its_own_format():
    table = HostTable(11, 3)
    assert table.to(torch.float64).weight.dtype == torch.float32 and table.to("meta").weight.device.type == "cpu"
    rows, out = torch.tensor([3, 0, 10, 3]), torch.empty(4, 3)
    assert torch.equal(table.gather(rows)[2:], torch.stack([table.weight[10], table.weight[3]]))
    with torch.no_grad():
        assert torch.equal(table.gather(rows, out=out), table.gather(rows)) and torch.equal(out, table.weight[rows])


def test_canonical_ids_must_be_as_many_as_the_hash_was_made_for():
    check_canonical_ids(torch.tensor([0, 2, 1]), replace(ENGRAM, compressed_vocab_size=3))
    for ids in ([0, 1], [0, 3], [-1, 2]):
        with pytest.raises(InputError, match="config says 3"):
            check_canonical_ids(torch.tensor(ids), replace(ENGRAM, compressed_vocab_size=3))


def test_words_that_differ_only_in_case_share_their_rows():
    model = random_model(WITH_ENGRAM)
    canonical = model.engram_canonical_ids
    twins = next(pair for i in range(29) if len(pair := (canonical == i).nonzero().flatten().tolist()) > 1)[:2]
    lookups = SimpleNamespace(rows=[])
    model.blocks[1].lookup_tap.register_forward_hook(lambda _m, _i, out: lookups.rows.append(out.rows))
    with torch.inference_mode():
        for token in twins:
            model(torch.tensor([[5, token, 9]]))
    assert torch.equal(*lookups.rows)


def silent_twin(model):
    """The same weights, but for value projections of zero."""
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in model.config.engram.layer_ids:
            twin.blocks[layer].engram.wkv.weight[-model.config.hidden_size :] = 0
    return twin


@pytest.mark.parametrize("family", ["v4", "v41"])
def test_switched_off_is_a_model_whose_value_is_zero_and_nothing_stays_behind(family):
    config = WITH_ENGRAM if family == "v4" else _shared_stream(53, 29)
    model = random_model(config)
    ids, before = random_ids(config, 2, 37), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = silent_twin(model)
    for sizes in ([37], random_pieces(37, 3), [1] * 37):
        on = in_pieces(model, ids, sizes)
        with engram_off(model):
            off = in_pieces(model, ids, sizes)
        assert torch.equal(off, in_pieces(twin, ids, sizes)) and not torch.equal(off, on)
        assert torch.equal(in_pieces(model, ids, sizes), on)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_gates_and_rows_are_still_recorded_while_engram_is_off():
    model, ids = random_model(WITH_ENGRAM), random_ids(WITH_ENGRAM, 1, 23)
    seen: dict[str, list] = {"on": [], "off": []}
    for name, context in (("on", nullcontext()), ("off", engram_off(model))):
        hook = model.blocks[1].engram.gate_tap.register_forward_hook(lambda _m, _i, out, to=seen[name]: to.append(out))
        with context, torch.inference_mode():
            model(ids)
        hook.remove()
    assert torch.equal(seen["on"][0].rows, seen["off"][0].rows) and torch.equal(seen["on"][0].gates, seen["off"][0].gates)


def test_another_thread_sees_engram_at_work_while_this_one_has_it_off():
    model, ids = random_model(WITH_ENGRAM), random_ids(WITH_ENGRAM, 1, 23)
    with torch.inference_mode():
        on = model(ids)
    found = []

    def read():
        with torch.inference_mode():
            found.append(model(ids))

    with engram_off(model):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        read()
    assert torch.equal(found[0], on) and not torch.equal(found[1], on)


def test_an_error_inside_leaves_engram_on_and_a_model_without_it_says_so():
    model, ids = random_model(WITH_ENGRAM), random_ids(WITH_ENGRAM, 1, 7)
    with torch.inference_mode():
        on = model(ids)
        with pytest.raises(ZeroDivisionError), engram_off(model):
            _ = 1 / 0
        assert torch.equal(model(ids), on)
    with pytest.raises(InputError, match="no Engram to switch off"), engram_off(random_model(CONFIG)):
        pass
