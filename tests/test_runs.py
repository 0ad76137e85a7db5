from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy import runs
from deploy.job import start_from
from learner.learner import Learner
from system import checkpoint, config_file
from system.adapters import MANIFEST
from system.checkpoint import CheckpointError
from system.config import Config, ConfigError
from system.config_file import parse
from system.constraints import Constraints
from tests import tiny

CONSTRAINTS = Constraints.of(stop_token=2, min_tokens=0, max_tokens=6, vocab_size=64)


def config(rank: int = 4, model: str = "base", **lora: Any) -> Config:
    section = {"rank": rank, "alpha": 2 * rank} | lora
    return parse({"task": {"kind": "random_number"}, "lora": section, "model": {"path": model}})


def learner(folder: Path, rank: int = 4, **lora: Any) -> Learner:
    return Learner(config(rank, **lora), folder, CONSTRAINTS, "base", list(range(10, 40)))


def test_a_run_without_an_adapter_is_named_with_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the run did not end; --resume it first$"):
        runs.adapter_file(tmp_path)
    for step in (40, 120):
        checkpoint.write(tmp_path / "checkpoints", step, {"state.json": b"{}"})
    with pytest.raises(ConfigError, match=r"or use its checkpoint by --step 120$"):
        runs.adapter_file(tmp_path)
    (tmp_path / "checkpoints/step-00000120/state.json").unlink()
    with pytest.raises(ConfigError, match=r"or use its checkpoint by --step 40$"):
        runs.adapter_file(tmp_path)


def test_a_folder_in_the_copy_that_ray_makes_of_a_working_directory_passes_away(tmp_path: Path) -> None:
    copy = tmp_path / "session_latest/runtime_resources/working_dir_files/_ray_pkg_0a1b"
    assert runs.passes_away(copy / "runs/one")
    assert not runs.passes_away(tmp_path / "runs/one")


@pytest.mark.parametrize("where", ["run/adapter", "run"])
def test_training_starts_from_the_adapter_of_a_run_or_a_peft_folder(tmp_path: Path, where: str) -> None:
    folder = tiny.folder(tmp_path)
    first = learner(folder)
    tiny.perturb(first.policy.parameters.values())
    (tmp_path / "run").mkdir()
    first.adapter(1).materialise(tmp_path / "run/adapter")
    second = learner(folder)
    start = str(tmp_path / where)
    second.restore(runs.starting_weights(config(start=start)), 0)
    assert second.step == 0
    for name, tensor in first.policy.adapter_tensors().items():
        np.testing.assert_array_equal(second.policy.adapter_tensors()[name], tensor)
    with pytest.raises(CheckpointError, match="does not fit the policy"):
        learner(folder, rank=8).restore(runs.starting_weights(config(rank=8, start=start)), 0)
    # What another program wrote has no manifest.
    (tmp_path / "run/adapter" / MANIFEST).unlink()
    assert len(runs.starting_weights(config(start=start)))


def test_a_start_of_another_base_or_scale_and_no_plain_lora_are_refused(tmp_path: Path) -> None:
    first = learner(tiny.folder(tmp_path))
    first.adapter(1).materialise(tmp_path / "run")
    start = str(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"lora.start=.*belongs to 'base', not to model.path='other'"):
        runs.starting_weights(config(start=start, model="other"))
    with pytest.raises(ConfigError, match=r"lora_alpha / r = 2, .*= 16 / 4; set lora.alpha=8"):
        runs.starting_weights(config(start=start, alpha=16))
    # As another program writes a folder.
    (tmp_path / "run" / MANIFEST).unlink()
    described = tmp_path / "run" / "adapter_config.json"
    plain = json.loads(described.read_text())
    others = {"use_rslora": True, "use_dora": True, "alpha_pattern": {"q_proj": 16}, "rank_pattern": {"q_proj": 2}}
    for field, value in others.items():
        described.write_text(json.dumps(plain | {field: value}))
        with pytest.raises(ConfigError, match=f"{field}=.* is no plain LoRA"):
            runs.starting_weights(config(start=start))
    described.unlink()
    with pytest.raises(ConfigError, match=r"adapter_config.json"):
        runs.starting_weights(config(start=start))


def test_an_adapter_is_loaded_with_its_own_scale_alone(tmp_path: Path) -> None:
    first = learner(tiny.folder(tmp_path))
    first.adapter(1).materialise(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text(config_file.dump(config()))
    path = runs.adapter_file(tmp_path / "run")
    runs.load_adapter(first.policy, path, "base", config().lora)
    with pytest.raises(ConfigError, match=r"adapter_model.safetensors .*lora_alpha / r = 2, .*= 16 / 4; set lora.alpha=8"):
        runs.load_adapter(first.policy, path, "base", config(alpha=16).lora)
    with pytest.raises(ConfigError, match=r"lora.rank=8 .*does not fit the policy"):
        runs.load_adapter(learner(tmp_path / "llama", 8).policy, path, "base", config(8).lora)
    half, start = learner(tmp_path / "llama", layers=0.5), str(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"lora.layers=0.5 .*does not fit the policy"):
        runs.load_adapter(half.policy, path, "base", config(layers=0.5).lora)
    asked = config(layers=0.5, start=start)
    with pytest.raises(ConfigError, match=r"lora.start='.*run' .* lora.layers=0.5 .*; set them to those of the run"):
        start_from(runs.starting_weights(asked), half, asked.lora)  # type: ignore[arg-type]  # it answers without futures


def test_a_start_that_is_not_there_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.start='nowhere'"):
        runs.starting_weights(config(start="nowhere"))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ConfigError, match="damaged"):
        runs.starting_weights(config(start=str(tmp_path)))
    learner(tiny.folder(tmp_path)).adapter(1).materialise(tmp_path / "run")
    weights = tmp_path / "run" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ConfigError, match="is damaged"):
        runs.starting_weights(config(start=str(tmp_path / "run")))
