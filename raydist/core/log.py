"""Quiet libraries and one place where our own messages go."""

from __future__ import annotations

import logging
import os
import sys
import warnings

_NOISY = ("ray", "mlflow", "alembic", "torch", "urllib3", "botocore", "s3fs", "fsspec", "matplotlib")
_QUIET_ENV = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TQDM_PATCH_PRINT": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOG_minloglevel": "2",
}


def get_logger(name: str) -> logging.Logger:
    """The logger of one of our modules, below ``raydist``."""
    return logging.getLogger(name if name.startswith("raydist") else f"raydist.{name}")


def quiet_libraries() -> None:
    """Stops the warning walls of Ray, MLflow and torch; called by the command line and by each worker.

    Environment variables that a user set are left alone.
    """
    for key, value in _QUIET_ENV.items():
        os.environ.setdefault(key, value)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|ray|mlflow)(\..*)?")


def set_up_logging(level: str = "WARNING") -> None:
    """Sends our messages to stderr, once."""
    root = logging.getLogger("raydist")
    root.setLevel(level)
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname).1s %(name)s: %(message)s"))
        root.addHandler(handler)
        root.propagate = False
