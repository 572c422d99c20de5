"""Parameters fit the server's limits and carry no secrets."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from raydist.config.load import Recipe
from raydist.core.errors import ConfigError, TrackingError
from raydist.tracking.mlflow_runs import start_run
from raydist.tracking.params import MAX_KEY_CHARS, MAX_VALUE_CHARS, flat_params
from raydist.tracking.secrets import redact_source, redact_text
from raydist.training.driver import conduct
from raydist.training.session import Outcome
from tests.tracking.helpers import make_config
from tests.training.cases import recipe_of


def test_flat_and_stable() -> None:
    params = flat_params({"a": {"b": 1, "c": [0.9, {"d": None}]}, "e": True, "f": "x", "g": [], "h": {}})
    assert params == {"a.b": "1", "a.c.0": "0.9", "a.c.1.d": "null", "e": "true", "f": "x", "g": "[]", "h": "{}"}


def test_a_long_value_is_its_hash() -> None:
    text = "ä" * (MAX_VALUE_CHARS + 1)
    assert flat_params({"prompt": "y" * MAX_VALUE_CHARS}) == {"prompt": "y" * MAX_VALUE_CHARS}
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert flat_params({"prompt": text}) == {"prompt": f"sha256:{digest} ({len(text)} characters)"}


def test_our_limits_are_what_mlflow_takes(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    from raydist.tracking.server import connect

    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    client = connect(f"sqlite:///{output_dir}/mlflow.db")
    run_id = client.create_run(client.create_experiment("limits")).info.run_id
    params = flat_params({"k" * 400: "v" * MAX_VALUE_CHARS, "odd key ?%&": "w" * 10_000})
    client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
    assert client.get_run(run_id).data.params == params
    assert max(map(len, params)) == MAX_KEY_CHARS
    with pytest.raises(MlflowException):
        client.log_param(run_id, "too_long", "v" * (MAX_VALUE_CHARS + 1))


PLANTED = {
    "AWS": "AKIA" + "ABCDEFGHIJKLMNOP",
    "GitHub": "ghp_" + "a1B2" * 9,
    "Hugging Face": "hf_" + "abcDEF" * 6,
    "GitLab": "glpat-" + "x1" * 10,
    "Slack": "xoxb-" + "1234567890-abc",
    "web token": "eyJ" + "hbGciOiJIUzI1NiJ9" + ".eyJ" + "zdWIiOiIxMjM0In0" + ".abc",
    "key file": "-----BEGIN RSA " + "PRIVATE KEY-----\nMII",
    "address": "postgresql://me:" + "hunter2@host/db",
    "bucket": "s3://KEY" + "ID:hunter2@bucket/x",
    "query": "https://host/x?user=me&pass" + "word=hunter2",
    "signed": "https://host/x?X-Amz-Sig" + "nature=0f3a",
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_secret_value_is_refused_without_repeating_it(kind: str) -> None:
    secret = PLANTED[kind]
    with pytest.raises(ConfigError) as caught:
        flat_params({"tracking": {"tags": {"note": f"see {secret}"}}})
    assert caught.value.where == "tracking.tags.note"
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "password", "hf_token", "aws-secret", "API_KEY", "access.private_key", "my_credentials", "hfToken", "secretKey",
        "HFTOKEN", "db_pwd", "x.AWS_SECRET_ACCESS_KEY",
    ],
)  # fmt: skip
def test_a_key_named_like_a_secret_is_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        flat_params({"tracking": {"tags": {key: "opensesame"}}})


def test_a_key_of_any_kind_with_a_random_value_is_refused() -> None:
    assert flat_params({"tags": {"sort_key": "step", "DEPLOY_KEY": "blue"}})
    with pytest.raises(ConfigError):
        flat_params({"tags": {"DEPLOY_KEY": "q7Xk29" * 4}})


@pytest.mark.parametrize("kind", ["Hugging Face", "address"])
def test_a_run_with_a_secret_leaves_no_file(tmp_path: Path, kind: str) -> None:
    def never(recipe: Recipe, run_dir: str) -> Outcome:
        raise AssertionError("the run started")

    recipe = recipe_of("no-data", tmp_path, **{"tracking.tags.note": PLANTED[kind]})
    with pytest.raises(ConfigError, match="looks like a secret"):
        conduct(recipe, resume=False, attempts=never)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "uri", ["http://me:" + "pw@host:5000", "https://tok" + "en@host", "postgresql://me:" + "pw@host/db"]
)
def test_an_address_from_the_environment_with_credentials_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match="would be stored"):
        start_run(make_config(tmp_path), run_dir=str(tmp_path / "small"))
    assert not (tmp_path / "small").exists()


def test_innocent_keys_pass() -> None:
    innocent = {
        "max_new_tokens": 128,
        "tokenizer": "bytes",
        "mask_token": "<mask>",
        "api_key_env": "OPENAI_KEY",
        "keys": "a, b",
        "num_key_value_heads": 8,
        "monkey": 1,
        "uri": "s3://bucket/some:thing@x",
        "password": "",
    }
    assert set(flat_params(innocent)) == set(innocent)


def test_redacted_text_keeps_the_rest() -> None:
    text = "+url = 'https://me:" + "pw123@host/x'\n+ok = 1\n+k = '" + PLANTED["AWS"] + "'\n"
    assert redact_text(text) == "+url = 'https://<redacted>@host/x'\n+ok = 1\n+k = '<redacted>'\n"


def test_secrets_in_source_are_blacked_out_and_code_is_not() -> None:
    key = "-----BEGIN " + "PRIVATE KEY-----"
    end = "-----END " + "PRIVATE KEY-----"
    secrets = {
        '+password = "correct horse"': "+password = <redacted>",
        "+AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI": "+AWS_SECRET_ACCESS_KEY=<redacted>",
        "-PASSWORD=hunter": "-PASSWORD=<redacted>",
        ' "hf_token": "abc",': ' "hf_token": <redacted>,',
        '+os.environ["MY_PASSWORD"] = "x"': '+os.environ["MY_PASSWORD"] = <redacted>',
        '+    api_key: str | None = "x"': "+    api_key: str | None = <redacted>",
        '+PASSWORD = ("x")': "+PASSWORD = (<redacted>)",
        '+environ.setdefault("DB_PASSWORD", "x")': '+environ.setdefault("DB_PASSWORD", <redacted>)',
        '+h = {"Authorization": "Bearer abc123abc123"}': '+h = {"Authorization": "Bearer <redacted>"}',
        '+client = Client(url, api_key="x")': "+client = Client(url, api_key=<redacted>)",
        '+client = Client(api_key="x", b=1)': "+client = Client(api_key=<redacted>, b=1)",
        '+    .password = "x"': "+    .password = <redacted>",
        "+db_password: hunter2": "+db_password: <redacted>",
        f"+{key}\n+MIIEvQIBADANBg\n+kqhkiG9w0BAQEF\n+{end}\n+x = 1": "+<redacted>\n+x = 1",
        f'+k = "{key}\\nMIIEvQIBADANBg\\n{end}\\n"': '+k = "<redacted>\\n"',
    }
    for text, expected in secrets.items():
        assert redact_source(text) == expected
    code = [
        "+password: str",
        "+    token = tokens[index]",
        "+token: Token = read(path)",
        "+max_new_tokens=128",
        "+secret = get_secret(name)",
        '+mask_token = "<mask>"',
        "+api_key_env: OPENAI_KEY2",
        '+names = ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY"]',
        '+names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY")',
        '+compare("token", "word")',
        "+# the bearer of the longest-name",
    ]
    for text in code:
        assert redact_source(text) == text


@pytest.mark.parametrize(
    "piece", ["a", "a.", "token ", "token: a ", "password=(", "password=", "a=", "a-", "'\"", "Bearer ", " "]
)
def test_long_lines_of_source_are_read_in_one_pass(piece: str) -> None:
    """A search that goes back for each character would need an hour for the MiB of a diff."""
    text = piece * ((1 << 18) // len(piece))
    assert redact_source(text) == text
