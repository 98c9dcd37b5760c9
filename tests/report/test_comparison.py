"""The table of a comparison: hand-made results, hand-computed cells."""

from __future__ import annotations

import pytest

from nulsq_cli.report import comparison, plots


def result(method, bits, seed, top1):
    return {"method": method, "bits": bits, "seed": seed, "best": {"top1": top1}, "init": {"top1": top1 / 2}}


RESULTS = [
    result("lsq", "2/2", 2, 62.0), result("lsq", "2/2", 1, 60.0), result("nulsq-a", "2/2", 1, 64.0),
    {"method": "nulsq-a", "bits": "2/2", "seed": 2, "failed": "training diverged"}, result("lsq", "4/4", 1, 70.0),
]  # fmt: skip


def cells():
    return comparison.gather(RESULTS, ["lsq", "nulsq-a"], ["2/2", "4/4"], {("lsq", "2/2"): 64.51})


def test_a_cell_has_mean_spread_and_seed_count_over_its_finished_runs():
    lsq, _, nulsq, empty = cells()
    assert (lsq.mean, lsq.seeds, lsq.top1) == (61.0, [1, 2], [60.0, 62.0])
    assert abs(lsq.spread - 2**0.5) < 1e-12
    assert (nulsq.mean, nulsq.spread, nulsq.failed) == (64.0, None, {"2": "training diverged"})
    assert (empty.mean, empty.words()) == (None, "-")


def test_the_table_says_before_after_spread_and_the_papers_figure_and_marks_the_best():
    columns, table = comparison.rows(cells())
    assert columns == ["method", "2/2", "4/4"]
    assert table[0] == ["lsq", "30.50 → 61.00 ± 1.41 (n=2) (paper 64.51)", "35.00 → 70.00 (n=1) *"]
    assert table[1] == ["nulsq-a", "32.00 → 64.00 (n=1) *", "-"]


def test_one_seed_everywhere_needs_no_count():
    only = [r for r in RESULTS if r["seed"] == 1]
    table = comparison.rows(comparison.gather(only, ["lsq", "nulsq-a"], ["2/2", "4/4"], {}))[1]
    assert table == [["lsq", "30.00 → 60.00", "35.00 → 70.00 *"], ["nulsq-a", "32.00 → 64.00 *", "-"]]


def test_markdown_lists_failures():
    page = comparison.markdown(cells(), "net", ["one note"])
    assert "| method | 2/2 | 4/4 |\n|---|---|---|\n| lsq |" in page
    assert "- nulsq-a 2/2, seed 2: training diverged" in page


def accuracies(**worst):
    """Of each method at 2/2, and 88 % at 4/4."""
    found = [(method, at) for method, low in worst.items() for at in (("2/2", low), ("4/4", 88.0))]
    return [comparison.Cell(method, bits, [top1], [0.0], [1], {}) for method, (bits, top1) in found]


def test_a_method_far_below_its_neighbours_does_not_flatten_the_picture_of_all():
    others = {"lsq": 82.0, "uniq": 83.0, "pact": 78.0}
    assert plots._floor(accuracies(**others, dorefa=46.0)) == 78.0
    assert plots._floor(accuracies(**others, dorefa=70.0)) == 70.0  # 8 below the next, that 10 below the best
    assert plots._floor(accuracies(lsq=82.0, dorefa=46.0)) == 46.0 and plots._floor([]) == 0.0


def test_names_stay_inside_the_picture_apart_and_in_order():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    axis.set_ylim(0.0, 10.0)
    plots._name_ends(axis, [(0.0, y, f"m{i}", "k") for i, y in enumerate((9.8, 9.7, 9.9, 9.6, 0.1))], 1.0, 0.8)
    places = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert sorted(places, key=places.get) == ["m4", "m3", "m1", "m0", "m2"]
    heights = sorted(places.values())
    assert heights[0] >= 0.4 and heights[-1] <= 9.6 + 1e-9
    assert all(b - a >= 0.8 - 1e-9 for a, b in zip(heights, heights[1:], strict=False))
