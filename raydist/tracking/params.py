"""The configuration as MLflow parameters: flat, stable, short, and without secrets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from raydist.config.load import flatten
from raydist.core.errors import ConfigError
from raydist.tracking.secrets import REDACTED, secret_keys

MAX_VALUE_CHARS = 6000
MAX_KEY_CHARS = 250


def flat_params(values: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys to strings.

    A value above MLflow's limit becomes ``sha256:<hash> (<n> characters)``; the run's config.yaml has the whole value.

    Raises:
        ConfigError: a value is or is named like a secret, which would be stored in plain text.
    """
    flat = {_key(key): _text(value) for key, value in flatten(dict(values)).items()}
    secrets = secret_keys(flat)
    if secrets:
        raise ConfigError(
            "this looks like a secret, and recipes are stored in plain text",
            where=", ".join(secrets),
            found=REDACTED,
            expected="the name of an environment variable or of a credentials profile",
            fix="give credentials through the environment (AWS_PROFILE, MLFLOW_TRACKING_PASSWORD, ...), not the recipe",
        )
    return {key: _short(text) for key, text in flat.items()}


def _key(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key)[:MAX_KEY_CHARS]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _short(text: str) -> str:
    if len(text) <= MAX_VALUE_CHARS:
        return text
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()} ({len(text)} characters)"
