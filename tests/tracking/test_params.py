"""Parameters fit the server's limits and carry no secrets."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from raydist.core.errors import ConfigError
from raydist.tracking.params import MAX_KEY_CHARS, MAX_VALUE_CHARS, flat_params, redact_text


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
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_secret_value_is_refused_without_repeating_it(kind: str) -> None:
    secret = PLANTED[kind]
    with pytest.raises(ConfigError) as caught:
        flat_params({"tracking": {"tags": {"note": f"see {secret}"}}})
    assert caught.value.where == "tracking.tags.note"
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["password", "hf_token", "aws-secret", "API_KEY", "access.private_key", "my_credentials"]
)
def test_a_key_named_like_a_secret_is_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        flat_params({"tracking": {"tags": {key: "opensesame"}}})


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
