import pytest

from workbench.errors import InputError
from workbench.figures.needle import needle_chart


def result(k: int, recall: float, hits: tuple[float, float], model: str = "m") -> dict:
    return {
        "model": f"{model} (toy, trained), measured on CPU",
        "topk": k,
        "questions": 37,
        "recall": recall,
        "recall_chance": 1 / 90,
        "hits": {"1 key": hits[0], "3 end": hits[1]},
        "hit_chance": 0.06 * k,
    }


RATES = {
    "trained": [result(k, 0.9, (0.2, 0.98)) for k in (4, 2, 1)],
    "untrained": [result(k, 0.0, (0.3, 0.1 * k), "<other>") for k in (4, 2, 1)],
}


def line(fig, name):
    return next(trace for trace in fig.data if trace.name == name)


def test_recall_and_one_lookup_of_each_model_stand_beside_their_chance():
    fig = needle_chart(RATES)
    assert line(fig, "trained: answered right").y == (90.0, 90.0, 90.0)
    assert line(fig, "trained: layer 3, at the end, keeps it").y == pytest.approx((98, 98, 98))
    # The lookup is the trained model's best one, also where the untrained one did better elsewhere: no picking of luck.
    assert line(fig, "untrained: layer 3, at the end, keeps it").y == pytest.approx((40, 20, 10))
    assert line(fig, "chance to keep it by luck").y == pytest.approx((24, 12, 6))
    assert line(fig, "chance to answer right").y == pytest.approx((100 / 90,) * 3)
    assert all(tuple(trace.x) == ("4", "2", "1") for trace in fig.data)


def test_the_axis_goes_from_many_entries_to_one_and_the_title_says_what_is_shown():
    fig = needle_chart(RATES)
    assert fig.layout.xaxis.categoryarray == ("4", "2", "1") and fig.layout.xaxis.type == "category"
    title = fig.layout.title.text
    assert "37 questions" in title and "toy, trained" in title and "measured on CPU" in title and "&lt;other&gt;" in title


def test_a_guess_is_a_mark_at_the_smallest_topk():
    assert not [trace for trace in needle_chart(RATES).data if trace.name == "your guess"]
    guess = line(needle_chart(RATES, 35), "your guess")
    assert (guess.x, guess.y, guess.mode) == (("1",), (35,), "markers")


@pytest.mark.parametrize("rates", [{}, {"trained": []}])
def test_nothing_to_draw_is_refused(rates):
    with pytest.raises(InputError, match="at least one result"):
        needle_chart(rates)
