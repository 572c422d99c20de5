"""The configuration as MLflow parameters: flat, stable, short, and without secrets."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

from raydist.config.load import flatten
from raydist.core.errors import ConfigError

MAX_VALUE_CHARS = 6000
MAX_KEY_CHARS = 250
REDACTED = "<redacted>"

_SECRET_WORDS = {
    "password",
    "passwd",
    "passphrase",
    "secret",
    "secrets",
    "credential",
    "credentials",
    "apikey",
    "token",
}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("auth", "key"), ("secret", "key")}
_TOKENS_OF_TEXT = {"mask", "bos", "eos", "pad", "unk", "sep", "cls", "stop", "special"}
_NAMES_OF_SECRETS = {"name", "env", "file", "path", "profile"}
_SECRET_VALUE = re.compile(
    r"""
      -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b                      # AWS access key
    | \bgh[pousr]_[A-Za-z0-9]{20,}                       # GitHub
    | \bgithub_pat_[A-Za-z0-9_]{20,}
    | \bglpat-[A-Za-z0-9_-]{16,}                         # GitLab
    | \bhf_[A-Za-z0-9]{20,}                              # Hugging Face
    | \bsk-[A-Za-z0-9_-]{20,}                            # model providers
    | \bxox[abprs]-[A-Za-z0-9-]{10,}                     # Slack
    | \bAIza[A-Za-z0-9_-]{30,}                           # Google
    | \beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.   # JSON web token
    | (?<=://)[^/\s:@]+:[^/\s@]+(?=@)                    # user:password in an address
    """,
    re.VERBOSE,
)


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


def secret_keys(flat: Mapping[str, str]) -> list[str]:
    """Keys whose name or value looks like a credential, sorted."""
    return sorted(key for key, text in flat.items() if text and (_names_secret(key) or _SECRET_VALUE.search(text)))


def redact_text(text: str) -> str:
    """Text with everything that looks like a credential replaced."""
    return _SECRET_VALUE.sub(REDACTED, text)


def _names_secret(key: str) -> bool:
    words = [word for word in re.split(r"[^a-z0-9]+", key.rsplit(".", 1)[-1].lower()) if word]
    if not words or words[-1] in _NAMES_OF_SECRETS or (words[-1] == "token" and _TOKENS_OF_TEXT & set(words)):
        return False
    return bool(_SECRET_WORDS & set(words)) or any(pair in _SECRET_PAIRS for pair in itertools.pairwise(words))


def _key(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key)[:MAX_KEY_CHARS]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _short(text: str) -> str:
    if len(text) <= MAX_VALUE_CHARS:
        return text
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()} ({len(text)} characters)"
