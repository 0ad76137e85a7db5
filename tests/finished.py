"""What a finished run leaves, without the run: a tiny model and an adapter away from its start, in PEFT's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.prepare import prepare
from learner.learner import Learner
from system import config_file
from system.config import Config
from tests import tiny

PROMPTS = ["abc", "the cat", "b d f"]


def settings(folder: Path, task: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {"path": str(folder / "model")},
        "lora": {"rank": 4, "alpha": 8},
        "task": {"kind": "continuation", "prompts": str(folder / "prompts.txt"), "max_tokens": 6} | (task or {}),
        "sampler": {"kv_cache_mb": 16, "exploration": {"on_policy": 1}},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }


def run(folder: Path, *, task: dict[str, Any] | None = None, kind: str = "llama", **sections: Any) -> tuple[Path, Config]:
    """`folder/runs/one`, and its config. The prompts are PROMPTS unless `task` says otherwise."""
    if not (folder / "model").exists():
        tiny.folder(folder, kind).rename(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    config = config_file.parse(settings(folder, task) | sections)
    run_dir = folder / "runs" / "one"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config_file.dump(config))
    problem = prepare(config).problem
    learner = Learner.build(config, problem)
    tiny.perturb(learner.policy.parameters.values(), seed=1, scale=0.1)
    learner.adapter(1).materialise(run_dir / "adapter")
    return run_dir, config
