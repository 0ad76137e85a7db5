"""What a run left: its folder, and its adapter."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from system import checkpoint, config_file
from system.config import Config, ConfigError, Lora

if TYPE_CHECKING:
    import numpy as np

    from learner.policy import Policy


logger = logging.getLogger("headwater")

RAY_COPIES = "runtime_resources"
"""The folder of a node's session in which Ray keeps what jobs bring along."""


def find_run(name: str) -> Path:
    """The folder of a run, given itself or by its name under runs/. Raises ConfigError if there is none."""
    for folder in (Path(name), Path("runs") / name):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    known = sorted(Path("runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)[-5:]
    newest = ", ".join(path.parent.name for path in known)
    raise ConfigError(
        f"RUN={name!r}: no such run; give its folder; the newest under {Path('runs').resolve()} are: {newest or 'none'}"
    )


def make_folder(config: Config, folder: Path) -> None:
    """Of a run, under config.output_dir. Raises ConfigError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={config.output_dir!r}: no folder can be made there: {error}") from error


def check_output(option: str, path: Path) -> None:
    """For what is written when long work is done. Raises ConfigError if no file can be there."""
    folder = path.absolute().parent
    if path.is_dir():
        raise ConfigError(f"{option} {str(path)!r} is a folder; name a file")
    if not folder.is_dir():
        raise ConfigError(f"{option} {str(path)!r}: there is no folder {folder}; make it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(
            f"{option} {str(path)!r} cannot be written: it, or its folder, is not yours or read-only; name another"
        )


def adapter_file(run_dir: Path) -> Path:
    """Raises ConfigError if the run has none."""
    path = run_dir / "adapter" / "adapter_model.safetensors"
    if not path.is_file():
        missing = f"{run_dir} has no {path.relative_to(run_dir)}: the run did not end; --resume it first"
        raise ConfigError(missing + _or_its_checkpoint(run_dir))
    return path


def _or_its_checkpoint(run_dir: Path) -> str:
    """What else there is of a run whose adapter cannot be used."""
    steps = checkpoint.whole_steps(run_dir / "checkpoints")
    return f", or use its checkpoint by --step {steps[-1]}" if steps else ""


def adapter_at(run_dir: Path, config: Config, step: int | None) -> Path:
    """The run's adapter file; with a step that of its checkpoint there, which is written to RUN/adapter-step-N-… once. `config`
    is the run's, as it is used here. Needs torch with a step alone.

    Raises:
        ConfigError: the run has none, there is no whole checkpoint of that step, or the model cannot be had.
        CheckpointError: the checkpoint is of another model.
    """
    if step is None:
        return adapter_file(run_dir)
    from system.loop_state import LoopState

    try:
        saved = LoopState.latest(run_dir / "checkpoints", step)
    except checkpoint.CheckpointError as error:
        there = ", ".join(map(str, checkpoint.steps(run_dir / "checkpoints"))) or "none"
        raise ConfigError(f"--step {step}: {run_dir} has no whole checkpoint of it; there are {there}") from error
    # A run that went on from an earlier step may have another one of the same number.
    path = run_dir / f"adapter-step-{step}-{hashlib.sha256(saved.learner.data).hexdigest()[:8]}" / "adapter_model.safetensors"
    if not path.is_file():
        from deploy.prepare import prepare
        from learner.learner import Learner

        here = {"device": "cpu", "gpus": 0, "ranks": 1, "shard_base": False, "attention": "dense"}
        learner = Learner.build(
            config.model_copy(update={"learner": config.learner.model_copy(update=here)}), prepare(config).problem
        )
        learner.restore(saved.learner, step)
        # Its name there, wherever it is now.
        learner.base_model = config_file.load(run_dir / "config.yaml", []).model.path
        try:
            learner.adapter(saved.counters.version).materialise(path.parent)
        except OSError:
            if not path.is_file():  # by another process, meanwhile
                raise
    return path


def add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, metavar="N", help="not the run's end, but its checkpoint after N updates")


def passes_away(path: Path) -> bool:
    """It is in the copy of a submitted job's working directory, which the cluster removes."""
    return RAY_COPIES in path.resolve().parts


def adapter_tensors(path: Path, model: str, lora: Lora) -> dict[str, np.ndarray]:
    """What a run's adapter file holds, by PEFT's names. Its base may have moved: `model` is then taken for it, and named.

    Raises:
        ConfigError: it is damaged, of another base than the run's, or its updates count for more or less than `lora` says.
    """
    from system.adapters import AdapterError, read_folder

    own = config_file.load(path.parents[1] / "config.yaml", []).model.path
    if own != model:
        _warn_of_base(own, model)
    try:
        tensors = read_folder(path.parent, own)
        _check_scale(path.parent, lora)
    except AdapterError as error:
        by_step = path.parent.name != "adapter"
        instead = f", or remove {path.parent}, which --step writes" if by_step else _or_its_checkpoint(path.parents[1])
        raise ConfigError(f"{error}{instead}") from error
    except (OSError, ValueError) as error:
        raise _misfit(path, lora, error) from error
    return tensors


@cache
def _warn_of_base(own: str, model: str) -> None:
    """Once, however often the adapter is read."""
    logger.warning("model.path=%r is taken for %r, of which this adapter is", model, own)


def load_adapter(policy: Policy, path: Path, model: str, lora: Lora) -> None:
    """`model` and `lora` are those of the policy. Raises ConfigError if the adapter is damaged, or of others."""
    tensors = adapter_tensors(path, model, lora)
    try:
        policy.load_adapter(tensors)
    except ValueError as error:
        raise _misfit(path, lora, error) from error


def _misfit(path: Path, lora: Lora, error: Exception) -> ConfigError:
    return ConfigError(f"{path} does not fit {lora.shape}: {error}")


def _check_scale(folder: Path, lora: Lora) -> None:
    """That an adapter's updates count as much there as here: with another scale the same weights are another policy.

    Raises:
        ValueError, OSError: its adapter_config.json cannot be read, is of no plain LoRA, or has another scale.
    """
    from system.adapters import PEFT_CONFIG, AdapterError, scale_of

    try:
        scale = scale_of(json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8")))
    except (AdapterError, KeyError, TypeError) as error:
        raise ValueError(f"{PEFT_CONFIG}: {error}") from error
    if not math.isclose(scale, lora.alpha / lora.rank):
        raise ValueError(
            f"its updates are scaled by lora_alpha / r = {scale:g}, the policy's by lora.alpha / lora.rank = {lora.alpha:g} / "
            f"{lora.rank}; set lora.alpha={scale * lora.rank:g}"
        )


def starting_weights(config: Config) -> np.ndarray:
    """The adapter `lora.start` in the form that a learner restores, without moments of the optimizer.

    Raises:
        ConfigError: there is none, it is damaged, of another base, no plain LoRA, or of another scale than the run's.
    """
    import numpy as np
    import safetensors
    import safetensors.numpy

    from system.adapters import MANIFEST, WEIGHTS, AdapterError, read_folder

    start = config.lora.start
    assert start is not None
    places = [Path(root) / start / name for root in (".", "runs") for name in ("adapter", ".")]
    folder = next((folder for folder in places if (folder / WEIGHTS).is_file()), None)
    if folder is None:
        raise ConfigError(f"lora.start={start!r}: no run and no PEFT folder with {WEIGHTS} is there")
    try:
        # A PEFT folder that another program wrote says nothing by which its bytes and its base could be known.
        own = (folder / MANIFEST).is_file()
        tensors = read_folder(folder, config.model.path) if own else safetensors.numpy.load_file(folder / WEIGHTS)
        _check_scale(folder, config.lora)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"lora.start={start!r}: {folder / WEIGHTS} is damaged: {error}") from error
    except (AdapterError, OSError, ValueError) as error:
        raise ConfigError(f"lora.start={start!r}: {error}") from error
    return np.frombuffer(safetensors.numpy.save({f"adapter/{name}": tensor for name, tensor in tensors.items()}), np.uint8)
