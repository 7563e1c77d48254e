"""Caches side by side: what is measured on live toys equals the formulas, and the published sizes those of the reference."""

from __future__ import annotations

import pytest

from workbench.caches import TOYS, measured_cache, modelled_cache, toy_models
from workbench.checkpoint import shipped_names
from workbench.errors import InputError


@pytest.fixture(scope="module")
def toys():
    return toy_models()


@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("tokens", [2, 37, 403])
def test_a_live_cache_holds_and_reads_what_the_formula_says(toys, kind, tokens):
    live, formula = measured_cache(toys[kind], tokens), modelled_cache(toys[kind].config, tokens, "fp32")
    assert live.held == formula.held and live.read == formula.read
    assert live.origin.startswith("measured on") and formula.origin.startswith("modelled")
    assert live.read_bytes > 0 and live.held_bytes > 0


def test_a_pool_not_much_smaller_than_the_stream_is_not_worth_gathering(toys):
    """Up to twice the pool, V4.1's reindexing layer reads all keys and masks them; the formula counts what it must read."""
    model, tokens = toys["CSA2"], 131
    pool = max(model.config.candidate_pool(layer) for layer in range(model.config.num_hidden_layers))
    assert pool < tokens <= 2 * pool
    live, formula = measured_cache(model, tokens), modelled_cache(model.config, tokens, "fp32")
    assert live.held == formula.held
    assert live.read["index"] - formula.read["index"] == (tokens - pool) * 4 * model.config.index_head_dim


def test_every_toy_says_whether_it_was_trained(toys):
    for kind, (name, changes) in TOYS.items():
        trained = name in shipped_names() and not changes
        assert toys[kind].what == ("toy, trained" if trained else "toy, random weights")
        assert set(toys[kind].config.layer_kinds) & {"mha", "gqa", "mla", "mla-dsa", "csa", "csa2-full"}
    assert toys["MHA"].config.layer_kinds[0] == "mha" and toys["MLA"].config.layer_kinds[0] == "mla"


@pytest.mark.parametrize(
    ("name", "held", "read"),  # GB at 2**20 tokens: reference/deepseek-v4.md, section 5
    [("v4-pro", 5.280, 0.706), ("v4-flash", 3.688, 0.480), ("v3.2", 50.40, 8.53), ("gqa-8", 262.0, 262.0)],
)
def test_published_sizes_are_those_of_the_reference(name, held, read):
    use = modelled_cache(name, 2**20)
    assert use.held_bytes / 1e9 == pytest.approx(held, rel=3e-3) and use.read_bytes / 1e9 == pytest.approx(read, rel=3e-3)
    assert use.what == "published size" and "total" not in use.held | use.read


@pytest.mark.parametrize("tokens", [1, True, 2.0, 10**9])
def test_a_length_that_cannot_be_is_one_clear_error(toys, tokens):
    with pytest.raises(InputError, match="tokens, got"):
        measured_cache(toys["GQA"], tokens)
    with pytest.raises(InputError):
        modelled_cache("v4-pro", -1)
