from dataclasses import replace

import numpy as np
import pytest

from tests.synthetic import FAMILIES, synthetic_trace
from workbench.config import DenseConfig, HybridConfig, read_config
from workbench.cost import PARTS, dense_kv_bytes, kv_bytes
from workbench.errors import InputError
from workbench.figures.memory import kv_growth, kv_panel_html


def trace_with_heads(heads):
    """A trace whose cache held exactly what the formula says."""
    trace = synthetic_trace(47, prompt_length=31, prefill_chunk=13, heads=heads)
    config = HybridConfig.from_dict(trace.config)
    held = [kv_bytes(config, trace.step_end(step), trace.storage) for step in range(trace.steps)]
    return replace(trace, cache_bytes={part: np.array([h[part] for h in held]) for part in PARTS})


TRACE = trace_with_heads(3)


def line(fig, start):
    return next(data for data in fig.data if data.name.startswith(start))


def test_areas_are_the_recorded_bytes_at_the_tokens_of_each_step():
    fig = kv_growth(TRACE)
    for part in PARTS:
        assert list(line(fig, part).y) == TRACE.cache_bytes[part].tolist()
    assert list(line(fig, "compressed").x) == [13, 26, 31, *range(32, 48)]
    assert TRACE.label in fig.layout.title.text


def test_room_reserved_is_a_line_of_its_own_above_what_is_held():
    held = sum(TRACE.cache_bytes.values())
    assert list(line(kv_growth(TRACE), "held + room").y) == (held + TRACE.cache_reserved).tolist()


def test_a_token_within_a_step_has_a_line_of_its_own_beside_the_step():
    fig = kv_growth(TRACE, 1, token=19)  # its step ends with token 25
    assert [shape.x0 for shape in fig.layout.shapes] == [26, 20]
    assert fig.layout.annotations[0].text == "step 1: 26 tokens; token 19 chosen"
    last = kv_growth(TRACE, 1, token=25)
    assert [shape.x0 for shape in last.layout.shapes] == [26]
    assert last.layout.annotations[0].text == "step 1: 26 tokens"


@pytest.mark.parametrize("step, side", [(0, "left"), (1, "right"), (18, "right")])
def test_what_a_line_says_stays_within_the_chart(step, side):
    assert kv_growth(TRACE, step).layout.annotations[0].xanchor == side


def test_modelled_lines_say_so_and_start_before_the_first_step_ends():
    config = HybridConfig.from_dict(TRACE.config)
    fig = kv_growth(TRACE)
    own, mha = line(fig, "this model"), line(fig, "MHA = GQA-8")
    assert "modelled (formula)" in own.name and "modelled (formula)" in mha.name and "min(8, 3)" in mha.name
    assert own.x[0] == 1 and own.y[-1] == kv_bytes(config, 47, "fp32")["total"]
    assert mha.y[-1] == dense_kv_bytes(config, 47, 3, "fp32")


def test_gqa_has_its_own_line_once_there_are_more_than_eight_heads():
    fig = kv_growth(trace_with_heads(11))
    assert line(fig, "MHA").y[-1] / line(fig, "GQA-8").y[-1] == pytest.approx(11 / 8)


def test_the_logarithmic_chart_stacks_nothing_and_takes_no_logarithm_of_zero():
    trace = replace(TRACE, cache_bytes=TRACE.cache_bytes | {"index": np.maximum(0, TRACE.cache_bytes["index"] - 300)})
    fig = kv_growth(trace, log=True)
    assert fig.layout.yaxis.type == "log" and not any(data.stackgroup for data in fig.data)
    assert line(fig, "index").y[0] is None


def test_the_panel_marks_each_part_that_differs_from_the_formula():
    wrong = TRACE.cache_bytes["tail"].copy()
    wrong[3] += 4
    panel = kv_panel_html(replace(TRACE, cache_bytes=TRACE.cache_bytes | {"tail": wrong}), 3)
    rows = {part: panel.split(f"<th scope='row'>{part}</th>")[1].split("</tr>")[0] for part in (*PARTS, "total")}
    assert "NOT EQUAL by +4" in rows["tail"] and "NOT EQUAL by +4" in rows["total"]
    assert all("= equal" in rows[part] and "NOT" not in rows[part] for part in PARTS if part != "tail")
    assert "NOT EQUAL" not in kv_panel_html(TRACE, 3)


def test_the_panel_puts_numbers_into_the_formula_and_shows_reserved_room_apart():
    panel = kv_panel_html(TRACE, 3)
    assert "n_csa × ⌊L/m⌋ × E <b>= 2 × 8 × 64</b>" in panel  # two layers, 32 tokens in blocks of 4, 16 fp32 values
    assert "4,096 B" in panel.split("</table>")[1]


def test_another_kind_of_model_has_bytes_but_no_formula():
    foreign = replace(TRACE, config={"model_type": "llama"}, cache_bytes={"keys <b>": TRACE.cache_bytes["window"]})
    panel = kv_panel_html(foreign, 3)
    assert "keys &lt;b&gt;" in panel and "no formula" in panel and "equal" not in panel.lower().replace("no formula", "")
    assert not any("modelled" in data.name for data in kv_growth(foreign).data)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shows_the_parts_its_cache_holds(family):
    trace = synthetic_trace(47, prompt_length=31, prefill_chunk=13, kinds=FAMILIES[family])
    held = [part for part, nbytes in trace.cache_bytes.items() if nbytes.any()]
    for log in (False, True):
        fig = kv_growth(trace, 2, log=log)
        for part in held:
            assert [y or 0 for y in line(fig, part).y] == trace.cache_bytes[part].tolist()
        assert not {data.name for data in fig.data} & ({"kv", "window", "compressed", "index"} - set(held))
    panel = kv_panel_html(trace, 2)
    rows = {part: panel.split(f"<th scope='row'>{part}</th>")[1].split("</tr>")[0] for part in held}
    assert all(f"{trace.cache_bytes[part][2]:,}" in row for part, row in rows.items())
    assert ("kv" in held) == (family not in ("deepseek_v4", "deepseek_v41"))


def test_rows_of_every_token_are_hatched():
    fig = kv_growth(synthetic_trace(47, kinds=FAMILIES["deepseek_v32"]))
    assert line(fig, "kv").fillpattern.shape == "/" and not line(fig, "index").fillpattern.shape
    assert len({data.fillcolor for data in fig.data if data.stackgroup}) == 2


def test_a_cache_is_compared_with_dense_ones_it_is_not_itself(monkeypatch):
    def names(config):
        monkeypatch.setattr("workbench.cost.kv_bytes", lambda config, n, storage: {"total": n})
        monkeypatch.setattr("workbench.cost.dense_kv_bytes", lambda config, n, kv_heads, storage: n * kv_heads)
        trace = replace(synthetic_trace(31, kinds=("gqa",)), config=config.to_dict())
        return [data.name.split(",")[0] for data in kv_growth(trace).data if data.name[:3] in ("MHA", "GQA")]

    def dense(heads, kv_heads):
        return DenseConfig(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=8,
            intermediate_size=16,
        )

    assert [names(dense(*heads)) for heads in ((4, 2), (4, 4), (16, 8), (16, 2))] == [["MHA"], [], ["MHA"], ["GQA-8", "MHA"]]
    mla = read_config(synthetic_trace(31, kinds=("mla",)).config)
    assert names(mla) == []  # its heads have keys and values of two widths, and no published dense twin


def test_names_from_a_foreign_file_are_escaped():
    trace = replace(TRACE, model="<img src=x onerror=alert(1)>")
    assert "<img" not in kv_growth(trace).layout.title.text and "<img" not in kv_panel_html(trace, 0)


@pytest.mark.parametrize("step", [-1, 99])
def test_a_step_the_trace_does_not_have_is_refused(step):
    for draw in (kv_growth, kv_panel_html):
        with pytest.raises(InputError, match=f"step {step}"):
            draw(TRACE, step)
