"""A run as plain weights: loaded by transformers alone, it has the log-probs of PEFT's model, and the base is as it was."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from deploy import export
from deploy.prepare import prepare
from learner.learner import Learner
from learner.replay import Replay
from system import checkpoint
from system.config import ConfigError
from system.loop_state import Counters, LoopState
from tests import finished, lora, tiny

TOKENS = [1, 14, 15, 16, 20, 30, 17, 18]


@pytest.mark.parametrize(("kind", "layers"), [("llama", 1.0), ("gpt2", 1.0), ("gemma3", 1.0), ("llama", 0.5)])
def test_the_merged_weights_are_pefts_model(kind: str, layers: float, tmp_path: Path) -> None:
    """GPT-2 keeps its weights transposed and its embeddings tied; Gemma's output is capped."""
    run_dir, config = finished.run(tmp_path, kind=kind, lora={"rank": 4, "alpha": 8, "layers": layers})
    base = Path(config.model.path)
    before = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    out = tmp_path / "new" / "merged"
    assert export.main([str(run_dir), "--merge", str(out)]) == 0

    tuned: Any = PeftModel.from_pretrained(lora.load(base), str(run_dir / "adapter"))
    wanted = lora.token_log_probs(tuned, TOKENS)
    with tuned.disable_adapter():
        assert np.abs(lora.token_log_probs(tuned, TOKENS) - wanted).max() > 0.01
    np.testing.assert_allclose(lora.token_log_probs(lora.load(out), TOKENS), wanted, atol=1e-4)
    assert hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest() == before

    assert {str(array.dtype) for array in load_file(out / "model.safetensors").values()} == {"float32"}
    assert AutoTokenizer.from_pretrained(out).encode("abc") == AutoTokenizer.from_pretrained(base).encode("abc")
    assert [path.name for path in out.parent.iterdir()] == ["merged"]


def test_a_base_that_has_moved_is_named_on_the_command_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir, config = finished.run(tmp_path)
    there = Path(config.model.path).rename(tmp_path / "elsewhere")
    assert export.main([str(run_dir), f"model.path={there}", "--merge", str(tmp_path / "merged")]) == 0
    tuned: Any = PeftModel.from_pretrained(lora.load(there), str(run_dir / "adapter"))
    found = lora.token_log_probs(lora.load(tmp_path / "merged"), TOKENS)
    np.testing.assert_allclose(found, lora.token_log_probs(tuned, TOKENS), atol=1e-4)
    assert f"model.path='{there}' is taken for '{config.model.path}', of which this adapter is" in caplog.text


def test_a_checkpoints_adapter_is_used_by_its_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, config = finished.run(tmp_path)
    problem = prepare(config).problem
    learner = Learner.build(config, problem)
    for step, scale in ((3, 0.3), (6, 0.6)):
        tiny.perturb(learner.policy.parameters.values(), seed=step, scale=scale)
        learner.step = step
        replay, task = Replay(config.replay).save(), config.task.model_dump(mode="json")
        state = LoopState(Counters(step=step), [], replay, task, learner.save())
        checkpoint.write(run_dir / "checkpoints", step, state.files())
        learner.adapter(1).materialise(tmp_path / f"expected-{step}")
    there = Path(config.model.path).rename(tmp_path / "elsewhere")
    for step in (3, 6, 6):
        out = tmp_path / f"merged-{step}-{len(list(tmp_path.iterdir()))}"
        assert export.main([str(run_dir), f"model.path={there}", "--step", str(step), "--merge", str(out)]) == 0
        tuned: Any = PeftModel.from_pretrained(lora.load(there), str(tmp_path / f"expected-{step}"))
        found = lora.token_log_probs(lora.load(out), TOKENS)
        np.testing.assert_allclose(found, lora.token_log_probs(tuned, TOKENS), atol=1e-4)
    assert sorted(path.name[:14] for path in run_dir.glob("adapter-step-*")) == ["adapter-step-3", "adapter-step-6"]
    # A run that goes on from an earlier step comes to another checkpoint of the same number.
    tiny.perturb(learner.policy.parameters.values(), seed=9, scale=0.6)
    state = replace(state, learner=learner.save())
    checkpoint.write(run_dir / "checkpoints", 6, state.files())
    out = tmp_path / "merged-anew"
    assert export.main([str(run_dir), f"model.path={there}", "--step", "6", "--merge", str(out)]) == 0
    assert not np.allclose(lora.token_log_probs(lora.load(out), TOKENS), found, atol=1e-2)
    assert export.main([str(run_dir), f"model.path={there}", "--step", "4", "--merge", str(tmp_path / "none")]) == 2
    assert f"--step 4: {run_dir} has no whole checkpoint of it; there are 3, 6" in capsys.readouterr().err


def test_nothing_is_written_over_or_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, config = finished.run(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    assert export.main([str(run_dir), "--merge", str(tmp_path / "full")]) == 2
    assert "is there already; name a new folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "other").mkdir()
    other, _ = finished.run(tmp_path / "other", kind="gpt2")
    with pytest.raises(ConfigError, match="does not fit"):
        export.merge(config, other / "adapter" / "adapter_model.safetensors", tmp_path / "out")
    manifest = other / "adapter" / "headwater.json"
    manifest.write_text(manifest.read_text().replace("/other/model", "/model"))
    with pytest.raises(ConfigError, match=r"belongs to '.*/model', not to model\.path='.*/other/model'"):
        export.merge(config, other / "adapter" / "adapter_model.safetensors", tmp_path / "out")
    weights = run_dir / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert export.main([str(run_dir), "--merge", str(tmp_path / "out")]) == 2
    assert f"adapter {run_dir}/adapter: adapter_model.safetensors is damaged" in (said := capsys.readouterr().err)
    assert "--step" not in said
    for step in (3, 4):
        checkpoint.write(run_dir / "checkpoints", step, {"state.json": b"{}"})
    (run_dir / "checkpoints/step-00000004/state.json").write_text("{")
    assert export.main([str(run_dir), "--merge", str(tmp_path / "out")]) == 2
    assert "--resume its run, or use its checkpoint by --step 3" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    (run_dir / "adapter" / "adapter_model.safetensors").unlink()
    assert export.main([str(run_dir), "--merge", str(tmp_path / "out")]) == 2
    assert "--resume it first" in capsys.readouterr().err
