"""What produced a run: code, uncommitted changes, library versions, job."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass

from raydist.tracking.secrets import redact_source

_LIBRARIES = ("torch", "ray", "mlflow", "pyarrow", "raydist")
_MAX_DIFF_BYTES = 1 << 20
_GIT_TIMEOUT_S = 10.0
_FILES_OF_SECRETS = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.keystore", "*.tfvars", "*credential*", "*secret*",
    "id_rsa*", "id_ed25519*", "id_ecdsa*", ".netrc", ".npmrc", ".pypirc", ".pgpass", ".htpasswd", "kubeconfig*",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The code of a run.

    Attributes:
        commit: hash of HEAD, or None outside of git.
        diff: changes of tracked files against HEAD, cut at 1 MiB, without files that are made for secrets, credentials
            blacked out; empty where the tree is clean.
        untracked: whether there are files that git neither knows nor ignores.
    """

    commit: str | None
    diff: str
    untracked: bool

    @property
    def dirty(self) -> bool:
        """Whether the run used more than the commit holds."""
        return bool(self.diff) or self.untracked


def read_source(folder: str = ".") -> Source:
    """The state of the git work tree that a folder is in."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return Source(commit=None, diff="", untracked=False)
    diff = _diff(folder)
    untracked = _git(folder, "ls-files", "--others", "--exclude-standard", "--directory")
    return Source(commit=commit.strip(), diff=diff, untracked=bool(untracked))


def _diff(folder: str) -> str:
    excluded = [f":(top,exclude,icase,glob)**/{pattern}" for pattern in _FILES_OF_SECRETS]
    options = ["--no-color", "--no-ext-diff", "--no-textconv"]
    diff = _git(folder, "diff", *options, "HEAD", "--", ":(top)", *excluded, max_bytes=_MAX_DIFF_BYTES + 1) or ""
    if len(diff.encode()) > _MAX_DIFF_BYTES:
        diff = diff.encode()[:_MAX_DIFF_BYTES].decode(errors="ignore") + "\n[cut at 1 MiB]\n"
    return redact_source(diff)


def _git(folder: str, *arguments: str, max_bytes: int = -1) -> str | None:
    """Output of a git command, its beginning where it is longer; None where git or the repository is missing."""
    with tempfile.TemporaryFile() as output:
        try:
            command = ["git", "-C", folder, *arguments]
            subprocess.run(command, stdout=output, stderr=subprocess.DEVNULL, timeout=_GIT_TIMEOUT_S, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        output.seek(0)
        return output.read(max_bytes).decode(errors="replace")


def versions() -> dict[str, str]:
    """Python and the libraries that decide what a run computes; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def lineage_tags(source: Source) -> dict[str, str]:
    """Tags of a run: ``git.*``, ``version.*``, the Ray job, and what MLflow's own pages show."""
    tags = {f"version.{name}": version for name, version in versions().items()}
    tags["mlflow.source.name"] = "raydist"
    tags["mlflow.source.type"] = "JOB" if _ray_job() else "LOCAL"
    tags["mlflow.user"] = _user()
    if source.commit is not None:
        tags["git.commit"] = tags["mlflow.source.git.commit"] = source.commit
        tags["git.dirty"] = str(source.dirty).lower()
    tags.update(_ray_job())
    return tags


def _ray_job() -> dict[str, str]:
    """Ids of the Ray job that this process runs in, as Ray leaves them in the environment."""
    tags = {}
    if os.environ.get("RAY_JOB_ID"):
        tags["ray.job_id"] = os.environ["RAY_JOB_ID"]
    try:
        job_config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        tags["ray.submission_id"] = str(job_config["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        pass
    return tags


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
