"""What a run left: its folder, and its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from system.config import ConfigError, Lora

if TYPE_CHECKING:
    import numpy as np

    from learner.policy import Policy


def find_run(name: str) -> Path:
    """The folder of a run, given itself or by its name under runs/. Raises ConfigError if there is none."""
    for folder in (Path(name), Path("runs") / name):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    known = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))[-5:]
    raise ConfigError(f"RUN={name!r}: no such run; the newest here are: {', '.join(known) or 'none'}")


def check_output(option: str, path: Path) -> None:
    """For what is written when long work is done. Raises ConfigError if no file can be there."""
    if path.is_dir():
        raise ConfigError(f"{option} {str(path)!r} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {str(path)!r}: there is no folder {path.absolute().parent}; make it first")


def adapter_file(run_dir: Path) -> Path:
    """Raises ConfigError if the run has none."""
    path = run_dir / "adapter" / "adapter_model.safetensors"
    if not path.is_file():
        raise ConfigError(f"{run_dir} has no {path.relative_to(run_dir)}: the run did not end; --resume it first")
    return path


def load_adapter(policy: Policy, path: Path, model: str, rank: int) -> None:
    """Raises ConfigError if the adapter is damaged, or not of `model` and `rank`, the policy's own."""
    from system.adapters import AdapterError, read_folder

    try:
        policy.load_adapter(read_folder(path.parent, model))
    except AdapterError as error:
        raise ConfigError(str(error)) from error
    except ValueError as error:
        raise ConfigError(f"{path} does not fit lora.rank={rank}: {error}") from error


def starting_weights(lora: Lora) -> np.ndarray:
    """The adapter `lora.start` in the form that a learner restores, without moments of the optimizer.

    Raises:
        ConfigError: there is none, or it is no safetensors file.
    """
    import numpy as np
    import safetensors
    import safetensors.numpy

    assert lora.start is not None
    names = ("adapter/adapter_model.safetensors", "adapter_model.safetensors")
    files = [Path(root) / lora.start / name for root in (".", "runs") for name in names]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        raise ConfigError(f"lora.start={lora.start!r}: no run and no PEFT folder with adapter_model.safetensors is there")
    try:
        tensors = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"lora.start={lora.start!r}: {path} is damaged: {error}") from error
    return np.frombuffer(safetensors.numpy.save({f"adapter/{name}": tensor for name, tensor in tensors.items()}), np.uint8)
