from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploy import runs
from learner.learner import Learner
from system.checkpoint import CheckpointError
from system.config import ConfigError, Lora
from system.config_file import parse
from system.constraints import Constraints
from tests import tiny

CONSTRAINTS = Constraints.of(stop_token=2, min_tokens=0, max_tokens=6, vocab_size=64)


def learner(folder: Path, rank: int = 4) -> Learner:
    config = parse({"task": {"kind": "random_number"}, "lora": {"rank": rank}})
    return Learner(config, folder, CONSTRAINTS, "base", list(range(10, 40)))


@pytest.mark.parametrize("where", ["run/adapter", "run"])
def test_training_starts_from_the_adapter_of_a_run_or_a_peft_folder(tmp_path: Path, where: str) -> None:
    folder = tiny.folder(tmp_path)
    first = learner(folder)
    tiny.perturb(first.policy.parameters.values())
    (tmp_path / "run").mkdir()
    first.adapter(1).materialise(tmp_path / "run/adapter")
    second = learner(folder)
    second.restore(runs.starting_weights(Lora(start=str(tmp_path / where))), 0)
    assert second.step == 0
    for name, tensor in first.policy.adapter_tensors().items():
        np.testing.assert_array_equal(second.policy.adapter_tensors()[name], tensor)
    with pytest.raises(CheckpointError, match="does not fit the policy"):
        learner(folder, rank=8).restore(runs.starting_weights(Lora(start=str(tmp_path / where))), 0)


def test_a_start_that_is_not_there_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.start='nowhere'"):
        runs.starting_weights(Lora(start="nowhere"))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ConfigError, match="damaged"):
        runs.starting_weights(Lora(start=str(tmp_path)))
