"""Checkpoints: a folder of files with a manifest of their sha256, which appears whole or not at all. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from system.run_error import RunError

MANIFEST = "manifest.json"


class CheckpointError(RunError):
    """A checkpoint cannot be read or written. The message names it, and says which one is whole and how to go on."""


def write(folder: Path, step: int, files: dict[str, bytes], keep: int = 2) -> Path:
    """Writes `folder/step-NNNNNNNN` and keeps those before it, `keep` in all. Nothing is removed until this one is whole.

    Checkpoints of later steps go too: a run that writes this one went on from before them, because they were damaged.

    Raises:
        CheckpointError: the disk is full or read-only; earlier checkpoints are as they were.
    """
    target = folder / _name(step)
    part = folder / f".{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, data in files.items():
            _write_durably(part / name, data)
        manifest = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        _write_durably(part / MANIFEST, json.dumps({"step": step, "sha256": manifest}, indent=2).encode())
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {target} cannot be written: {error.strerror or error}; make room there or make it writable, then "
            f"resume the run: {_offer(folder)}"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    earlier = [path for path in _folders(folder) if path < target]
    for old in _folders(folder):
        if old != target and old not in earlier[1 - keep :]:
            shutil.rmtree(old)
    return target


def read_latest(folder: Path, step: int | None = None) -> dict[str, bytes]:
    """The files of the newest checkpoint, or of that of `step`. The one before is offered and never taken for a damaged one.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    there = _folders(folder)
    if not there:
        raise CheckpointError(
            f"{folder} holds no checkpoint to go on from: the run ended before its first (learner.checkpoint_every updates); "
            f"start it anew: python deploy/job.py {folder.parent}/config.yaml"
        )
    chosen = there[-1] if step is None else folder / _name(step)
    if chosen not in there:
        raise CheckpointError(f"{chosen} is not there: {_offer(folder)}")
    files, wrong = _read(chosen)
    if wrong:
        raise CheckpointError(f"checkpoint {chosen} is refused: {wrong}; {_offer(folder)}")
    return files


def _read(path: Path) -> tuple[dict[str, bytes], str]:
    """(the files of a checkpoint, what is wrong with it or nothing)."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        if (found := {file.name for file in path.iterdir()}) != {*manifest, MANIFEST}:
            return {}, f"its files are {sorted(found)}, not those of its manifest"
        files = {name: (path / name).read_bytes() for name in manifest}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"{type(error).__name__}: {error}"
    damaged = [name for name, data in files.items() if hashlib.sha256(data).hexdigest() != manifest[name]]
    return files, f"damaged: {', '.join(damaged)}" if damaged else ""


def _offer(folder: Path) -> str:
    whole = whole_steps(folder)
    if not whole:
        return f"{folder} holds no other whole checkpoint: start the run anew"
    return f"{_name(whole[-1])} is whole; go on from there with --from-step {whole[-1]}"


def steps(folder: Path) -> list[int]:
    """Of the checkpoints that are there, damaged or not, in order."""
    return [_step(path) for path in _folders(folder)]


def whole_steps(folder: Path) -> list[int]:
    """Of the checkpoints that can be read, in order."""
    return [_step(path) for path in _folders(folder) if not _read(path)[1]]


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
