from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydist.config.load import (
    changed_identity_keys,
    dump_yaml,
    flatten,
    load_recipe,
    merge,
    parse_overrides,
    read_resolved,
    read_yaml,
    with_absolute_paths,
)
from raydist.core.errors import ConfigError

MINIMAL = """
model: {preset: debug}
data: {train: some/data, seq_len: 32}
objective: {name: set_block, block_size_max: 8}
training: {num_steps: 10, batch_rows: 4, microbatch_rows: 2, optimizer: {learning_rate: 0.001}}
"""


@pytest.fixture
def recipe_path(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return str(path)


def test_layers_later_wins(tmp_path: Path, recipe_path: str) -> None:
    (tmp_path / "base.yaml").write_text("seed: 3\ntraining: {log_every_steps: 7, precision: bf16}\n")
    recipe = load_recipe(recipe_path, ["training.precision=fp32", "training.optimizer.betas=[0.8,0.9]"])
    assert recipe.config.seed == 3  # base.yaml
    assert recipe.config.training.log_every_steps == 7
    assert recipe.config.training.precision == "fp32"  # override
    assert recipe.config.training.optimizer.betas == (0.8, 0.9)
    assert recipe.config.training.optimizer.clip_norm == 1.0  # schema
    assert recipe.config.data.train[0].path == "some/data"
    assert recipe.config.objective.block_size_max == 8
    assert recipe.config.name == f"mine-{recipe.config_hash[:8]}"


def test_a_run_name_is_no_choice(recipe_path: str) -> None:
    assert load_recipe(recipe_path, ["name=other"]).config.objective.block_size_max == 8


def test_a_base_in_the_folder_above_counts(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 11\n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "r.yaml").write_text(MINIMAL)
    assert load_recipe(str(tmp_path / "below" / "r.yaml")).config.seed == 11


def test_choosing_another_name_drops_the_old_choice(tmp_path: Path, recipe_path: str) -> None:
    recipe = load_recipe(recipe_path, ["objective.name=next_token"])
    assert recipe.config.objective.model_dump() == {"name": "next_token"}


@pytest.mark.parametrize(
    ("override", "where", "fix"),
    [
        ("trainning.num_steps=3", "trainning", "training"),
        ("training.num_step=3", "training.num_step", "num_steps"),
        ("training.optimizer.learnin_rate=1", "training.optimizer.learnin_rate", "learning_rate"),
        ("objective.block_size_maxx=4", "objective.block_size_maxx", "block_size_max"),
        ("sampling.sampler={name: set_block, block_sise: 4}", "sampling.sampler.block_sise", "block_size"),
    ],
)
def test_a_misspelt_key_names_the_nearest_one(recipe_path: str, override: str, where: str, fix: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        load_recipe(recipe_path, [override])
    assert caught.value.where == where
    assert fix in (caught.value.fix or "") + (caught.value.expected or "")


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("training.num_steps=many", "training.num_steps"),
        ("training.num_steps=0", "training.num_steps"),
        ("training.precision=fp8", "training.precision"),
        ("data.train=[]", "data.train"),
        ("name=../escape", "name"),
        ("training.batch_rows=5", None),
    ],
)
def test_a_wrong_value_names_its_key(recipe_path: str, override: str, where: str | None) -> None:
    with pytest.raises(ConfigError, match="does not fit") as caught:
        load_recipe(recipe_path, [override])
    assert caught.value.where == where


def test_missing_required_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.replace("num_steps: 10, ", ""))
    with pytest.raises(ConfigError, match="required key is missing") as caught:
        load_recipe(str(path))
    assert caught.value.where == f"training.num_steps in {path}"


def test_a_key_misspelt_in_a_file_is_named_with_the_file_and_before_the_one_it_leaves_missing(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.replace("num_steps:", "nun_steps:"))
    with pytest.raises(ConfigError, match="unknown key") as caught:
        load_recipe(str(path), ["training.batch_rows=8"])
    assert caught.value.where == f"training.nun_steps in {path}"
    assert caught.value.fix == "did you mean 'num_steps'?"


def test_a_wrong_value_in_the_base_is_named_with_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("checkpoint: {keep: many}\n")
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(ConfigError, match="does not fit") as caught:
        load_recipe(str(path))
    assert caught.value.where == f"checkpoint.keep in {tmp_path / 'base.yaml'}"


def test_two_problems_are_counted_around_the_one_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.replace("num_steps:", "nun_steps:").replace("batch_rows: 4, ", ""))
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    assert caught.value.what == "unknown key (2 more)"


@pytest.mark.parametrize(
    ("base", "data", "override", "where"),
    [
        ("", "some/data", "objective=set_blok", "objective.name"),
        ("", "some/data", "data.train={path: a, weigth: 2}", "data.train.0.weigth"),
        ("", "{path: a}", "data.train=[{path: a}, {path: b, weigth: 2}]", "data.train.1.weigth"),
        ("", "some/data", "data.train={weight: 2}", "data.train.0.path"),
        ("", "some/data", "data.train=[{weight: 2}]", "data.train.0.path"),
        ("", "{path: a, weigth: 2}", "data.train={weight: 2}", "data.train.0.weigth in RECIPE"),
        ("", "{path: a, weigth: 2}", "data.seq_len=8", "data.train.0.weigth in RECIPE"),
        ("data: {validation: {path: a, weigth: 2}}", "some/data", "seed=3", "data.validation.0.weigth in BASE"),
        ("data: {train: {weigth: 2}}", "{path: a}", "seed=3", "data.train.0.weigth in BASE"),
        ("data: {train: {path: a}}", "{weigth: 2}", "seed=3", "data.train.0.weigth in RECIPE"),
        ("data: {validation: {weight: 2}}", "some/data", "seed=3", "data.validation.0.path in BASE"),
        (
            "", "some/data",
            "objective={name: discrete_flow, path: {name: mixture, source: given}}", "objective.path.source.path",
        ),
    ],
)  # fmt: skip
def test_the_layer_that_made_the_mistake_is_named(
    base: str, data: str, override: str, where: str, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(base or "seed: 1")
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.replace("some/data", data))
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path), [override])
    assert caught.value.where == where.replace("RECIPE", str(path)).replace("BASE", str(tmp_path / "base.yaml"))


@pytest.mark.parametrize(
    ("override", "where", "hint"),
    [
        ("model.preset=debugg", "model.preset", "'debug'"),
        ("model.overrides={nun_layers: 2}", "model.overrides.nun_layers", "'num_layers'"),
        ("model.overrides={num_layers: four}", "model.overrides.num_layers", "integer"),
        ("model.overrides={num_heads: 3}", "model.overrides", "multiple of num_kv_heads"),
        ("model={init_from: elsewhere, overrides: {nun_layers: 2}}", "model.overrides.nun_layers", "'num_layers'"),
    ],
)
def test_a_model_that_cannot_be_is_refused(recipe_path: str, override: str, where: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_path, [override])
    assert caught.value.where == where
    assert hint in f"{caught.value.fix} {caught.value.expected}"


def test_weights_to_start_from_need_no_preset_and_need_not_be_here(recipe_path: str) -> None:
    overrides = ["model={preset: none-of-ours, init_from: elsewhere, overrides: {num_heads: 3}}"]
    assert load_recipe(recipe_path, overrides).config.model.overrides == {"num_heads": 3}


def test_unknown_choice_names_the_others(recipe_path: str) -> None:
    with pytest.raises(ConfigError, match="no objective has this name") as caught:
        load_recipe(recipe_path, ["objective.name=set_blok"])
    assert "set_block" in (caught.value.fix or "")


@pytest.mark.parametrize("override", ["nonsense", "=3", "a..b=3", "a.=3", "a={"])
def test_what_is_no_override(recipe_path: str, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_recipe(recipe_path, [override])


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "\x00", "a: !!python/object/apply:os.getcwd []"])
def test_what_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_recipe(str(path))


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe("nowhere.yaml")


def test_resolved_round_trip(tmp_path: Path, recipe_path: str) -> None:
    recipe = load_recipe(recipe_path)
    (tmp_path / "config.yaml").write_text(dump_yaml(recipe.config))
    again = read_resolved(str(tmp_path / "config.yaml"))
    assert again.config == recipe.config
    assert again.config_hash == recipe.config_hash


def test_the_hash_sees_what_is_computed_and_nothing_else(recipe_path: str) -> None:
    base = load_recipe(recipe_path)
    same = load_recipe(
        recipe_path,
        ["scaling.num_workers=2", "output_dir=elsewhere", "checkpoint.keep=9", "training.microbatch_rows=1"],
    )
    assert same.config_hash == base.config_hash
    assert changed_identity_keys(base.config, same.config) == []
    for override in ("seed=1", "training.num_steps=11", "objective.block_size_max=9", "data.seq_len=33"):
        other = load_recipe(recipe_path, [override])
        assert other.config_hash != base.config_hash
        assert changed_identity_keys(base.config, other.config) == [override.split("=")[0]]


nested = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)
trees = st.dictionaries(st.sampled_from("abcd"), nested, max_size=4)


@given(trees, trees)
def test_merge_agrees_with_merging_leaves(base: dict, overlay: dict) -> None:
    merged = merge(base, overlay)
    flat = flatten(merged)
    for key, value in flatten(overlay).items():
        if value != {}:
            assert flat[key] == value
    assert merge(merged, overlay) == merged
    assert merge(base, {}) == base


def test_overrides_keep_types() -> None:
    assert parse_overrides(["a.b=1", "a.c=1.5", "d=null", "e=[1,x]", "f=text", "g=true"]) == {
        "a": {"b": 1, "c": 1.5},
        "d": None,
        "e": [1, "x"],
        "f": "text",
        "g": True,
    }


RECIPES = sorted((Path(__file__).parents[2] / "jobs" / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", [path for path in RECIPES if path.name != "base.yaml"], ids=lambda path: path.stem)
def test_every_recipe_that_comes_along_loads(path: Path) -> None:
    assert load_recipe(str(path)).config.name


def test_the_editors_schema_is_current() -> None:
    from raydist.config.schema import RunConfig

    written = json.loads((RECIPES[0].parent / "recipe.schema.json").read_text())
    assert written == RunConfig.model_json_schema(), "run: raydist config schema > jobs/recipes/recipe.schema.json"


def test_absolute_paths_for_other_processes(tmp_path: Path, recipe_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_recipe(recipe_path, ["data.validation=s3://bucket/v", "model.init_from=hf", "output_dir=out"]).config
    absolute = with_absolute_paths(config)
    assert absolute.data.train[0].path == f"{tmp_path}/some/data"
    assert absolute.data.validation[0].path == "s3://bucket/v"
    assert (absolute.model.init_from, absolute.output_dir) == (f"{tmp_path}/hf", f"{tmp_path}/out")
    assert absolute.objective == config.objective
    assert absolute.data.cache_dir is None


@pytest.mark.parametrize(
    ("override", "where", "hint"),
    [
        ("objective.schedule={name: polynomial, powr: 2}", "objective.schedule.powr", "'power'"),
        ("objective.schedule.name=linea", "objective.schedule.name", "'linear'"),
        ("sampling.sampler={name: masked, unmasking: {name: topk}}", "sampling.sampler.unmasking.name", "'top_k'"),
    ],
)
def test_a_choice_inside_a_choice_names_its_whole_key(override: str, where: str, hint: str) -> None:
    recipe = Path(__file__).parents[2] / "jobs" / "recipes" / "debug_cpu" / "masked.yaml"
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(recipe), [override])
    assert caught.value.where == where
    assert hint in (caught.value.fix or "")


def test_a_choice_that_does_not_fit_its_place() -> None:
    recipe = Path(__file__).parents[2] / "jobs" / "recipes" / "debug_cpu" / "discrete_flow.yaml"
    with pytest.raises(ConfigError, match="does not fit here") as caught:
        load_recipe(str(recipe), ["objective.path={name: three_way, schedule: {name: source_kinetic_optimal}}"])
    assert caught.value.where == "objective.path.schedule"
    assert caught.value.found == "source_kinetic_optimal"


@pytest.mark.parametrize("value", ["${oc.env:PLANTED}", "a ${oc.env:PLANTED} b", "${${data.seq_len}.env:PLANTED}"])
def test_a_recipe_does_not_read_the_environment(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "a-password")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"tracking: {{tags: {{note: '{value}'}}}}\n")
    with pytest.raises(ConfigError, match="reads nothing from its surroundings") as caught:
        load_recipe(str(path))
    assert "a-password" not in str(caught.value)


@pytest.mark.parametrize("override", ["a.b=${oc.env:PLANTED}", "a={b: ['x ${oc.env:PLANTED}']}", "a=${${b}:PLANTED}"])
def test_an_override_does_not_read_the_environment(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "a-password")
    with pytest.raises(ConfigError, match="reads nothing from its surroundings") as caught:
        parse_overrides(["b=oc.env", override])
    assert "a-password" not in str(caught.value)


def test_a_key_may_refer_to_another(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: {b: 3}\nc: ${a.b}\nd: s3://bucket/${a.b}\n")
    assert read_yaml(str(path)) == {"a": {"b": 3}, "c": 3, "d": "s3://bucket/3"}
