"""Points of the frontier as records: names, files, bytes, grids and the front; and those that ship."""

import json
from dataclasses import replace

import pytest

import workbench as wb
from workbench.errors import InputError
from workbench.frontier import (
    SCORED_LENGTH,
    SHIPPED,
    Point,
    Variant,
    by_shape,
    frontier_points,
    grid,
    pareto,
    read_point,
    read_points,
    table_lines,
    write_point,
)
from workbench.training import light

SCORES = {"recall": 0.5, "chance": 1 / 32, "questions": 100, "beyond": 32, "length": SCORED_LENGTH, "text_loss": 1.5}


def point(recall: float = 0.5, **settings) -> Point:
    return Point(Variant(**settings), SCORES | {"recall": recall}, {"name": "x"}, {"device": "CPU (test)", "cpu_seconds": 1.0})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratio": 0}, "ratio"),
        ({"ratio": 4.0}, "ratio"),
        ({"topk": 1000}, "topk"),
        ({"topk": True}, "topk"),
        ({"hca_share": 0.3}, "hca_share"),
        ({"hca_share": True}, "hca_share"),
        ({"engram": 1}, "engram"),
        ({"seed": -1}, "seed"),
        ({"steps": 0}, "steps"),
    ],
)
def test_a_variant_out_of_range_is_refused_by_name(settings, said):
    with pytest.raises(InputError, match=f"{said}.*got"):
        Variant(**settings)


def test_names_tell_apart_what_differs_and_the_seed_comes_last():
    variants = [*grid("full", 2), *grid("small", 1, steps=5)]
    assert len({variant.name for variant in variants}) == len(variants) == 114
    assert Variant(ratio=8, topk=2, hca_share=0.5, engram=True, seed=3).name == "m8-k2-hca50-engram-seed3"
    assert Variant(hca_share=1.0).name == "hca100-seed1"


def test_a_grid_has_every_shape_once_before_it_repeats_one():
    small = grid("small", 2)
    half = len(small) // 2
    assert [v.seed for v in small] == [1] * half + [2] * half
    assert [replace(v, seed=1) for v in small[half:]] == small[:half] and len({v.shape for v in small}) == half == 14
    settings = {(v.ratio, v.topk, v.hca_share, v.engram) for v in grid("full")}
    assert len(settings) == 50 and {share for _, _, share, _ in settings} == {0.0, 0.5, 1.0}
    for wrong in (("large", 1), ("small", 0), ("small", 2.0)):
        with pytest.raises(InputError, match="got"):
            grid(*wrong)


def test_bytes_follow_from_the_variant_as_hand_counted():
    # two CSA layers: windows of 16 rows, an entry and its key for 4 symbols; bf16; keys 32 wide, rows 64
    length, entries = 1024, 1024 // 4
    parts = wb.kv_bytes(point(ratio=4).config, length, "bf16")
    assert parts["window"] == 2 * 16 * 64 * 2 and parts["compressed"] == 2 * entries * 64 * 2
    assert parts["index"] == 2 * entries * 32 * 2
    assert point(ratio=4).held(length) == sum(nbytes for part, nbytes in parts.items() if part != "total")
    assert point(ratio=8).held(65536) < 0.6 * point(ratio=4).held(65536)
    assert point(topk=16).held() == point(topk=1).held()  # top-k changes what is read alone
    more = wb.decode_bytes(point(topk=16).config, length, "bf16")["compressed"]
    assert more - wb.decode_bytes(point(topk=1).config, length, "bf16")["compressed"] == 2 * 15 * 64 * 2
    assert point(engram=True).held() > point().held()  # its look-back; it does not shrink the cache


def test_a_point_survives_its_file(tmp_path):
    made = point(ratio=8, seed=2)
    path = write_point(made, tmp_path)
    assert path.name == "m8-k4-hca0-seed2.json" and read_point(path) == made
    assert json.loads(path.read_text())["kv"] == {
        "length": SCORED_LENGTH, "storage": "bf16", "held_bytes": made.held(), "read_bytes": made.read()
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]  # and nothing half-written


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("{", "no point"),
        ("[]", "no point of format"),
        ('{"format": 99}', "no point of format"),
        ('{"format": 1, "scores": {"recall": "high"}}', "scores lack"),
        ('{"format": 1, "scores": {"recall": NaN}}', "scores lack"),
        ("\x00\xff", "no point"),
    ],
)
def test_a_file_that_holds_no_point_is_named(tmp_path, text, said):
    path = tmp_path / "m4-k4-hca0-seed1.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=said) as refused:
        read_point(path)
    assert str(path) in str(refused.value)
    write_point(point(seed=2), tmp_path)
    points, wrong = read_points(tmp_path)
    assert [p.variant.seed for p in points] == [2] and len(wrong) == 1 and str(path) in wrong[0]
    with pytest.raises(InputError, match="sweep again"):
        frontier_points(tmp_path)


def test_a_point_under_another_name_and_an_unknown_setting_are_refused(tmp_path):
    path = write_point(point(), tmp_path)
    other = path.rename(tmp_path / "other.json")
    with pytest.raises(InputError, match="named after its point"):
        read_point(other)
    stored = point().to_dict()
    stored["variant"]["colour"] = "red"
    with pytest.raises(InputError, match="settings"):
        Point.from_dict(stored)


def test_a_folder_that_is_missing_or_empty_says_what_to_do(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="workbench sweep --out"):
            frontier_points(folder)


def test_the_front_is_what_nothing_cheaper_matches():
    places = [(3, 5), (1, 1), (2, 4), (2, 3), (4, 5), (5, 6), (0.5, 0.9)]
    assert pareto(places) == [6, 1, 2, 0, 5] and pareto([]) == []
    for i, (x, y) in enumerate(places):  # by definition, slowly
        beaten = any((a <= x and b >= y) and (a, b) != (x, y) for a, b in places)
        assert (i in pareto(places)) == (not beaten)


def test_seeds_of_a_shape_are_put_together_and_lines_name_every_point():
    points = [point(seed=1), point(seed=2), point(ratio=8)]
    assert [len(group) for group in by_shape(points).values()] == [2, 1]
    lines = table_lines(points)
    assert len(lines) == 4 and all(p.variant.name in line for p, line in zip(points, lines[1:], strict=True))


def test_the_points_that_ship_are_whole_and_say_what_was_measured():
    points = wb.frontier_points()
    assert len(points) >= 6 and len({p.variant.shape for p in points}) >= 6
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 100_000
    for p in points:
        assert p.scores["questions"] > 500 and p.scores["chance"] == 1 / light.VALUES and p.scores["length"] == SCORED_LENGTH
        assert 0 <= p.scores["recall"] <= 1 and p.scores["text_loss"] > light.best_text_loss() - 0.05
        assert p.recipe["seed"] == p.variant.seed and p.trained_with["cpu_seconds"] > 5 and p.trained_with["torch"]
        stored = json.loads((SHIPPED / f"{p.variant.name}.json").read_text())["kv"]
        assert (stored["held_bytes"], stored["read_bytes"]) == (p.held(), p.read())


def test_the_points_that_ship_make_a_picture_worth_looking_at():
    points = wb.frontier_points()
    recalls = [p.scores["recall"] for p in points]
    assert max(recalls) > 0.8 and min(recalls) < 0.4  # variants differ in quality
    by_bytes = sorted(points, key=Point.held)
    assert by_bytes[-1].held() > 4 * by_bytes[0].held()
