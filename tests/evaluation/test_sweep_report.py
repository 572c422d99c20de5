"""The report of a sweep: its table, which pictures there are, what they show, and the page against its data."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from raydist.evaluation.figures import COLOURS, graded
from raydist.evaluation.sweep_axes import columns_of
from raydist.evaluation.sweep_curves import draw_trial_curves
from raydist.evaluation.sweep_marginals import draw_marginals, effect
from raydist.evaluation.sweep_page import page_data, write_page
from raydist.evaluation.sweep_parallel import draw_parallel_coordinates
from raydist.evaluation.sweep_pareto import draw_pareto
from raydist.evaluation.sweep_records import Goal, TrialRecord, pareto_front
from raydist.evaluation.sweep_report import ranking_table, write_report

BOUND = "validation/bound_nats_per_token"
GOALS = [Goal(BOUND), Goal("tokens_per_forward", "max")]


def curve(*values):
    return [(10 * index, value) for index, value in enumerate(values, start=1)]


def grid():
    """Two schedules by three rates; what each adds to the metric is known."""
    records = []
    for schedule, plus in (("linear", 0.0), ("cosine", 0.5)):
        for rate, minus in ((1e-3, 0.0), (1e-2, 0.1), (1e-1, 0.2)):
            parameters = {"path": {"schedule": {"name": schedule}}, "lr": rate}
            curves = {BOUND: curve(5.0, 3.0 + plus - minus), "tokens_per_forward": curve(1.0, 1.0 + plus)}
            records.append(
                TrialRecord(f"t{len(records)}", parameters, "finished", curves, f"runs/{len(records)}", 20, 75)
            )
    return records


def poor():
    """A sweep in which everything goes wrong that can."""
    return [
        TrialRecord(
            "a", {"x": 1}, "finished", {BOUND: curve(2.0, 1e9), "tokens_per_forward": curve(1.0)}, None, 20, 1.0
        ),
        TrialRecord("b", {"x": 2, "y": "$odd_{$ <b>"}, "stopped", {BOUND: curve(3.0)}, None, 10, 1.0),
        TrialRecord("c", {"x": 3}, "failed", {BOUND: curve(3.0, math.nan)}, None, 15, 1.0),
        TrialRecord("d", {"x": 4}, "waiting"),
    ]


def pixels(path):
    from matplotlib.image import imread

    return np.asarray(imread(path))[..., :3]


def area(image, colour):
    """Pixels that have a colour."""
    from matplotlib.colors import to_rgb

    return int((np.abs(image - np.array(to_rgb(colour))).max(axis=-1) < 0.02).sum())


def test_the_table_ranks_and_names_what_varies():
    table = ranking_table([*grid(), *poor()[2:]], GOALS[:1])
    assert table.columns[:2] == ["#", "trial"]
    assert table.columns[-4:] == ["step", "bound_nats_per_token", "state", "time"]
    assert table.rows[0][:2] == ["1", "t2"]
    assert [row[0] for row in table.rows] == ["1", "2", "3", "4", "5", "6", "", ""]
    assert table.rows[0][-4:] == [20, 2.8, "finished", "1m15s"]
    assert table.rows[-1][-3:] == [None, "waiting", ""]


def test_with_two_goals_the_front_carries_a_star():
    records = grid()
    table = ranking_table(records, GOALS)
    starred = {row[1] for row in table.rows if row[0].endswith("*")}
    assert starred == {record.name for record in pareto_front(records, GOALS)} == {"t2", "t5"}


def test_a_report_has_every_picture_that_its_trials_have_data_for(tmp_path):
    from matplotlib import _pylab_helpers

    full = write_report(grid(), GOALS, folder=str(tmp_path / "full"), title="sweep")
    assert [path.rsplit("/", 1)[1] for path in full] == [
        "metric_against_step.png", "parallel_coordinates.png", "marginals.png", "pareto_front.png", "sweep.html",
    ]  # fmt: skip
    for path in full[:-1]:
        assert pixels(path).std() > 0.01
    one_goal = write_report(grid()[:1], GOALS[:1], folder=str(tmp_path / "one"), title="sweep")
    assert [path.rsplit("/", 1)[1] for path in one_goal] == ["metric_against_step.png", "sweep.html"]
    two = write_report(grid()[:2], GOALS[:1], folder=str(tmp_path / "two"), title="sweep")
    assert [path.rsplit("/", 1)[1] for path in two] == [path.rsplit("/", 1)[1] for path in full if "pareto" not in path]
    waiting = write_report([poor()[3]], GOALS, folder=str(tmp_path / "waiting"), title="sweep")
    assert [path.rsplit("/", 1)[1] for path in waiting] == ["sweep.html"]
    assert [path.rsplit("/", 1)[1] for path in write_report([], GOALS, folder=str(tmp_path), title="none")] == [
        "sweep.html"
    ]
    assert _pylab_helpers.Gcf.get_all_fig_managers() == []


@pytest.mark.parametrize("draw", [draw_trial_curves, draw_parallel_coordinates, draw_marginals, draw_pareto])
@pytest.mark.parametrize("records", [poor(), poor()[1:2], []], ids=["poor", "stopped", "none"])
def test_poor_sweeps_have_pictures_too(tmp_path, draw, records):
    draw(records, GOALS, str(tmp_path / "picture.png"), "a sweep with $odd_{$ names")
    assert pixels(tmp_path / "picture.png").shape[2] == 3


def test_where_trials_were_stopped_the_pictures_compare_at_the_last_step_of_all(tmp_path):
    """Parallel coordinates get one more axis, and the marginals of stopped trials a median, which they had not before."""

    def trials(state):
        return [
            TrialRecord(
                f"t-{index}", {"a": index % 2, "b": index // 2}, "finished" if index == 0 else state,
                {BOUND: curve(5.0, 4.0 - 0.1 * index, *([2.0] if index == 0 else []))}, num_steps=20,
            )
            for index in range(4)
        ]  # fmt: skip

    for state in ("stopped", "running"):
        draw_parallel_coordinates(trials(state), GOALS[:1], str(tmp_path / f"{state}-lines.png"), "")
        draw_marginals(trials(state), GOALS[:1], str(tmp_path / f"{state}-marginals.png"), "")
    assert pixels(tmp_path / "stopped-lines.png").shape[1] > pixels(tmp_path / "running-lines.png").shape[1]
    bars = [area(pixels(tmp_path / f"{state}-marginals.png"), COLOURS[1]) for state in ("stopped", "running")]
    assert bars[0] > 50
    assert bars[1] == 0


def test_values_far_apart_are_drawn_on_a_logarithm(tmp_path):
    """So that the best curves are not one line at the bottom: they take 60 pixels here, and 13 on a linear axis."""
    records = [
        TrialRecord(f"t-{index}", {"a": index}, "finished", {BOUND: curve(9.0, value)}, num_steps=20)
        for index, value in enumerate([1.0, 1.4, 16.0, 16.0])
    ]
    draw_trial_curves(records, GOALS[:1], str(tmp_path / "curves.png"), "")
    image = pixels(tmp_path / "curves.png")[:, :900]  # without the legend
    lowest = [max(row for row in range(len(image)) if area(image[row : row + 1], colour)) for colour in COLOURS[:2]]
    assert lowest[0] - lowest[1] > 40


def test_the_best_six_trials_have_colours_and_the_rest_is_grey(tmp_path):
    records = grid()
    draw_trial_curves(records[:2], GOALS[:1], str(tmp_path / "two.png"), "")
    draw_trial_curves(records, GOALS[:1], str(tmp_path / "six.png"), "")
    assert [area(pixels(tmp_path / "two.png"), colour) > 50 for colour in COLOURS] == [True, True, *[False] * 4]
    assert all(area(pixels(tmp_path / "six.png"), colour) > 50 for colour in COLOURS)


def test_the_best_line_is_dark_and_the_worst_is_pale(tmp_path):
    records = grid()
    draw_parallel_coordinates(records, GOALS[:1], str(tmp_path / "all.png"), "")
    image = pixels(tmp_path / "all.png")
    assert area(image, graded(1.0)) > area(image, graded(0.5)) + 500
    draw_parallel_coordinates(records[1:2], GOALS[:1], str(tmp_path / "one.png"), "")
    assert area(pixels(tmp_path / "one.png"), graded(0.0)) < 50


def test_the_effect_of_a_parameter_is_the_distance_of_its_medians():
    effects = {column.label: effect(grid(), column, GOALS[0]) for column in columns_of(grid())}
    assert effects == {"schedule": pytest.approx(0.5), "lr": pytest.approx(0.2)}
    stopped = [TrialRecord("s", {"path": {"schedule": {"name": "odd"}}, "lr": 1.0}, "stopped", {BOUND: curve(99.0)})]
    (schedule, _) = columns_of([*grid(), *stopped])
    assert effect([*grid(), *stopped], schedule, GOALS[0]) == pytest.approx(0.5)


def test_the_effect_of_a_number_with_many_values_is_that_of_its_quarters():
    records = [TrialRecord(f"{index:02d}", {"x": index}, "finished", {BOUND: curve(index / 16)}) for index in range(16)]
    assert effect(records, columns_of(records)[0], GOALS[0]) == pytest.approx((13.5 - 1.5) / 16)


def test_a_front_of_three_goals_is_refused(tmp_path):
    with pytest.raises(ValueError, match="two goals"):
        draw_pareto(grid(), [*GOALS, Goal("x")], str(tmp_path / "x.png"), "")
    with pytest.raises(ValueError, match="at least one goal"):
        write_report(grid(), [], folder=str(tmp_path), title="")


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_holds_its_data_escapes_what_it_shows_and_needs_no_network(tmp_path):
    path = tmp_path / "sweep.html"
    write_page([*grid(), *poor()], GOALS, str(path), "</script><b>")
    page = path.read_text(encoding="utf-8")
    parser = Tags()
    parser.feed(page)
    assert parser.tags.count("script") == 1
    assert parser.links == []
    assert "http" not in page.replace(json.dumps(page_data([*grid(), *poor()], GOALS)), "")
    assert "<h1>&lt;/script&gt;&lt;b&gt;</h1>" in page
    assert "7 finished, 1 stopped, 1 failed, 1 waiting" in page
    data = json.loads(re.search(r"const data = (.*);\n", page).group(1))
    assert data == json.loads(json.dumps(page_data([*grid(), *poor()], GOALS)))


def test_the_page_data_is_complete_and_ranked():
    data = page_data([*grid(), *poor()], GOALS)
    assert [trial["name"] for trial in data["trials"]][:2] == ["t2", "t1"]
    assert [trial["place"] for trial in data["trials"]] == [1, 2, 3, 4, 5, 6, 7, None, None, None]
    assert [axis["goal"] for axis in data["axes"]][-2:] == [True, True]
    parameters = [axis for axis in data["axes"] if not axis["goal"]]
    for trial in data["trials"]:
        assert len(trial["heights"]) == len(data["axes"])
        assert len(trial["texts"]) == len(trial["numbers"]) == len(trial["at"]) == len(parameters)
        assert set(trial["curves"]) == {metric["name"] for metric in data["metrics"]}
    best, failed = data["trials"][0], next(trial for trial in data["trials"] if trial["name"] == "c")
    assert best["heights"][-2] == pytest.approx(1.0)
    assert best["colour"] == graded(1.0)
    assert failed["heights"][-2:] == [None, None]
    assert failed["curves"][BOUND] == [(10, 3.0)]


def test_long_curves_are_thinned_and_keep_their_last_point():
    points = [(step, 1.0 / step) for step in range(1, 1000)]
    (trial,) = page_data([TrialRecord("a", {}, "finished", {BOUND: points})], GOALS[:1])["trials"]
    thinned = trial["curves"][BOUND]
    assert len(thinned) <= 200
    assert thinned[-1] == points[-1]
    assert set(thinned) <= set(points)
