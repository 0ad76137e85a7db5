"""Checkpoints: a folder of files with a manifest of their sha256, which appears whole or not at all. No pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
KEEP = 2
"""Checkpoints on disk: the newest, and the one before, should the newest be damaged."""


class CheckpointError(RuntimeError):
    """No checkpoint to continue from. The message names what was found."""


def write(folder: Path, step: int, files: dict[str, bytes]) -> Path:
    """Writes `folder/step-NNNNNNNN` and keeps the one before it. Nothing is removed until this one is whole.

    Checkpoints of later steps go too: a run that writes this one went on from before them, because they were damaged.

    Raises:
        OSError: the disk is full or read-only; earlier checkpoints are as they were.
    """
    target = folder / f"step-{step:08d}"
    part = folder / f".{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name, data in files.items():
            _write_durably(part / name, data)
        manifest = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        _write_durably(part / MANIFEST, json.dumps({"step": step, "sha256": manifest}, indent=2).encode())
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    earlier = [path for path in _steps(folder) if path < target]
    for old in _steps(folder):
        if old != target and old not in earlier[-(KEEP - 1) :]:
            shutil.rmtree(old)
    return target


def read_latest(folder: Path) -> dict[str, bytes]:
    """The files of the newest checkpoint that is whole; a damaged one is named in the log and the one before is taken.

    Raises:
        CheckpointError: there is none.
    """
    for candidate in reversed(_steps(folder)):
        try:
            manifest = json.loads((candidate / MANIFEST).read_text(encoding="utf-8"))["sha256"]
            if (found := {path.name for path in candidate.iterdir()}) != {*manifest, MANIFEST}:
                raise ValueError(f"its files are {sorted(found)}, not those of its manifest")
            files = {name: (candidate / name).read_bytes() for name in manifest}
        except (OSError, ValueError, KeyError) as error:
            logger.warning("checkpoint %s is refused: %s", candidate, error)
            continue
        damaged = [name for name, data in files.items() if hashlib.sha256(data).hexdigest() != manifest[name]]
        if not damaged:
            return files
        logger.warning("checkpoint %s is refused: damaged %s", candidate, ", ".join(damaged))
    raise CheckpointError(f"{folder} holds no whole checkpoint to resume from")


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
