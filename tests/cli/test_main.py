"""The front door: help without weight, one screen and exit code 2 for mistakes, JSON as the last line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raydist.cli.main import VERBS, main

RECIPE = str(Path(__file__).parents[2] / "jobs" / "recipes" / "quickstart.yaml")
HEAVY = ("torch", "ray", "mlflow", "numpy", "pyarrow", "pydantic", "omegaconf", "rich", "matplotlib", "fsspec")


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom raydist.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        f"print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "heavy: []"


def test_import_raydist_imports_nothing_heavy() -> None:
    code = f"import sys, raydist; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["config", "show", "nowhere.yaml"], "ConfigError", "no such recipe"),
        (["config", "show", RECIPE, "trainng.num_steps=3"], "ConfigError", "did you mean 'training'"),
        (["config", "show", RECIPE, "training.num_steps=-3"], "ConfigError", "training.num_steps"),
        (["train", RECIPE, "data.train=/nowhere", "--no-ray"], "DataError", "/nowhere"),
        (["sample", "/nowhere", "--prompt", "x"], "", "/nowhere"),
        (["export", "/nowhere", "--to", "/tmp/x"], "", "/nowhere"),
        (["data", "inspect", "/nowhere"], "DataError", "/nowhere"),
        (["runs", "list", "--mlflow-uri", "ftp://x"], "TrackingError", "ftp://x"),
        (
            ["artifacts", "pull", "x", "--to", "y", "--mlflow-uri", "sqlite:////nowhere/m.db"],
            "TrackingError",
            "/nowhere",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_screen_and_exit_code_2(
    arguments: list[str],
    error: str,
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 24
    answer = last_json(out)
    assert answer["error"].endswith("Error")
    assert answer["error"] == error or not error


def test_a_wrong_word_is_argparse_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nonsense"], ["train"], ["train", RECIPE, "--no-ray", "nonsense"], ["list", "planets"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


def test_a_misspelt_verb_names_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    for word, says in (("trian", "did you mean 'train'?"), ("xyzzy", "expected one of data, train, ")):
        with pytest.raises(SystemExit):
            main([word, RECIPE])
        assert f"no verb {word!r}: {says}" in capsys.readouterr().err


def test_overrides_may_stand_before_and_behind_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", RECIPE, "seed=4", "--json", "training.num_steps=7"]) == 0
    config = last_json(capsys.readouterr().out)["config"]
    assert (config["seed"], config["training"]["num_steps"]) == (4, 7)


def test_config_show_prints_what_it_resolves_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", RECIPE]) == 0
    out = capsys.readouterr().out
    assert "name: set_block" in out
    assert "# config hash: " in out


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("objectives", {"next_token", "set_block"}),
        ("samplers", {"autoregressive", "set_block"}),
        ("models", {"debug", "llama3.1-8b", "qwen3-8b"}),
    ],
)
def test_list(what: str, names: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what, "--json"]) == 0
    out, err = capsys.readouterr()
    assert names <= last_json(out)[what].keys()
    assert all(name in err for name in names)
