from dataclasses import replace

import pytest

from workbench.errors import InputError
from workbench.figures.layers import layer_costs
from workbench.measurements import LayerMeasurement

CSA = LayerMeasurement(
    preset="v4-flash",
    kind="csa",
    length=8192,
    storage="bf16",
    device="CPU (<some> & other, 2 cores)",
    held={"window": 100, "compressed": 900},
    read={"window": 100, "compressed": 50},
    weight_bytes=850,
    step_s=0.004,
    steps=8,
    bandwidth_bytes_per_s=1e6,
)
LATER = replace(CSA, length=65536, held={"window": 100, "compressed": 7200}, step_s=0.005)
GQA = replace(CSA, preset="gqa-8", kind="gqa", held={"kv": 5000}, read={"kv": 5000})


def panel(fig, axis):
    return [data for data in fig.data if data.xaxis == axis]


def test_a_line_for_each_layer_shows_what_was_measured_in_order_of_length():
    fig = layer_costs([LATER, GQA, CSA])
    held, read = panel(fig, "x")[0], panel(fig, "x2")[0]
    assert list(held.x) == [8192, 65536] and list(held.y) == [1000, 7300] and list(read.y) == [150, 150]
    step, floor = [data for data in panel(fig, "x3") if len(data.x) == 2]
    assert list(step.y) == pytest.approx([4.0, 5.0]) and list(floor.y) == pytest.approx([1.0, 1.0])
    assert floor.line.dash == "dot" and {data.marker.symbol for data in panel(fig, "x")} == {"circle", "square"}
    assert all(fig.layout[f"{axis}axis{n}"].type == "log" for axis in "xy" for n in ("", "2", "3"))


def test_the_title_says_one_layer_or_a_total_and_where_it_was_measured():
    one, total = layer_costs([CSA]), layer_costs([CSA.over_layers(21), replace(GQA, length=9).over_layers(61)])
    assert "one layer, measured" in one.layout.title.text and "&lt;some&gt; &amp; other" in one.layout.title.text
    assert "measured per layer x layers" in total.layout.title.text
    assert {data.name for data in panel(total, "x")} == {"v4-flash csa, bf16, x 21", "gqa-8 gqa, bf16, x 61"}
    stored = LayerMeasurement.from_dict(CSA.to_dict())
    assert "recorded on" in layer_costs([stored]).layout.title.text


def test_nothing_to_draw_and_layers_mixed_with_totals_are_refused():
    with pytest.raises(InputError, match="no measurement"):
        layer_costs([])
    with pytest.raises(InputError, match="apart"):
        layer_costs([CSA, GQA.over_layers(61)])
