"""``raydist data show`` prints what a step of a run read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_loaders.loader import Loader
from raydist.cli.main import main
from raydist.config.load import resolve
from raydist.core.rows import Rows
from raydist.training.data import open_data
from raydist.training.run_dir import prepare_run_dir
from tests.data_loaders.conftest import write_dataset
from tests.training.cases import recipe_values

SEQ_LEN, ROWS_PER_SHARD = 8, 3
# printable bytes only, so that a text says which tokens it was
DATASETS = {"a": (32, [[5, 20, 0, 7], [30], [11, 21]]), "b": (64, [[3] * 10, [30]])}
ROWS_OF_A = ROWS_PER_SHARD * 3


def documents_of(row: int) -> list[str]:
    """Ids of the documents whose tokens a row holds, by walking over the shards."""
    name, row = ("a", row) if row < ROWS_OF_A else ("b", row - ROWS_OF_A)
    shard, local_row = divmod(row, ROWS_PER_SHARD)
    owners = [f"d{shard}:{d}" for d, length in enumerate(DATASETS[name][1][shard]) for _ in range(length)]
    return list(dict.fromkeys(owners[local_row * SEQ_LEN : local_row * SEQ_LEN + SEQ_LEN + 1]))


@pytest.mark.parametrize("step", [1, 7])
def test_a_step_of_a_shuffled_mixture(step: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (first_token, lengths) in DATASETS.items():
        write_dataset(tmp_path / name, lengths=lengths, first_token=first_token, name=name)
    values = recipe_values("", tmp_path / "runs")
    values["data"] |= {
        "train": [{"path": str(tmp_path / "a"), "weight": 2}, {"path": str(tmp_path / "b"), "weight": 1}],
        "validation": [],
        "seq_len": SEQ_LEN,
    }
    values["training"]["validate_every_steps"] = None
    recipe = resolve(values, path="case.yaml")
    run_dir = prepare_run_dir(recipe, resume=False)
    batch_rows = recipe.config.training.batch_rows
    mixture = open_data(recipe.config.data, seed=recipe.config.seed).train
    loader: Loader[Rows] = Loader(mixture, batch_rows=batch_rows, num_steps=step + 1)
    *_, read = loader
    assert main(["data", "show", "--run", run_dir, "--step", str(step), "--json"]) == 0
    out, err = capsys.readouterr()
    assert f"step {step} ({step + 1} in curves and progress)" in err
    shown = json.loads(out.splitlines()[-1])
    assert (shown["step"], shown["manifest_hash"], len(shown["rows"])) == (step, mixture.sha256, batch_rows)
    decode = mixture.datasets[0].tokenizer().decode
    for n, row in enumerate(shown["rows"]):
        assert (row["row"], row["epoch"]) == (int(read.rows_B[n]), int(read.epochs_B[n]))
        assert row["dataset"] == str(tmp_path / ("a" if row["row"] < ROWS_OF_A else "b"))
        assert [segment["document_id"] for segment in row["segments"]] == documents_of(row["row"])
        tokens_S, documents_S = read.tokens_BS[n], read.documents_BS[n]
        texts = [decode(tokens_S[documents_S == number].tolist()) for number in documents_S.unique()]
        assert [segment["text"] for segment in row["segments"]] == texts
        assert [segment["num_tokens"] for segment in row["segments"]] == [len(text) for text in texts]
    assert {row["dataset"] for row in shown["rows"]} == {str(tmp_path / name) for name in DATASETS}
    assert len({row["epoch"] for row in shown["rows"]}) > 1, "the rows of a small dataset come again and again"
