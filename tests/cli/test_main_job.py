"""The main job by the commands a user types, small: text -> shards -> Ray -> MLflow -> pulled -> sampled -> transformers."""

from __future__ import annotations

import email
import json
from pathlib import Path

import pytest
import ray
import yaml

from raydist.cli.main import main

pytestmark = pytest.mark.ray

RECIPE = {
    "name": "small",
    "model": {"preset": "debug", "overrides": {"num_layers": 2, "width": 32, "hidden_width": 64}},
    "data": {"train": "runs/data/train", "validation": "runs/data/validation", "seq_len": 32},
    "objective": {"name": "set_block"},
    "training": {
        "num_steps": 12,
        "batch_rows": 4,
        "microbatch_rows": 2,
        "validate_every_steps": 6,
        "log_every_steps": 2,
        "optimizer": {"learning_rate": 0.01},
    },
    "checkpoint": {"every_steps": 6},
    "scaling": {"num_workers": 2},
    "sampling": {
        "max_new_tokens": 20,
        "prompts": ["def ", "import "],
        "sampler": {"name": "set_block", "block_size": 8},
    },
}


def raydist(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict, str]:
    """Runs a verb; returns its JSON object and what a person would have read."""
    exit_code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert exit_code == 0, err
    return json.loads(out.strip().splitlines()[-1]), err


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "small.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def test_the_main_job(
    ray_cluster: None, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    source = str(Path(email.__file__).parent)
    prepared, _ = raydist(
        capsys, "data", "prepare", source, "--out", "runs/data", "--tokenizer", "bpe:300", "--include", "*.py",
        "--validation-fraction", "0.3",
    )  # fmt: skip
    assert prepared
    trained, seen = raydist(capsys, "train", "small.yaml")
    assert trained["step"] == 12
    assert trained["metrics"]["loss"] > 0
    assert "step    12/12" in seen
    for line in ("run directory", "loss curves", "MLflow run", "Next:"):
        assert line in seen
    for word in ("WARNING", "Warning", "INFO", "alembic"):
        assert word not in seen

    runs, _ = raydist(capsys, "runs", "list")
    assert [(run["name"], run["status"]) for run in runs["runs"]] == [("small", "FINISHED")]
    shown, _ = raydist(capsys, "runs", "show", "small")
    assert "set_block" in json.dumps(shown)
    assert shown["tags"]["ray.job_id"] == ray.get_runtime_context().get_job_id()

    pulled, _ = raydist(capsys, "artifacts", "pull", "small", "--to", "pulled")
    names = {
        str(Path(name).relative_to(workplace / "pulled")) if Path(name).is_absolute() else name
        for name in pulled["files"]
    }
    text = " ".join(sorted(names))
    for wanted in ("model.safetensors", "tokenizer.json", "config.yaml", "curves.png", "trace.png", "samples.json"):
        assert wanted in text, text

    compared, _ = raydist(capsys, "sample", "pulled/model", "--compare", "--trace", "trace.png")
    assert (workplace / "trace.png").read_bytes()[:4] == b"\x89PNG"
    assert compared
    exported, _ = raydist(capsys, "export", "small", "--to", "hf")
    assert exported
    again, seen = raydist(capsys, "train", "small.yaml", "--resume")
    assert again["step"] == 12
    assert "going on at step 12 of 12" in seen
    assert main(["train", "small.yaml"]) == 2
    assert "name is in use" in capsys.readouterr().err

    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained("hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    assert model.config.vocab_size >= 300
    assert tokenizer.decode(tokenizer("import json")["input_ids"]) == "import json"
    assert tokenizer.mask_token_id == json.loads((workplace / "hf" / "raydist.json").read_text())["token_ids"]["mask"]
