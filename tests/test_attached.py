"""A live transformers model, listened to: its trace against our recorder's with the same weights, and hooks that always go."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import workbench as wb
from tests import oracles
from workbench import checkpoint
from workbench.errors import InputError, WorkbenchError
from workbench.trace import LayerTrace, Trace
from workbench.widgets.attention import AttentionExplorer
from workbench.widgets.memory import KVCacheGrowth

HALF = 1e-3  # probabilities are kept in float16
CLOSE = 1e-5  # index scores nearer than that may be ranked either way


def ours(model: Any, ids: list[int], new: int) -> Trace:
    run = wb.run(model, ids, max_new_tokens=new)
    run.wait()
    assert run.state == "done", run.error
    return run.trace


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def drawn(length: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))


def listened(theirs: Any, ids: torch.Tensor, new: int) -> Trace:
    """Prompt, then ``new`` of the tokens that follow in ``ids``, one by one, so that both models read the same."""
    with torch.inference_mode(), wb.attach(theirs) as seen:
        past = None
        for piece in (ids[:, : ids.shape[1] - new], *ids[:, ids.shape[1] - new :].split(1, dim=1)):
            if piece.shape[1]:
                past = theirs(piece, past_key_values=past, use_cache=True).past_key_values
    assert not hooks(theirs)
    return seen.trace


def compare(mine: LayerTrace, other: LayerTrace) -> None:
    """Equal but for rounding, and but for rows in which a close call decides."""
    assert (mine.layer, mine.kind, mine.ratio, mine.heads, mine.window) == (
        other.layer,
        other.kind,
        other.ratio,
        other.heads,
        other.window,
    )
    sure = np.ones(mine.length, bool)
    if mine.selected is not None:
        last = np.nanmin(
            np.where(mine.selected >= 0, mine.selected_scores, np.nan), axis=1, initial=np.inf, where=mine.selected >= 0
        )
        sure = ~((mine.runner_up >= 0) & (last - mine.runner_up_scores < CLOSE))
        assert sure.mean() > 0.9
        for t in np.flatnonzero(sure):
            kept = [{int(e): i for i, e in enumerate(x.selected[t]) if e >= 0} for x in (mine, other)]
            assert kept[0].keys() == kept[1].keys(), t
            for e, i in kept[0].items():
                j = kept[1][e]
                assert np.abs(mine.selected_probs[t, :, i] - other.selected_probs[t, :, j]).max() < HALF
                assert abs(mine.selected_scores[t, i] - other.selected_scores[t, j]) < 1e-3
            if mine.visible_entries(t):
                np.testing.assert_allclose(mine.index_scores(t), other.index_scores(t), atol=1e-3)
    if mine.entry_probs is not None:
        assert mine.entry_probs.shape == other.entry_probs.shape
        assert np.abs(mine.entry_probs.astype(float) - other.entry_probs).max() < HALF
    for name in ("window_probs", "sink_probs"):
        difference = np.abs(getattr(mine, name)[sure].astype(float) - getattr(other, name)[sure])
        assert difference.max(initial=0.0) < HALF, name


def same(mine: Trace, other: Trace) -> None:
    assert mine.length == other.length and len(mine.layers) == len(other.layers)
    np.testing.assert_array_equal(mine.token_ids, other.token_ids)
    for a, b in zip(mine.layers, other.layers, strict=True):
        compare(a, b)


def test_our_trained_v4_in_transformers_leaves_the_trace_our_recorder_leaves(transformers_oracle, tmp_path):
    model = wb.load("tiny-v4")
    checkpoint.save(model, tmp_path / "m", dtype=torch.float32)
    theirs = (
        transformers_oracle.DeepseekV4ForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager").float().eval()
    )
    prompt = "The code of apple is 37. " + "Now for something else, a line of text. " * 12 + "The code of apple is"
    expected = ours(model, prompt, 5)
    with torch.inference_mode(), wb.attach(theirs, model.tokenizer) as seen:
        ids = torch.as_tensor(expected.token_ids[: expected.prompt_length][None].astype(np.int64))
        theirs.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)
    found = seen.trace
    assert not hooks(theirs)
    assert found.length > expected.prompt_length and found.prompt_length == expected.prompt_length
    run = ours(model, found.token_ids.tolist(), 0)
    same(run, found)
    assert found.config == expected.config and "attached" in found.label
    assert found.token_texts == run.token_texts
    assert (
        found.top_ids.shape == (found.steps, 5)
        and found.next_ids[:-1].tolist() == found.token_ids[found.step_starts[1:]].tolist()
    )
    widget = AttentionExplorer(found)
    assert widget.tile is not None
    assert "No cache was recorded" in KVCacheGrowth(found).panel.value
    again = Trace.load(found.save(tmp_path / "trace"))
    same(found, again)


FAMILIES = {"V4": oracles.oracle_model, "V3.2": oracles.v32_oracle, "MLA": oracles.v3_oracle, "llama": oracles.llama_oracle}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("new", [0, 7])
def test_random_models_leave_the_trace_our_recorder_leaves(transformers_oracle, tmp_path, family, new):
    extra = {"index_n_heads": 16} if family in ("V4", "V3.2") else {}
    config, theirs = FAMILIES[family](3, **extra)
    theirs.save_pretrained(tmp_path)
    ids = drawn(71, config.vocab_size)
    same(ours(checkpoint.load(tmp_path), ids[0].tolist(), 0), listened(theirs, ids, new))


def tiny(transformers: Any, name: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 128, "attn_implementation": "eager"}
    config = getattr(transformers, f"{name}Config")(**(sizes | settings))
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Mistral"])
def test_sliding_windows_and_dense_layers_of_other_families(transformers_oracle, name):
    sliding = {"sliding_window": 5}
    if name != "Mistral":
        sliding |= {"use_sliding_window": True, "max_window_layers": 1}
    model = tiny(transformers_oracle, name, **sliding)
    ids = drawn(23, 50)
    trace = listened(model, ids, 6)
    with torch.inference_mode():
        expected = model(ids, output_attentions=True, use_cache=False).attentions
    assert {x.kind for x in trace.layers} == ({"window"} if name == "Mistral" else {"gqa", "window"})
    for layer, whole in zip(trace.layers, expected, strict=True):
        for t in range(23):
            row = whole[0, :, t].numpy()
            if layer.kind == "gqa":
                assert np.abs(layer.entry_probs[t] - row).max() < HALF
            else:
                wide = np.pad(row, ((0, 0), (4, 0)))[:, t : t + 5]
                assert np.abs(layer.window_probs[t] - wide).max() < HALF and abs(wide.sum(1) - 1.0).max() < HALF
    assert AttentionExplorer(trace).tile is not None


def test_a_fused_kernel_is_refused_with_the_way_out(transformers_oracle):
    model = tiny(transformers_oracle, "Qwen3", attn_implementation="sdpa")
    with pytest.raises(InputError, match=r'attn_implementation="eager"'):
        wb.attach(model)
    model.set_attn_implementation("eager")
    assert len(listened(model, drawn(5, 50), 0).layers) == 3
    with wb.attach(model), pytest.raises(WorkbenchError, match="returned no probabilities"):
        model.set_attn_implementation("sdpa")  # behind our back
        model(drawn(5, 50))
    assert not hooks(model)


def test_hooks_go_after_an_error_and_what_was_read_before_stays(transformers_oracle):
    model = tiny(transformers_oracle, "Qwen3")
    ids = drawn(9, 50)
    with pytest.raises(RuntimeError, match="stop"), torch.inference_mode(), wb.attach(model) as seen:
        past = model(ids, use_cache=True).past_key_values
        late = model.model.layers[1].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        model(ids[:, :1], past_key_values=past, use_cache=True)
    late.remove()
    assert not hooks(model) and seen.trace.length == 9
    assert {x.length for x in seen.trace.layers} == {9}


def test_a_new_sequence_begins_anew_and_half_a_one_is_refused(transformers_oracle):
    model = tiny(transformers_oracle, "Qwen3")
    a, b = drawn(9, 50, 1), drawn(6, 50, 2)
    with torch.inference_mode():
        past = model(a, use_cache=True).past_key_values
        with wb.attach(model) as seen:
            with pytest.raises(WorkbenchError, match="nothing was recorded"):
                _ = seen.trace
            with pytest.raises(WorkbenchError, match="before the prompt is read"):
                model(b, past_key_values=past, use_cache=True)
            model(a)
            model(b)
            with pytest.raises(InputError, match="padded"):
                model(b, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]))
            with pytest.raises(InputError, match="already attached"):
                seen.__enter__()
    assert seen.trace.token_ids.tolist() == b[0].tolist() and not hooks(model)


def test_beams_that_exchange_rows_are_refused_and_greedy_rows_are_not(transformers_oracle):
    model = tiny(transformers_oracle, "Qwen3", pad_token_id=0, eos_token_id=None)
    ids = drawn(9, 50)
    with torch.inference_mode():
        with wb.attach(model), pytest.raises(WorkbenchError, match="num_beams=1"):
            model.generate(ids, max_new_tokens=12, num_beams=4, do_sample=False)
        for rows in (1, 2):
            with wb.attach(model) as seen:
                out = model.generate(ids.expand(rows, -1), max_new_tokens=8, do_sample=False)
            assert seen.trace.token_ids.tolist() == out[0, :-1].tolist()
    assert not hooks(model)


def test_a_mask_without_its_name_dropout_and_a_tokenizer_that_cannot_decode_are_refused(transformers_oracle):
    model = tiny(transformers_oracle, "Qwen3", attention_dropout=0.5)
    with wb.attach(model), pytest.raises(InputError, match="padded"):
        model(drawn(6, 50), torch.tensor([[0, 1, 1, 1, 1, 1]]))
    with pytest.raises(InputError, match=r"model.eval\(\)"), wb.attach(model.train()):
        pass
    assert not hooks(model)
    with pytest.raises(InputError, match="decode"):
        wb.attach(model.eval(), "a name")


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_the_callers_own_may_hide_tokens_but_not_show_later_ones(transformers_oracle, additive):
    model = tiny(transformers_oracle, "Qwen3")
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    for seen, refused in (
        (causal, False),
        (causal.tril(-1).logical_or(torch.eye(6).bool()), False),
        (causal.logical_not(), True),
    ):
        mask = seen[None, None]
        if additive:
            mask = torch.zeros(1, 1, 6, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
        with wb.attach(model) as attached:
            if refused:
                with pytest.raises(InputError, match="lets tokens see later ones"):
                    model(drawn(6, 50), attention_mask=mask)
            else:
                model(drawn(6, 50), attention_mask=mask)
                assert attached.length == 6
    assert not hooks(model)


def test_another_thread_and_models_that_are_not_known(transformers_oracle, tmp_path: Path):
    import threading

    model = tiny(transformers_oracle, "Qwen3")
    with wb.attach(model) as seen:
        other = threading.Thread(target=lambda: model(drawn(4, 50)))
        other.start()
        other.join()
        assert seen.length == 0
    for stranger in (torch.nn.Linear(2, 2), SimpleNamespace(), transformers_oracle.GPT2LMHeadModel):
        with pytest.raises(InputError, match="attach knows"):
            wb.attach(stranger)
