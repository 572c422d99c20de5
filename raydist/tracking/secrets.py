"""What looks like a credential, by its name or by itself, so that none is written where others read it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

REDACTED = "<redacted>"

_SECRET_WORDS = {
    "password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials", "apikey", "token",
    "authtoken", "accesstoken", "hftoken", "secretkey", "accesskey", "privatekey",
}  # fmt: skip
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("auth", "key"), ("secret", "key")}
_TOKENS_OF_TEXT = {"mask", "bos", "eos", "pad", "unk", "sep", "cls", "stop", "special"}
_NAMES_OF_SECRETS = {"name", "env", "file", "path", "profile"}
_SECRET_VALUE = re.compile(
    r"""
      -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----(?s:.{0,20000}?)-----END[ ][A-Z ]*PRIVATE[ ]KEY-----
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----(?:(?:\\n|\r?\n)[-+ ]?[A-Za-z0-9+/=]{16,})*
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
    | (?<=[Bb]earer[ ])(?=[^\s'"]*\d)[A-Za-z0-9._~+/=-]{12,}
    | (?<=[?&])(?i:[\w.-]*(?:password|passwd|secret|token|signature|credential|access_?key|api_?key)[\w.-]*|sig)=[^&\s'"]+
    """,
    re.VERBOSE,
)
# name = value, name: value, "name": "value", NAME=value, at["name"] = value, name: type = "value", name = ("value"),
# call("NAME", "value"); the name is judged by the same words as a recipe's keys
_ASSIGNED = re.compile(
    r"""
    (?<!\w)(?<!\w[.-])(?P<name>\w[\w.-]*+)
    (?: ["']?\]? (?:[ \t]*:[ \t]*[A-Za-z_][\w.\[\]| ]*+(?==[ \t]*\(?["']))? \s*[:=]\s*\(?
      | ["'](?P<comma>,)[ \t]*(?=["']) )
    """,
    re.VERBOSE,
)
# A string, or a word without the brackets of a call, a type or an index.
_VALUE = re.compile(r""""[^"\n]*"|'[^'\n]*'|[^\s,;}\])(\[{<|]++(?![(\[{<|])""")
_CALL = re.compile(r"""\w\(["']""")
_QUOTED = re.compile(r"""["'].+["']""")
_CODE = re.compile(r"str|int|bytes|bool|float|object|Any|None|True|False|null|true|false")
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[A-Za-z0-9+/=_-]{16,}")


def secret_keys(flat: Mapping[str, str]) -> list[str]:
    """Keys whose name or value looks like a credential, sorted."""
    return sorted(key for key, text in flat.items() if text and (_is_secret_pair(key, text) or has_secret(text)))


def has_secret(text: str) -> bool:
    """Whether something in the text looks like a credential."""
    return _SECRET_VALUE.search(text) is not None


def redact_text(text: str) -> str:
    """Text with everything that looks like a credential replaced."""
    return _SECRET_VALUE.sub(REDACTED, text)


def redact_source(text: str) -> str:
    """Like :func:`redact_text`, for files and diffs: literals that are given to a name of a secret go, too."""
    text = redact_text(text)
    parts: list[str] = []
    end = position = 0
    while assigned := _ASSIGNED.search(text, position):
        position = assigned.end()  # of a call, the names inside are looked at next
        value = _VALUE.match(text, position) if _may_give_secret(assigned) else None
        if value is None:
            continue
        if _is_literal(value[0], name=assigned["name"]):
            parts += [text[end:position], REDACTED]
            end = value.end()
        position = value.end()
    return "".join([*parts, text[end:]])


def _may_give_secret(assigned: re.Match[str]) -> bool:
    """Whether a value for the name of a secret follows; after a comma only in ``setdefault("DB_PASSWORD", "...")``."""
    name, start = assigned["name"], assigned.start()
    if assigned["comma"] and not (name.isupper() and _CALL.fullmatch(assigned.string, max(0, start - 3), start)):
        return False
    return names_secret(name)


def _is_literal(value: str, *, name: str) -> bool:
    """Whether a value is one by itself, and not a type or another name of the program.

    A lone word counts for an environment variable's spelling, and with a digit in it: most tokens of programs about text
    are no secrets.
    """
    if _QUOTED.fullmatch(value):
        return True
    return _CODE.fullmatch(value) is None and (name.isupper() or (len(value) >= 6 and any(c.isdigit() for c in value)))


def _is_secret_pair(key: str, text: str) -> bool:
    words = _words(key)
    return names_secret(key) or (len(words) > 1 and words[-1] == "key" and _RANDOM.fullmatch(text) is not None)


def names_secret(key: str) -> bool:
    """Whether a dotted key, by its last part, is the name of a secret and not of a place where one is kept."""
    words = _words(key)
    if not words or words[-1] in _NAMES_OF_SECRETS or (words[-1] == "token" and _TOKENS_OF_TEXT & set(words)):
        return False
    return bool(_SECRET_WORDS & set(words)) or any(pair in _SECRET_PAIRS for pair in itertools.pairwise(words))


def _words(key: str) -> list[str]:
    """The words of ``hf_token``, ``HF-TOKEN`` or ``hfToken``."""
    last = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key.rsplit(".", 1)[-1])
    return [word for word in re.split(r"[^a-z0-9]+", last.lower()) if word]
