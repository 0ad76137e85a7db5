"""What a run tells of itself after each update, at each evaluation and at its end: in its folder, in MLflow, on the screen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from transformers import PreTrainedTokenizerBase

from deploy import environment, html_report, report
from deploy.observer import Observer
from deploy.pool import RaySamplers
from deploy.progress import Progress, Standing
from deploy.ray_learner import RayLearner
from deploy.ray_metrics import RayMetrics
from deploy.stop import Stop
from system import evaluation, evaluation_files
from system.config import Config
from system.evaluation import Evaluation
from system.orchestrator import Orchestrator
from system.tasks.problem import Problem
from system.text import decode
from system.tracking import Tracker
from system.trajectory import Group

PROMPT_ROWS = 1000
"""Most rows of the table of prompts."""
SAMPLE_ROWS = 256
"""Most rows of a table of an update's samples."""


@dataclass
class Recorder:
    config: Config
    run_dir: Path
    problem: Problem
    tokenizer: PreTrainedTokenizerBase
    learner: RayLearner
    samplers: RaySamplers
    tracker: Tracker
    progress: Progress
    ray_metrics: RayMetrics
    stop: Stop
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)
    """With the steps that they were at; of those between the first and the last without samples."""

    def __post_init__(self) -> None:
        seconds = self.config.tracking.system_metrics_seconds
        self._observer = Observer((self.learner, self.samplers), self.tracker, seconds, self.run_dir)
        self._standing = Standing(self.run_dir.name, self.config.learner.steps)

    def restore(self, loop: Orchestrator) -> None:
        """What was evaluated and counted up to the step that the run begins or goes on from."""
        self.evaluations = evaluation_files.go_back(self.run_dir / "evaluations", self.config.task, loop.counters.step)
        self.ray_metrics.resume(loop.counters.trajectories, loop.counters.deaths)

    def describe(self) -> None:
        """The prompts, and what the run is made with. The dataset's digest and number are of all prompts; its table has
        PROMPT_ROWS of them at most, those of the evaluations first."""
        prompts, digest = self.problem.prompts, hashlib.sha256()
        for prompt in prompts:
            digest.update(json.dumps([prompt.id, prompt.policy_tokens]).encode())
        evaluated = evaluation.evenly(self.problem.evaluated, self.config.learner.evaluation_prompts)
        shown = {prompt.id: prompt for prompt in (*evaluated, *prompts)}
        rows = [{"id": prompt.id, "text": self._text(prompt.policy_tokens)} for prompt in islice(shown.values(), PROMPT_ROWS)]
        self.tracker.dataset(self.config.task.kind, rows, count=len(prompts), digest=digest.hexdigest()[:16])
        made_with = environment.describe()
        (self.run_dir / "environment.json").write_text(json.dumps(made_with, indent=2), encoding="utf-8")
        self.tracker.tags({f"environment.{name}": value for name, value in made_with.items()})
        self.tracker.artifact(self.run_dir / "environment.json")

    def on_step(self, loop: Orchestrator, metrics: dict[str, float], fresh: list[Group]) -> None:
        step = loop.counters.step
        if step % self.config.tracking.sample_table_every == 0:
            self.tracker.table("samples", self._sample_rows(fresh), step)
        counters = loop.counters
        self._observer.look(step)
        self._standing.step, self._standing.metrics, self._standing.sampler_idle = step, metrics, self._observer.sampler_idle
        self._standing.seconds_left = (self.config.learner.steps - step) * counters.seconds / max(1, step)
        self.progress.update(self._standing)
        self.ray_metrics.update(step, metrics, trajectories=counters.trajectories, deaths=counters.deaths)
        for name, idle in self._observer.sampler_idle.items():
            self.ray_metrics.sampler_idle(name, idle)

    def _text(self, tokens: Sequence[int]) -> str:
        return decode(self.tokenizer, tokens)

    def _sample_rows(self, groups: list[Group]) -> list[dict[str, Any]]:
        """At most SAMPLE_ROWS: the first samples of each group, as many of one as of another, or one of each of the first."""
        of_each = max(1, SAMPLE_ROWS // max(1, len(groups)))
        return [
            {
                "prompt": group.prompt.id,
                "text": self._text(trajectory.tokens_T.tolist()),
                "log_reward": float(log_reward),
                "length": len(trajectory),
                "temperature": trajectory.behaviour.temperature,
                "epsilon": trajectory.behaviour.epsilon,
                "planted": bool(trajectory.behaviour.planted),
                "version": group.adapter_version,
            }
            | group.factors_of(k)
            for group in groups[:SAMPLE_ROWS]
            for k, (trajectory, log_reward) in enumerate(
                islice(zip(group.trajectories_K, group.end_log_reward_K, strict=True), of_each)
            )
        ]

    def evaluate(self, loop: Orchestrator) -> None:
        """Of the learner's weights, which the samplers have where it draws."""
        step = loop.counters.step
        # It takes long, and nothing is lost with it.
        with self.stop.patient(False):
            found = self._evaluation(step)
        result = replace(found, metrics=found.metrics | {"seconds_training": loop.counters.seconds})
        earlier = [(at, evaluated) for at, evaluated in self.evaluations if at != step]
        self.evaluations = evaluation_files.appended(earlier, step, result)
        self.tracker.metrics(result.metrics, step)
        self.tracker.table("posterior_by_prompt", result.per_prompt, step)
        if result.samples:
            self.tracker.table("posterior_samples", result.samples, step)
        evaluation_files.write(self.run_dir / "evaluations", step, self.config.task, result)
        self.progress.say(f"evaluation at step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in result.metrics.items()))

    def _evaluation(self, step: int) -> Evaluation:
        most = self.config.learner.evaluation_prompts
        if (listed := evaluation.without_samples(self.problem, self.learner, most)) is not None:
            return listed
        return evaluation.sampled(
            evaluation.evenly(self.problem.evaluated, most), self.samplers, self.learner,
            samples=self.config.learner.evaluation_samples,
            temperature=self.config.learner.reward_temperature.end, seed=self.config.seed, round_=step, decode=self._text,
            judge=evaluation.judge(self.problem, self._text, self.samplers),
        )  # fmt: skip

    def finish(self, loop: Orchestrator, seconds: float) -> dict[str, Any]:
        """Writes the adapter of a run that did all its updates, and what there is of any. Returns the summary."""
        folder = self.run_dir / "adapter"
        # Asked to stop after its last update, a run has ended all the same.
        finished = loop.counters.step >= self.config.learner.steps
        if finished:
            adapter: Any = ray.get(loop.lasting.ask(lambda: self.learner.adapter(loop.counters.version)))
            report.replace_folder(folder, adapter)
            self.tracker.artifact(folder)
            if name := self.config.tracking.model:
                self.tracker.model_version(name, folder.name)
        idle = self._finish_timeline(loop)
        summary = report.summary(self.config, loop.counters, self.evaluations, seconds, finished=finished, sampler_idle=idle)
        (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        self.tracker.artifact(self.run_dir / "summary.json")
        if len(self.evaluations) > 1:
            shown = report.shown(self.evaluations)
            print(report.table({f"step {step}": result.metrics for step, result in shown}), flush=True)
            for plot in report.plots(self.run_dir / "plots", self.problem, self.tokenizer, self.evaluations):
                self.tracker.artifact(plot, "plots")
        self.tracker.artifact(html_report.write(self.run_dir))
        return summary

    def _finish_timeline(self, loop: Orchestrator) -> float:
        """Writes timeline.json. Returns the idle fraction of the samplers."""
        self._observer.keep("driver", loop.timeline.drain())
        path = self.run_dir / "timeline.json"
        idle = report.timeline(path, self._observer.all_spans(), self.samplers.named())
        self.tracker.artifact(path)
        self.tracker.metrics({"idle/samplers": idle}, loop.counters.step)
        return idle
