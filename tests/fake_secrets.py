"""Secrets of nobody, in the environment of what tests start, which are to be in no file that it leaves."""

from __future__ import annotations

import secrets
from pathlib import Path

NAMES = (
    "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY",
    "WANDB_API_KEY",
)  # fmt: skip
SECRETS = {name: secrets.token_hex(16) for name in NAMES}


def assert_none_in(*folders: Path, holding: set[str]) -> None:
    """Nor below them, where files of these names are."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert holding <= {path.name for path in files}
    found = [(str(path), name) for path in files for name, value in SECRETS.items() if value.encode() in path.read_bytes()]
    assert not found, found
