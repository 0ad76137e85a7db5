"""Versioned LoRA adapters: what the learner publishes and a sampler installs.

An adapter travels as bytes with a manifest, so no shared filesystem is assumed. The manifest's sha256 proves that the
bytes arrived, its canary (a token sequence with the learner's own log-probs) that the engine runs what they say.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy


class AdapterError(RuntimeError):
    """An adapter is damaged, belongs to another model, or is not what the engine runs."""


@dataclass(frozen=True, slots=True, eq=False)
class Canary:
    """Proof of delivery: the learner's log-prob of each token of a fixed sequence, given those before it."""

    tokens_T: tuple[int, ...]
    logp_T: tuple[float, ...]
    """[T - 1] nats, of tokens 1..T-1 under base + adapter, over the whole vocabulary at temperature 1."""
    base_logp_T: tuple[float, ...]
    """The same under the base alone: how far apart the two are says how much the canary proves."""


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
    def publish(
        cls,
        version: int,
        step: int,
        tensors: dict[str, np.ndarray],
        peft_config: dict[str, Any],
        base_model: str,
        canary: Canary | None = None,
    ) -> Adapter:
        weights = np.frombuffer(safetensors.numpy.save(tensors), np.uint8)
        return cls(version, step, weights, peft_config, hashlib.sha256(weights).hexdigest(), base_model, canary)

    def verify(self, base_model: str) -> None:
        """Raises AdapterError if the bytes are not those that were published, or the base is another model."""
        found = hashlib.sha256(self.weights).hexdigest()
        if found != self.sha256:
            raise AdapterError(f"adapter version {self.version}: sha256 {found[:12]}… instead of {self.sha256[:12]}…: damaged")
        if self.base_model != base_model:
            raise AdapterError(f"adapter version {self.version} belongs to {self.base_model!r}, not to {base_model!r}")

    def tensors(self) -> dict[str, np.ndarray]:
        return safetensors.numpy.load(self.weights.tobytes())

    def materialise(self, folder: Path) -> Path:
        """Writes a standard PEFT folder; it appears whole or not at all. Returns `folder`."""
        part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
        part.mkdir(parents=True)
        (part / "adapter_model.safetensors").write_bytes(self.weights.tobytes())
        (part / "adapter_config.json").write_text(json.dumps(self.peft_config, indent=2, sort_keys=True), encoding="utf-8")
        part.replace(folder)
        return folder
