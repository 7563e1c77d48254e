"""The charts about hiding: points are the measured shares, the line is the formula, the table is the virtual clock's."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from workbench.cost.fetch import Setting, engram_models, fetch_of, modelled
from workbench.devices import devices, drives, links
from workbench.errors import InputError
from workbench.figures.hidden import break_even_html, hidden_by_window
from workbench.memory.overlap import overlap_experiment

WAYS = (links["pcie4"], drives["nvme-gen4"])
PREFILL = Setting(model=engram_models["v4.1-flash"], device=devices["h100"], tokens=1)
DECODE = replace(PREFILL, phase="decode")


def modelled_results(*windows_ms, rows=1000, layers=(1,)):
    return [overlap_experiment("modelled", window_ms=w, rows_per_lookup=rows, layers=layers) for w in windows_ms]


def test_points_are_the_measured_shares_and_the_line_is_window_over_lookup():
    lookup_ms = 1000 * 110e-6  # 100 ns a row and 10 to hash it
    line, points = hidden_by_window(modelled_results(lookup_ms / 4, lookup_ms / 2, 2 * lookup_ms)).data
    assert list(points.x) == pytest.approx([lookup_ms / 4, lookup_ms / 2, 2 * lookup_ms])
    assert list(points.y) == pytest.approx([25, 50, 100])
    on_line = dict(zip(line.x, line.y, strict=True))
    assert max(line.y) == 100 and all(y == pytest.approx(min(100, 100 * x / lookup_ms)) for x, y in on_line.items())


def test_layers_further_up_have_all_blocks_before_them():
    line, points = hidden_by_window(modelled_results(0.02, 0.04, layers=(2,))).data
    assert list(points.x) == pytest.approx([0.04, 0.08]) and points.y[0] == pytest.approx(100 * 0.04 / 0.11)


def test_the_title_says_what_is_measured_and_what_is_modelled():
    fig = hidden_by_window(modelled_results(0.05))
    assert "modelled on modelled device" in fig.layout.title.text and "the line is modelled" in fig.layout.title.text
    assert "1,000 rows takes 0.1 ms alone" in fig.layout.title.text


@pytest.mark.parametrize(
    "results",
    [[], [*modelled_results(0.1), *modelled_results(0.1, rows=7)], modelled_results(0.1, layers=(1, 2))],
    ids=["none", "other rows", "two layers"],
)
def test_results_that_are_not_alike_are_one_clear_error(results):
    with pytest.raises(InputError, match="one Engram layer"):
        hidden_by_window(results)


def cells(html):
    """Row name -> its cells as text."""
    rows = re.findall(r"<tr><th scope='row'>(.*?)</th>(.*?)</tr>", html)
    return {name: re.findall(r"<td.*?>(.*?)</td>", body) for name, body in rows}


def test_the_table_is_the_virtual_clocks():
    table = cells(break_even_html(PREFILL, DECODE, WAYS, (512, 8192), (1,)))
    assert list(table) == [
        *(f"prefill, chunk of {n}, layer {layer}" for layer in (1, 14) for n in ("512", "8,192")),
        *(f"decode, batch of 1, layer {layer}" for layer in (1, 14)),
    ]
    clock = modelled(replace(PREFILL, tokens=8192, layers=(1,), drive=drives["nvme-gen4"])).layers[0]
    window, pcie, nvme, needed = table["prefill, chunk of 8,192, layer 1"]
    assert float(window.removesuffix(" ms")) == pytest.approx(1e3 * clock.start_s, rel=0.01)
    assert pcie == "100 %<small>no stall</small>"
    share, stall = re.fullmatch(r"(\d+) %<small>stall ([\d,.]+) ms</small>", nvme).groups()
    assert int(share) == int(100 * clock.hidden_fraction) and float(stall) == pytest.approx(1e3 * clock.stall_s, rel=0.01)
    assert float(needed.removesuffix(" GB/s")) == pytest.approx(8192 * 24 * 264 / clock.start_s / 1e9, rel=0.01)


def test_a_hundred_percent_means_that_nothing_is_left():
    """One token more than hides gives a stall far below a percent of the fetch."""
    slow = replace(PREFILL, threads=1, link=links["pcie3"])
    fetch = fetch_of(replace(slow, tokens=8192), 1).total_s
    for n in range(1, 60):
        share, stall = re.match(r"(\d+) %<small>(.*?)</small>", cells(break_even_html(slow, DECODE, WAYS[:1], (n,), (1,)))[
            f"prefill, chunk of {n}, layer 1"][1]).groups()  # fmt: skip
        assert (share == "100") == (stall == "no stall")
    assert fetch > 0


def test_a_kernel_that_cannot_read_a_drive_leaves_drives_to_the_host():
    kernel = [replace(setting, path="uva") for setting in (PREFILL, DECODE)]
    table = break_even_html(*kernel, WAYS, (512,), (1,))
    drive = cells(table)["prefill, chunk of 512, layer 14"][2]
    assert drive == cells(break_even_html(PREFILL, DECODE, WAYS, (512,), (1,)))["prefill, chunk of 512, layer 14"][2]
    assert "a kernel on the device reads host memory itself" in table


def test_the_table_says_that_it_is_modelled_with_how_many_cards_and_threads():
    table = break_even_html(replace(PREFILL, cards=8, threads=1), DECODE, WAYS, (512,), (1,))
    assert "Modelled, nothing was measured" in table and "8 × H100 SXM" in table and "(1 thread)" in table
