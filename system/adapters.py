"""Versioned LoRA adapters: what the learner publishes and a sampler installs.

An adapter travels as bytes with a manifest, so no shared filesystem is assumed. The manifest's sha256 proves that the
bytes arrived, its canary (a token sequence with the learner's own log-probs) that the engine runs what they say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from safetensors import safe_open

from system.run_error import RunError
from system.whole_file import whole_folder

if TYPE_CHECKING:
    import torch

WEIGHTS, PEFT_CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "headwater.json"
PEFT_PREFIX = "base_model.model."
PLAIN_LORA = {
    "use_dora": False, "use_rslora": False, "lora_bias": False, "bias": "none",
    "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip
"""What adapter_config.json says, or leaves out, of an update that is W + (alpha / r) B A and nothing else."""


class AdapterError(RunError):
    """An adapter is damaged, belongs to another model, or is not what the engine runs."""


def scale_of(peft_config: Mapping[str, Any]) -> float:
    """What B A is multiplied with. Raises AdapterError for an adapter_config.json of anything but plain LoRA."""
    for field, plain in PLAIN_LORA.items():
        value = peft_config.get(field)
        if value and value != plain:
            raise AdapterError(f"{field}={value!r} is no plain LoRA; use {field}={plain!r}")
    return float(peft_config["lora_alpha"]) / peft_config["r"]


@dataclass(frozen=True, slots=True, eq=False)
class Canary:
    """Proof of delivery: the learner's log-prob of each token of a fixed sequence, given those before it."""

    tokens_T: tuple[int, ...]
    logp_T: tuple[float, ...]
    """[T - 1] nats, of tokens 1..T-1 under base + adapter, over the whole vocabulary at temperature 1."""
    base_logp_T: tuple[float, ...]
    """The same under the base alone: how far apart the two are says how much the canary proves."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraUpdate:
    """What one module gets: W + scale * B A, or its transpose where the weight is stored [in, out], as GPT-2's are."""

    a_RI: np.ndarray
    """float32 [rank, in]."""
    b_OR: np.ndarray
    """float32 [out, rank]."""
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it is added to."""
        out, in_ = len(self.b_OR), self.a_RI.shape[1]
        return (in_, out) if self.transposed else (out, in_)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One published version. The weights are those of a PEFT folder, so the result needs nothing of this project."""

    version: int
    step: int
    """Updates done when it was published."""
    weights: np.ndarray
    """uint8: the bytes of adapter_model.safetensors. An array, because Ray hands one over without a copy."""
    peft_config: dict[str, Any]
    """adapter_config.json."""
    sha256: str
    base_model: str
    canary: Canary | None = None

    @classmethod
    def of(
        cls,
        version: int,
        step: int,
        tensors: dict[str, np.ndarray],
        peft_config: dict[str, Any],
        base_model: str,
        canary: Canary | None = None,
    ) -> Adapter:
        weights = np.frombuffer(safetensors.numpy.save(tensors), np.uint8)
        return cls(version, step, weights, peft_config, hashlib.sha256(weights.data).hexdigest(), base_model, canary)

    def verify(self, base_model: str) -> None:
        """Raises AdapterError if the bytes are not those that were published, or the base is another model."""
        found = hashlib.sha256(self.weights.data).hexdigest()
        if found != self.sha256:
            raise AdapterError(f"adapter version {self.version}: sha256 {found[:12]}… instead of {self.sha256[:12]}…: damaged")
        if self.base_model != base_model:
            raise AdapterError(f"adapter version {self.version} belongs to {self.base_model!r}, not to {base_model!r}")

    def tensors(self) -> dict[str, np.ndarray]:
        return safetensors.numpy.load(self.weights.tobytes())

    def updates(self) -> dict[str, LoraUpdate]:
        """Module name -> what is added to its weight. Raises AdapterError for anything but plain LoRA."""
        try:
            return updates_of(self.tensors(), self.peft_config)
        except AdapterError as error:
            raise AdapterError(f"adapter version {self.version}: {error}") from error

    def materialise(self, folder: Path) -> Path:
        """Writes a standard PEFT folder, and what `read_folder` checks it by; it appears whole or not at all."""
        peft_config = json.dumps(self.peft_config, indent=2, sort_keys=True).encode()
        manifest = {"version": self.version, "step": self.step, "sha256": self.sha256, "base_model": self.base_model}
        manifest["config_sha256"] = hashlib.sha256(peft_config).hexdigest()
        with whole_folder(folder) as part:
            (part / WEIGHTS).write_bytes(self.weights.tobytes())
            (part / PEFT_CONFIG).write_bytes(peft_config)
            (part / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        return folder


def updates_of(tensors: dict[str, np.ndarray], peft_config: dict[str, Any]) -> dict[str, LoraUpdate]:
    """Module name -> what PEFT's tensors add to its weight. Raises AdapterError for anything but plain LoRA."""
    scale, suffixes = scale_of(peft_config), (".lora_A.weight", ".lora_B.weight")
    modules = sorted({name.removesuffix(suffix) for name in tensors for suffix in suffixes if name.endswith(suffix)})
    if 2 * len(modules) != len(tensors) or not all(module + suffix in tensors for module in modules for suffix in suffixes):
        raise AdapterError(
            "its tensors are not one lora_A and one lora_B for each module; train it without DoRA, a bias or modules_to_save"
        )
    transposed = bool(peft_config.get("fan_in_fan_out"))
    result = {}
    for module in modules:
        a_RI, b_OR = (tensors[module + suffix].astype(np.float32, copy=False) for suffix in suffixes)
        result[module.removeprefix(PEFT_PREFIX)] = LoraUpdate(a_RI, b_OR, scale, transposed)
    return result


def read_folder(folder: Path, base_model: str) -> dict[str, np.ndarray]:
    """The tensors of an adapter that `Adapter.materialise` wrote, by PEFT's names.

    Raises:
        AdapterError: a file is missing or damaged, or the adapter is of another base model.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        data, peft_config = (folder / WEIGHTS).read_bytes(), (folder / PEFT_CONFIG).read_bytes()
        sha256, base = manifest["sha256"], manifest["base_model"]
        # Adapters of earlier versions have none of it.
        config_sha256 = manifest.get("config_sha256", found := hashlib.sha256(peft_config).hexdigest())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"adapter {folder} cannot be read: {error}; it is written when its run ends: --resume it") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise AdapterError(f"adapter {folder}: {WEIGHTS} is damaged; write it again: --resume its run")
    if found != config_sha256:
        raise AdapterError(f"adapter {folder}: {PEFT_CONFIG} is damaged or was changed; write it again: --resume its run")
    if base != base_model:
        raise AdapterError(f"adapter {folder} belongs to {base!r}, not to model.path={base_model!r}")
    return safetensors.numpy.load(data)


class BaseWeights:
    """The weights in a model's folder, mapped into memory and never written: what every merge starts from.

    Raises:
        ValueError: the folder has no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    self._tensors[name] = file.get_tensor(name)
                    self.shapes[name] = tuple(self._tensors[name].shape)
        if not self._tensors:
            raise ValueError(f"{folder} has no *.safetensors file: weights in other formats are not loaded")

    def tensor(self, name: str) -> torch.Tensor:
        """In the folder's own precision; a view of the file."""
        return self._tensors[name]

    def linear_in_layers(self) -> list[str]:
        """What the linear modules of the layers are called, without the names of the modules that they are in."""
        inside = [name.split(".") for name, shape in self.shapes.items() if len(shape) == 2]
        return sorted({parts[-2] for parts in inside if any(part.isdecimal() for part in parts)})

    def by_weight(self, updates: Mapping[str, LoraUpdate]) -> dict[str, LoraUpdate]:
        """The updates by the name of the weight that each is added to.

        Raises:
            AdapterError: a module is not in this model, or has another shape.
        """
        result = {}
        for module, update in updates.items():
            # A checkpoint of the decoder alone leaves out the name under which the language model holds it.
            name = next((n for n in (f"{module}.weight", f"{module.partition('.')[2]}.weight") if n in self.shapes), None)
            if name is None:
                raise AdapterError(
                    f"the adapter changes {module!r}, which has no weight of its own in the base model; set model.path to the "
                    f"adapter's model, or lora.targets to some of {', '.join(self.linear_in_layers())}"
                )
            if self.shapes[name] != update.shape:
                raise AdapterError(
                    f"the adapter's update of {module!r} is {update.shape}, the weight {self.shapes[name]}; "
                    "set model.path to the model that it was trained on"
                )
            result[name] = update
        return result
