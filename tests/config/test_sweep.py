from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from raydist.config.load import as_overrides, load_recipe, parse_overrides
from raydist.config.schema import KeepBestConfig
from raydist.config.sweep import Sweep, dump_sweep, load_sweep
from raydist.config.sweep_fairness import reported_metrics
from raydist.core.errors import ConfigError

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))

RECIPE = """
model: {preset: debug}
data: {train: some/data, validation: some/held_out, seq_len: 32}
objective: {name: discrete_flow, loss: elbo, path: {name: mixture, schedule: {name: polynomial, power: 2}}}
training:
  num_steps: 40
  batch_rows: 4
  microbatch_rows: 2
  validate_every_steps: 10
  optimizer: {learning_rate: 0.001}
"""
BOUND = "validation/bound_nats_per_token"
HEAD = f"recipe: recipe.yaml\nmetric: {{name: {BOUND}, mode: min}}\n"
SPACE = "space: {training.optimizer.learning_rate: [0.001, 0.01]}\n"


@pytest.fixture
def write(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def write(text: str, *, head: str = HEAD) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(head + text)
        return str(path)

    return write


@pytest.fixture
def load(write):
    def load(text: str, overrides=(), *, head: str = HEAD, overlay=None) -> Sweep:
        return load_sweep(write(text, head=head), overrides, overlay=overlay)

    return load


def refusal(load, text: str, **arguments) -> ConfigError:
    """The one error of loading and validating, which fits one screen."""
    with pytest.raises(ConfigError) as caught:
        load(text, **arguments).validate_trials()
    assert len(str(caught.value).splitlines()) < 15
    return caught.value


def test_a_model_that_cannot_be_is_refused_before_the_first_trial(load) -> None:
    error = refusal(load, "space: {model.overrides: [{num_layers: 2}, {nun_layers: 2}]}")
    assert error.where.endswith("mine.yaml: space.model.overrides")
    assert error.fix == "did you mean 'num_layers'?"
    error = refusal(load, "space: {model.preset: [debug, tiny-1mm]}")
    assert error.where.endswith("mine.yaml: space.model.preset")
    assert error.fix == "did you mean 'tiny-1m'?"


# the grid


def test_a_grid_is_the_product_last_key_fastest(load) -> None:
    sweep = load("space: {training.batch_rows: [4, 8], seed: [0, 1, 2], training.optimizer.learning_rate: [0.1, 0.2]}")
    keys = ("training.batch_rows", "seed", "training.optimizer.learning_rate")
    points = itertools.product([4, 8], [0, 1, 2], [0.1, 0.2])
    assert sweep.grid() == [dict(zip(keys, point, strict=True)) for point in points]


CONDITIONAL = """
space:
  objective.path:
    - {name: mixture, source: {name: mask}}
    - {name: mixture, source: {name: uniform}}
  objective.path.schedule: [{name: linear}, {name: polynomial}]
  objective.path.schedule.power:
    choice: [2, 3]
    when: {objective.path.schedule.name: polynomial, objective.path.source.name: [uniform, previous]}
"""


def test_a_conditional_key_is_there_only_where_its_conditions_hold(load) -> None:
    sweep = load(CONDITIONAL)
    shown = [
        (
            trial["objective.path"]["source"]["name"],
            trial["objective.path.schedule"]["name"],
            trial.get("objective.path.schedule.power"),
        )
        for trial in sweep.grid()
    ]
    assert shown == [
        ("mask", "linear", None),
        ("mask", "polynomial", None),
        ("uniform", "linear", None),
        ("uniform", "polynomial", 2),
        ("uniform", "polynomial", 3),
    ]
    sweep.validate_trials()


def test_a_condition_may_be_about_the_recipe_itself(load) -> None:
    text = (
        "space: {{objective.path.schedule.power: {{choice: [1, 3], when: {{objective.path.schedule.name: {}}}}}, {}}}"
    )
    assert len(load(text.format("polynomial", "seed: [0]")).grid()) == 2
    assert "never holds" in refusal(load, text.format("linear", "seed: [0]")).what


def test_conditions_of_conditions(load) -> None:
    sweep = load(
        """
space:
  objective.path: [{name: mixture, source: {name: mask}}, {name: mixture, source: {name: uniform}}]
  objective.path.schedule: {choice: [{name: cubic}], when: {objective.path.source.name: uniform}}
  objective.path.schedule.slope_at_data: {choice: [1.0, 2.0], when: {objective.path.schedule.name: cubic}}
"""
    )
    assert [trial.get("objective.path.schedule.slope_at_data") for trial in sweep.grid()] == [None, 1.0, 2.0]
    sweep.validate_trials()


# the words of a trial


def test_the_words_of_a_trial_make_its_recipe(load) -> None:
    sweep = load(CONDITIONAL + "overrides: {objective: {time_input: true}, training: {log_every_steps: 5}}\n")
    for trial in sweep.grid():
        config = load_recipe(sweep.recipe_path, sweep.trial_overrides(trial)).config
        path = config.objective.path
        assert path.source.name == trial["objective.path"]["source"]["name"]
        assert path.schedule.name == trial["objective.path.schedule"]["name"]
        assert getattr(path.schedule, "power", 0) == trial.get(
            "objective.path.schedule.power", 2 if path.schedule.name == "polynomial" else 0
        )
        assert (config.training.log_every_steps, config.objective.time_input) == (5, True)
        assert sweep.resolve_trial(trial).config == config


@pytest.mark.parametrize(
    "value",
    [1, 1e-05, 2.5, -3, True, None, "mixture", "true", "1e-3", "null", "a b", "x: y", "s3://a/b", "[1]", "", "~",
     [1, "a", {"b": 2}], {}, "1_000", "0x10", "2026-01-01", "a#b", "a #b", "'"],
)  # fmt: skip
def test_override_words_round_trip(value: object) -> None:
    values = {"a": {"b": value, "c": {"d": 1}}}
    assert parse_overrides(as_overrides(values)) == values


def test_words_on_the_command_line_go_to_the_sweep_or_to_the_recipe(load) -> None:
    sweep = load(
        SPACE + "overrides: {seed: 3}\n", ["name=other", "budget.num_steps=20", "training.log_every_steps=7", "seed=4"]
    )
    assert (sweep.name, sweep.config.budget.num_steps) == ("other", 20)
    config = sweep.recipe.config
    assert (config.training.num_steps, config.training.log_every_steps, config.seed) == (20, 7, 4)
    assert load(SPACE, ["checkpoint.every_steps=5"]).recipe.config.checkpoint.every_steps == 5


# overlays


OVERLAID = (
    SPACE
    + """
overrides: {seed: 1, training.log_every_steps: 5}
search: {name: random, num_trials: 9}
overlays:
  debug:
    search: {name: grid}
    overrides: {seed: 2}
    space: {training.optimizer.learning_rate: [0.1], seed: null, objective.path.schedule: [{name: linear}]}
"""
)


def test_an_overlay_replaces_whole_keys(load) -> None:
    plain, debug = load(OVERLAID), load(OVERLAID, overlay="debug")
    assert plain.config.search.num_trials == 9
    assert (debug.config.search.name, debug.config.search.num_trials) == ("grid", None)
    assert debug.config.overrides == {"seed": 2, "training.log_every_steps": 5}
    assert debug.grid() == [{"training.optimizer.learning_rate": 0.1, "objective.path.schedule": {"name": "linear"}}]
    assert debug.name.startswith("mine-debug-")


def test_no_such_overlay(load) -> None:
    error = refusal(load, OVERLAID, overlay="debgu")
    assert "'debug'" in (error.fix or "")


# searches


RANGES = """
space:
  training.optimizer.learning_rate: {log_uniform: [1.0e-4, 1.0e-2]}
  training.optimizer.weight_decay: {uniform: [0.0, 0.5]}
  seed: {integer: [3, 5]}
  objective.path.schedule: [{name: linear}, {name: polynomial}]
  objective.path.schedule.power: {uniform: [1.0, 3.0], when: {objective.path.schedule.name: polynomial}}
search: {name: random, num_trials: 200, seed: 1}
"""


def test_random_trials_stay_in_range_and_follow_their_law(load) -> None:
    sweep = load(RANGES)
    sweep.validate_trials()
    trials = sweep.random_trials()
    rates = [trial["training.optimizer.learning_rate"] for trial in trials]
    assert all(1e-4 <= rate < 1e-2 for rate in rates)
    assert 75 < sum(rate < 1e-3 for rate in rates) < 125  # half of the logarithm's range; 3.5 standard deviations
    assert {trial["seed"] for trial in trials} == {3, 4, 5}
    for trial in trials:
        assert ("objective.path.schedule.power" in trial) == (trial["objective.path.schedule"]["name"] == "polynomial")


def test_a_random_trial_depends_on_nothing_but_its_number(load) -> None:
    sweep = load(RANGES)
    few = load(RANGES.replace("200", "3"))
    more_keys = load(RANGES.replace("  seed: {", "  training.optimizer.eps: [1.0e-8, 1.0e-9]\n  seed: {"))
    assert few.random_trials() == sweep.random_trials()[:3]
    assert [trial["seed"] for trial in more_keys.random_trials()] == [trial["seed"] for trial in sweep.random_trials()]
    assert load(RANGES.replace("seed: 1}", "seed: 2}")).random_trials() != sweep.random_trials()


class Highest:
    """Suggests the upper end, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple] = {}

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.asked[name] = ("int", low, high)
        return high

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.asked[name] = ("log" if log else "float", low, high)
        return high

    def suggest_categorical(self, name: str, choices) -> int:
        self.asked[name] = ("choice", *choices)
        return choices[-1]


def test_a_searcher_is_asked_for_the_keys_that_a_trial_has(load) -> None:
    searcher = Highest()
    trial = load(RANGES).space.trial(lambda key, distribution: distribution.suggest(key, searcher))
    assert trial == {
        "training.optimizer.learning_rate": 1e-2,
        "training.optimizer.weight_decay": 0.5,
        "seed": 5,
        "objective.path.schedule": {"name": "polynomial"},
        "objective.path.schedule.power": 3.0,
    }
    assert searcher.asked["training.optimizer.learning_rate"] == ("log", 1e-4, 1e-2)
    assert searcher.asked["objective.path.schedule"] == ("choice", 0, 1)


def test_covering_trials_hold_every_corner(load) -> None:
    space = load(RANGES).space
    trials = space.covering()
    for key, distribution in space.distributions.items():
        for corner in distribution.corners:
            assert any(trial.get(key, "absent") == corner for trial in trials), (key, corner)


# what identifies a sweep


def test_the_hash_sees_the_trials_and_the_metric(load, tmp_path: Path) -> None:
    sweep = load(SPACE)
    assert load(SPACE, ["name=other", "budget.max_wall_s=60"]).sha256 == sweep.sha256
    assert sweep.name == f"mine-{sweep.sha256[:8]}"
    for override in ("seed=1", "budget.num_steps=20", "scheduler.name=asha"):
        assert load(SPACE, [override]).sha256 != sweep.sha256
    assert load(SPACE.replace("0.01", "0.02")).sha256 != sweep.sha256
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("batch_rows: 4", "batch_rows: 8"))
    assert load(SPACE).sha256 != sweep.sha256


def test_resolved_round_trip(load, tmp_path: Path) -> None:
    sweep = load(CONDITIONAL + "budget: {num_steps: 30}\n")
    (tmp_path / "sweep.yaml").write_text(dump_sweep(sweep))
    again = load_sweep(str(tmp_path / "sweep.yaml"))
    assert (again.config, again.sha256, again.grid()) == (sweep.config, sweep.sha256, sweep.grid())


# bad sweeps: one screen each


@pytest.mark.parametrize(
    ("space", "where", "words"),
    [
        ("{}", "space", "nothing to vary"),
        ("{training.optimizer.learnin_rate: [1]}", "space.training.optimizer.learnin_rate", "unknown key"),
        ("{objective.pth: [{name: mixture}]}", "space.objective.pth", "unknown key"),
        ("{training.optimizer.learning_rate: [0.1, -1]}", "space.training.optimizer.learning_rate", "does not fit"),
        ("{objective.path.schedule: [{name: linear}, {name: quadratic}]}", "space.objective.path.schedule", "schedule"),
        ("{objective.path.schedule.power: [2, 3], objective.path.schedule: [{name: linear}]}",
         "space.objective.path.schedule.power", "write objective.path.schedule above"),
        ("{training.microbatch_rows: [2, 3]}", "space", "batch_rows"),
        ("{name: [a, b]}", "space.name", "itself"),
        ("{output_dir: [a, b]}", "space.output_dir", "itself"),
        ("{sampling.max_new_tokens: [8, 16]}", "space.sampling.max_new_tokens", "does not sample"),
        ("{seed: []}", "space.seed.choice", "does not fit"),
        ("{seed: 3}", "space.seed", "not a distribution"),
        ("{seed: {unifrom: [0, 1]}}", "space.seed", "not a distribution"),
        ("{seed: {uniform: [1, 0]}}", "space.seed.uniform", "does not fit"),
        ("{seed: {log_uniform: [0, 1]}}", "space.seed.log_uniform", "does not fit"),
        ("{seed: {integer: [0, 1.5]}}", "space.seed.integer.1", "does not fit"),
        ("{seed: {integer: [0, 3]}}", "space.seed", "a grid needs lists"),
        ("{seed: [1, 2, 1]}", "space.seed", "twice"),
        ("{seed: {grid: [1, 2], wen: {seed: 1}}}", "space.seed", "not a distribution"),
    ],
)  # fmt: skip
def test_a_bad_space(load, space: str, where: str, words: str) -> None:
    error = refusal(load, f"space: {space}")
    assert (error.where or "").split(": ")[-1] == where
    assert words in str(error)


@pytest.mark.parametrize(
    ("space", "where", "found"),
    [
        ("objective.path.schedule: [{name: linear}, {name: cosine}]\n"
         "  objective.path.schedule.power: {choice: [1], when: {objective.path.schedule.name: polynomial}}",
         "objective.path.schedule.power.when", '"cosine" or "linear"'),
        ("seed: {choice: [1], when: {objective.pathh.name: mixture}}", "seed.when", "absent"),
        ("seed: {choice: [1], when: {training.batch_rows: 4, training.num_steps: 41}}", "seed.when", "40"),
    ],
)  # fmt: skip
def test_a_condition_that_never_holds(load, space: str, where: str, found: str) -> None:
    error = refusal(load, f"space:\n  {space}\n")
    assert "never holds" in error.what
    assert error.where == f"space.{where}"
    assert found in (error.expected or "")


def test_a_condition_on_what_is_chosen_later(load) -> None:
    text = "space:\n  seed: {choice: [1], when: {training.batch_rows: 4}}\n  training.batch_rows: [4, 8]\n"
    assert refusal(load, text).fix == "write training.batch_rows above seed"


def test_a_condition_on_a_range(load) -> None:
    text = (
        "space:\n  training.optimizer.eps: {uniform: [0.1, 1]}\n  seed: {choice: [1], when: {training.optimizer.eps: 1}}\n"
        "search: {name: random, num_trials: 2}\n"
    )
    assert "without a list" in refusal(load, text).what


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("loss", "unfair metric"),
        ("validation/loss", "unfair metric"),
        ("loss/elbo", "unfair metric"),
        ("bound_nats_per_token", BOUND),
        ("perplexity", "no objective reports"),
        ("validation/loss/ntp", "not reported by every trial"),
        ("validation/bound_nats_per_tokn", BOUND),
    ],
)
def test_a_bad_metric(load, metric: str, words: str) -> None:
    error = refusal(load, SPACE, head=f"recipe: recipe.yaml\nmetric: {metric}\n")
    assert words in str(error)
    assert "metric.name" in (error.where or "")


@pytest.mark.parametrize("metric", [BOUND, "validation/loss/ntp"])
def test_a_likelihood_is_not_ranked_upside_down(load, metric: str) -> None:
    assert "worst trial first" in str(
        refusal(load, SPACE, head=f"recipe: recipe.yaml\nmetric: {{name: {metric}, mode: max}}\n")
    )


def test_unweighted_means_are_fair_while_the_objective_stays(load) -> None:
    head = "recipe: recipe.yaml\nmetric: validation/loss/elbo\n"
    load(SPACE, head=head).validate_trials()
    error = refusal(load, "space: {objective.path.schedule: [{name: linear}, {name: cosine}]}", head=head)
    assert "unfair metric" in error.what


def test_a_bound_that_some_trials_do_not_have(load) -> None:
    text = "space: {objective.time.low: [0.0, 0.5]}\n"
    error = refusal(load, text + "overrides: {objective.loss: ce, objective.weighting: none}\n")
    assert "not reported by every trial" in error.what
    assert "whole range" in (error.fix or "")


def test_trials_keep_their_best_and_their_last_checkpoint_unless_told_otherwise(load) -> None:
    head = "recipe: recipe.yaml\nmetric: {name: validation/accuracy, mode: max}\nspace: {seed: [1, 2]}\n"
    sweep = load("overrides: {objective: {name: next_token}}\n", head=head)
    trial = sweep.resolve_trial({"seed": 1}).config.checkpoint
    assert (trial.keep, trial.keep_best) == (1, KeepBestConfig(metric="validation/accuracy", mode="max"))
    words = sweep.trial_overrides({"seed": 1})
    assert "checkpoint.keep=1" in words
    text = "overrides: {objective: {name: next_token}, checkpoint.keep: 3, checkpoint.keep_best: null}\n"
    told = load(text, head=head)
    trial = told.resolve_trial({"seed": 1}).config.checkpoint
    assert (trial.keep, trial.keep_best) == (3, None)


def test_all_paths_and_losses_have_the_bound(load) -> None:
    paths = "[{name: mixture}, {name: mixture, source: {name: uniform}}, {name: metric}, {name: three_way}]"
    sweep = load(f"space: {{objective.path: {paths}, objective.loss: [ce, elbo]}}")
    assert sweep.validate_trials() is None, "nothing is refused"


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("{objective.path.coupling: [{name: independent}, {name: prefix}]}", "objective.path.coupling"),
        ("{objective.shift: [true, false]}", "objective.shift"),
        ("{data.seq_len: [32, 64]}", "data.seq_len"),
        ("{data.validation: [some/a, some/b]}", "data.validation"),
        ("{training.batch_rows: [4, 8]}", "the same product"),
    ],
)
def test_trials_that_are_measured_differently(load, space: str, words: str) -> None:
    error = refusal(load, f"space: {space}")
    assert "unfair trials" in error.what
    assert words in str(error)


def test_batch_and_validation_may_change_together(load) -> None:
    both = "[{batch_rows: 4, validation_batches: 2}, {batch_rows: 8, validation_batches: 1}]"
    space = f"space: {{training: {both}}}\n"
    head = "recipe: recipe.yaml\nmetric: validation/loss/ntp\n"
    load(space + "overrides: {objective: {name: set_block, block_size_max: 8}}\n", head=head).validate_trials()
    error = refusal(load, space)
    assert "once a batch" in error.what
    assert (error.where, error.found) == ("space.training", f"{BOUND} with batches of 4 and 8 rows")


def test_one_objective_of_validation_makes_its_metrics_fair(load) -> None:
    head = "recipe: recipe.yaml\nmetric: validation/loss/ce\n"
    space = "space: {objective.path.schedule: [{name: linear}, {name: cosine}], objective.shift: [false, true]}\n"
    fixed = "overrides: {training.validation_objective: {name: discrete_flow, time_input: false}}\n"
    load(space + fixed, head=head).validate_trials()
    error = refusal(
        load, space.replace(", objective.shift: [false, true]", "") + "overrides: {objective.loss: ce}\n", head=head
    )
    assert "unfair metric" in error.what


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("overrides: {training.validate_every_steps: null}", "training.validate_every_steps", "has none"),
        ("overrides: {data.validation: []}", "data.validation", "has none"),
        ("overrides: {trainning.num_steps: 3}", "overrides.trainning.num_steps", "unknown key"),
        ("overrides: {training.optimizer.learning_rate: 0.1}", "learning_rate", "set twice"),
        ("overrides: {name: a}", "overrides.name", "itself"),
        ("overrides: {training.num_steps: 3}\nbudget: {num_steps: 4}", "training.num_steps", "set twice"),
        ("search: {name: random}", "search", "num_trials"),
        ("search: {num_trials: 3}", "search", "a grid has as many trials"),
        ("scheduler: {name: asha, grace_steps: 40}", "scheduler.grace_steps", "no trial could be stopped"),
        ("scheduler: {name: asha, grace_steps: 5}", "scheduler.grace_steps", "unmeasured"),
        ("schedular: {name: asha}", "schedular", "unknown key"),
        ("checkpoint: runs/x", "mine.yaml", "either a recipe"),
        ("name: a/b", "name", "letters"),
    ],
)
def test_other_mistakes(load, text: str, where: str, words: str) -> None:
    error = refusal(load, SPACE + text + "\n")
    assert where in (error.where or "")
    assert words in str(error)


def test_a_value_that_replaces_what_all_trials_have_is_refused(load) -> None:
    space = "space: {training: [{batch_rows: 4, optimizer: {weight_decay: 0.1}}, {batch_rows: 8}]}\n"
    for key in ("training.batch_rows", "training.optimizer.weight_decay"):
        with pytest.raises(ConfigError, match="set twice") as caught:
            load(space, [f"{key}=16"])
        assert caught.value.where.endswith("space.training")
        assert caught.value.found.startswith(key)
    with pytest.raises(ConfigError, match="set twice"):
        load(space + "overrides: {training.optimizer: {learning_rate: 0.1, weight_decay: 0.2}}\n")
    with pytest.raises(ConfigError, match="set twice"):
        load("space: {training: [{num_steps: 20}]}\nbudget: {num_steps: 30}\n")
    kept = "overrides: {training.validation_batches: 3, training.optimizer: {learning_rate: 0.1}}\n"
    sweep = load(space + kept)
    for trial in sweep.grid():
        training = sweep.resolve_trial(trial).config.training
        assert (training.validation_batches, training.optimizer.learning_rate) == (3, 0.1)


INVALID_TOGETHER = """
space: {training.batch_rows: {integer: [4, 8]}, training.microbatch_rows: {integer: [1, 4]}}
search: {name: SEARCH, num_trials: 8}
"""


def test_random_trials_that_cannot_be_are_refused_before_the_first_one(load) -> None:
    """Each end fits the first value of the other key; 7 rows in microbatches of 3 or 4 do not."""
    text = INVALID_TOGETHER.replace("SEARCH", "random")
    sweep = load(text)
    drawn = [(trial["training.batch_rows"], trial["training.microbatch_rows"]) for trial in sweep.random_trials()]
    bad = [(rows, part) for rows, part in drawn if rows % part]
    assert bad
    assert not [
        trial for trial in sweep.space.covering() if trial["training.batch_rows"] % trial["training.microbatch_rows"]
    ]
    error = refusal(load, text)
    assert "training.batch_rows={}, training.microbatch_rows={}".format(*bad[0]) in (error.found or "")


def test_stopping_early_needs_equal_lengths(load) -> None:
    error = refusal(load, "space: {training.num_steps: [40, 80]}\nscheduler: {name: median}\n")
    assert "different lengths" in error.what
    load("space: {training.num_steps: [40, 80]}\n").validate_trials()


def test_stopping_early_needs_one_metric(load) -> None:
    head = f"recipe: recipe.yaml\nmetric: [{BOUND}, validation/loss/elbo]\n"
    assert "use none" in str(refusal(load, SPACE + "scheduler: {name: asha}\n", head=head))
    load(SPACE, head=head).validate_trials()


def test_a_grid_too_large(load) -> None:
    many = list(range(50))
    assert "more than 2000" in refusal(load, f"space: {{seed: {many}, training.log_every_steps: {many[1:]}}}").what


@pytest.mark.parametrize("word", ["space.seed=[1]", "overrides.seed=1"])
def test_the_space_is_not_changed_on_the_command_line(load, word: str) -> None:
    with pytest.raises(ConfigError, match="in the file or in an overlay"):
        load(SPACE, [word])


def test_missing_files(load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such sweep"):
        load_sweep(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ConfigError, match="no such recipe"):
        load(SPACE, head=f"recipe: nowhere.yaml\nmetric: {BOUND}\n")


# sweeps over samplers


SAMPLERS = """
checkpoint: runs/some
continuation: {data: some/held_out}
overrides: {sampling.sampler: {name: set_block, unmasking: {name: entropy_bounded}}}
space: {sampling.sampler.block_size: [4, 8], sampling.sampler.unmasking.gamma: [0.1, 1.0]}
metric: [{name: accuracy, mode: max}, {name: forwards_per_token, mode: min}]
"""


def test_a_sweep_over_samplers(load) -> None:
    sweep = load(SAMPLERS, head="")
    sweep.validate_trials()
    samplers = [
        sweep.sampling_of(trial, defaults={"sampler": {"name": "autoregressive"}}).sampler for trial in sweep.grid()
    ]
    assert [(sampler.block_size, sampler.unmasking.gamma) for sampler in samplers] == [
        (4, 0.1), (4, 1.0), (8, 0.1), (8, 1.0),
    ]  # fmt: skip


def test_what_a_sampler_is_ranked_by_knows_what_is_better(load) -> None:
    text = (
        SAMPLERS[: SAMPLERS.index("metric:")] + "metric: [accuracy, {name: tokens_per_forward}, forwards_per_token]\n"
    )
    assert [metric.mode for metric in load(text, head="").config.metric] == ["max", "max", "min"]


def test_the_checkpoints_own_sampler_counts(load) -> None:
    text = SAMPLERS.replace("overrides: {sampling.sampler: {name: set_block, unmasking: {name: entropy_bounded}}}", "")
    assert "the sampler has no name" in refusal(load, text, head="").what
    load(text, head="").validate_trials(
        sampling={"sampler": {"name": "block", "unmasking": {"name": "entropy_bounded"}}}
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("block_size: [4", "block_sise: [4", "unknown key"),
        ("gamma: [0.1", "gamma: [-0.1", "does not fit"),
        ("name: accuracy", "name: acuracy", "accuracy"),
        ("space: {", "space: {training.num_steps: [1, 2], ", "trains nothing"),
        ("space: {", "space: {sampling.max_new_tokens: [8, 16], ", "only the sampler can be varied"),
        ("name: forwards_per_token, mode: min", "name: forwards_per_token, mode: max", "worst trial first"),
        ("name: accuracy, mode: max", "name: accuracy, mode: min", "worst trial first"),
        ("continuation: {data: some/held_out}", "", "belong together"),
        ("metric:", "scheduler: {name: asha}\nmetric:", "use none"),
    ],
)
def test_a_bad_sweep_over_samplers(load, old: str, new: str, words: str) -> None:
    assert words in str(refusal(load, SAMPLERS.replace(old, new), head=""))


# what comes along


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
@pytest.mark.parametrize("overlay", [None, "debug"])
def test_every_sweep_that_comes_along_is_valid(
    path: Path, overlay: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parents[1])
    sweep = load_sweep(str(path), overlay=overlay)
    sweep.validate_trials()
    if overlay == "debug":
        assert len(sweep.grid()) == 8
        if sweep.recipe is not None:
            assert sweep.recipe.config.scaling.num_workers == 1
            assert sweep.recipe.config.data.train[0].path == "runs/data/debug/train"


def test_the_sweeps_that_come_along() -> None:
    names = {path.stem for path in SWEEPS}
    trained = {"schedulers_and_paths", "set_block_size", "learning_rate", "resample_window"}
    assert names == trained | {"sampler_pareto", "flow_sampler"}


RECIPES = sorted((Path(__file__).parents[2] / "jobs" / "recipes" / "debug_cpu").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_objective_can_be_asked_what_it_reports(path: Path) -> None:
    objective = load_recipe(str(path)).config.objective
    reported = reported_metrics(objective)
    assert "loss" in reported
    assert any(name.startswith("loss/") for name in reported)
    assert ("loss/ntp" in reported) == (objective.name in ("next_token", "set_block", "resample"))


def test_the_example_of_the_readme_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SWEEPS[0].parents[1])
    (example,) = re.findall(r"```yaml\n(.*?)```", (SWEEPS[0].parent / "README.md").read_text(), flags=re.DOTALL)
    path = tmp_path / "example.yaml"
    path.write_text(example)
    sweep = load_sweep(str(path))
    sweep.validate_trials()
    assert len(sweep.random_trials()) == 20
    assert load_sweep(str(path), overlay="debug").recipe.config.training.num_steps == 40
