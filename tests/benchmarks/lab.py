"""Where the experiments of the paper are run: commands of `deploy/` for one seed, each once, and what they find."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from deploy.compare import held_out
from tests.benchmarks.runs import ROOT

Metrics = dict[str, float]
Rows = dict[str, Metrics]
"""Method -> its metrics, means over held-out prompts."""

FEW = ("learner.evaluation_prompts=8", "learner.evaluation_samples=8")
"""What the job's own evaluations before and after need: the held-out ones say more."""


@dataclass(frozen=True)
class Lab:
    """Runs commands of `deploy/` for one seed and keeps what they find."""

    data: Path
    output: Path
    seed: int
    overrides: tuple[str, ...]
    shared: tuple[str, ...] = ()
    validation: bool = False
    """`data` has no test data: what an experiment makes itself is to be held out of the training half, too."""
    imitation: tuple[str, ...] = ()
    policy_gradient: tuple[str, ...] = ()

    def train(self, name: str, config: str, *overrides: str) -> Path:
        """The folder of a finished run."""
        folder = self.output / f"{name}-{self.seed}"
        if not (done := list(folder.glob("*/adapter"))):
            settings = [*FEW, *overrides, *self.shared, f"seed={self.seed}", f"name={name}", f"output_dir={folder}"]
            self._run("job", str(ROOT / f"deploy/configs/{config}.yaml"), *settings)
            done = list(folder.glob("*/adapter"))
        return done[-1].parent

    def evaluate(
        self, name: str, run: Path, *overrides: str, samples: int, only: str | None = "adapter"
    ) -> tuple[Metrics, Metrics]:
        """(of the base model, of the run's adapter), one of them empty unless `only` is None."""
        result = self.output / f"{name}-{self.seed}.json"
        if not result.exists():
            drawn, which = ("--samples", str(samples)), ("--only", only) if only else ()
            if only != "base":  # whose samples are not kept
                drawn += ("--samples-file", str(self.samples(name)))
            result.write_text(self._run("evaluate", str(run), *overrides, *drawn, *which).splitlines()[-1], encoding="utf-8")
        return held_out(json.loads(result.read_text(encoding="utf-8")))

    def samples(self, name: str) -> Path:
        """The samples of the evaluation of that name."""
        return self.output / f"{name}-{self.seed}.jsonl"

    def baselines(self, run: Path, *overrides: str, methods: str, samples: int) -> Rows:
        """Methods without training, and the run's adapter, under the run's own config."""
        folder = self.output / f"baselines-{self.seed}"
        # The adapter comes last: a folder without it is what an interruption left.
        if not list(folder.glob("*/gflownet")):
            settings = [*overrides, f"output_dir={folder}", "--methods", methods, "--samples", str(samples), "--run", str(run)]
            self._run("baselines", str(run / "config.yaml"), *settings)
        [adapter] = folder.glob("*/gflownet")
        return json.loads((adapter.parent / "baselines.json").read_text(encoding="utf-8"))["methods"]

    def export(self, run: Path) -> Path:
        """A run's base and adapter as one model."""
        folder = run.parent / f"{run.name}-merged"
        if not folder.exists():
            self._run("export", str(run), "--merge", str(folder))
        return folder

    def self_consistent(self, name: str, stories: Path, limit: int) -> Path:
        """Two stories that the model told itself for each of the first beginnings in a file; the same for every seed."""
        result = self.output / f"{name}.jsonl"
        if not result.exists():
            config = str(ROOT / "deploy/configs/infilling.yaml")
            settings = (f"task.stories={stories}", f"task.limit={limit}", *self.shared)
            self._run("self_consistent", config, str(result), *settings, "--per-story", "2")
        return result

    def _run(self, script: str, *arguments: str) -> str:
        """Its standard output. Raises CalledProcessError if it fails."""
        command = [sys.executable, str(ROOT / f"deploy/{script}.py"), *arguments]
        print("$", shlex.join(["python", *command[1:]]), file=sys.stderr, flush=True)
        return subprocess.run(command, cwd=self.output, check=True, stdout=subprocess.PIPE, text=True).stdout
