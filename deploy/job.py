"""The entry of a run: `python deploy/job.py CONFIG [key=value …]`, alone or through `ray job submit`.

Reads the config (before anything heavy is imported), builds the task, the samplers and the learner, and hands them to
`system.orchestrator`. `--dry-run` prints the resolved config, `--resume RUN` goes on from a run's last checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # `python deploy/job.py` puts deploy/ on the path, not the root
    sys.path.insert(0, str(ROOT))

from deploy.command import command, plain  # noqa: E402
from deploy.runs import find_run, make_folder, starting_weights  # noqa: E402
from deploy.stop import Stop  # noqa: E402
from system import config_file  # noqa: E402
from system.checkpoint import CheckpointError  # noqa: E402
from system.config import Config, ConfigError  # noqa: E402
from system.run_error import RunError  # noqa: E402
from system.whole_file import replace_text  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

    from learner.replay import Replay
    from system.evaluation import Evaluation
    from system.loop_state import LoopState
    from system.orchestrator import Orchestrator, Pool
    from system.requests import Requests
    from system.trajectory import Group

logger = logging.getLogger("headwater")

STOPPED = 130
"""Exit status of a run that was asked to stop."""
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES)
"""What the kernel says of a write to a disk that is full or read-only, and of a file that is too large or not ours."""


def parse_arguments(argv: list[str]) -> tuple[Config, Path, argparse.Namespace]:
    """(config, run folder, all arguments). Raises ConfigError."""
    parser = argparse.ArgumentParser(prog="python deploy/job.py", description=__doc__)
    parser.add_argument("config", nargs="?", help="a YAML file, such as deploy/configs/random_number.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as actors.count=2")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--resume", metavar="RUN", help="folder of a run, or its name under runs/")
    parser.add_argument("--from-step", metavar="N", type=int, help="with --resume: not from the newest checkpoint")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.from_step is not None and not arguments.resume:
        parser.error(f"--from-step {arguments.from_step} needs --resume RUN")
    if arguments.resume:
        overrides = [text for text in [arguments.config, *arguments.overrides] if text]
        run_dir = find_run(arguments.resume)
        return config_file.load(run_dir / "config.yaml", overrides), run_dir, arguments
    if not arguments.config:
        parser.error("a config file is needed, such as deploy/configs/random_number.yaml")
    config = config_file.load(arguments.config, arguments.overrides)
    run_dir = Path(config.output_dir) / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return config, run_dir.resolve(), arguments


class Job:
    """One run from start to summary. `run` returns the summary."""

    def __init__(self, config: Config, run_dir: Path, resume: bool, from_step: int | None = None) -> None:
        from system.tracking import resolve_uri

        # What the folder keeps of the server means the same from any working directory; and a password in it is refused.
        tracking = config.tracking.model_copy(update={"uri": resolve_uri(config.tracking.uri)})
        self.config = config.model_copy(update={"tracking": tracking})
        self.run_dir, self.resume, self.from_step = run_dir, resume, from_step
        self.stop = Stop()
        self.evaluations: list[tuple[int, Evaluation]] = []

    def run(self) -> dict[str, Any]:
        from deploy import ray_cluster
        from deploy.observer import Observer
        from deploy.pool import RaySamplers
        from deploy.prepare import prepare
        from deploy.progress import Standing, show
        from deploy.ray_metrics import RayMetrics
        from deploy.remote import RayLearner, wait_until_ready
        from system import evaluation
        from system.orchestrator import Orchestrator
        from system.requests import Requests
        from system.tracking import Tracker

        config, started = self.config, time.perf_counter()
        saved = self._saved() if self.resume else None
        prepared = prepare(config)
        self.tokenizer, self.problem = prepared.tokenizer, prepared.problem
        start = starting_weights(config) if config.lora.start and saved is None else None
        make_folder(config, self.run_dir)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        # Each of its steps is taken, also where one more signal cuts the one before short.
        ending = contextlib.ExitStack()
        try:
            ending.callback(ray_cluster.disconnect)
            self.tracker = Tracker(self.run_dir, config, resume=self.resume)
            ending.callback(lambda: self.tracker.close(status))
            if not self.resume:
                self._keep_config()
            self.progress, self.standing = show(), Standing(self.run_dir.name, config.learner.steps)
            ending.callback(self.progress.close)
            ray_cluster.connect(config)
            self.ray_metrics = RayMetrics(self.run_dir.name)
            sampler, longest = config.sampler, self.problem.constraints.max_tokens
            self.requests = Requests(
                self.problem.prompts, sampler.samples_per_prompt, sampler.exploration, config.seed, longest
            )
            self.learner = RayLearner(config, self.problem)
            self.samplers = RaySamplers(config, self.problem, lambda: self.learner.node)
            ending.callback(self.samplers.close)
            self.learner.room = self.samplers.room
            self.observer = Observer(
                (self.learner, self.samplers), self.tracker, config.tracking.system_metrics_seconds, self.run_dir
            )
            self._describe_run()
            wait_until_ready(self.learner, self.samplers)
            same_task = saved is not None and saved.is_of(config.task)
            requests, samplers, replay = self._sources(lambda: loop.counters.version, buffered=same_task)
            loop = Orchestrator(
                config, requests, samplers, self.learner, replay, self.tracker,
                self.run_dir / "checkpoints", on_step=self._on_step, evaluate=self._evaluate, should_stop=self.stop,
            )  # fmt: skip
            if saved is not None:
                loop.restore(saved)
                self.learner.restore(saved.learner, loop.counters.step)
                self.evaluations = evaluation.read(self.run_dir / "evaluations", config.task, loop.counters.step)
                # Not before: with settings that are refused here, the run could not be resumed again.
                self._keep_config()
            elif start is not None:
                self._start_from(start)
                # A learner that dies begins again from here, not from the base.
                loop.checkpoint()
            logger.info("ready after %.0f s; run folder %s", time.perf_counter() - started, self.run_dir)
            self.ray_metrics.resume(loop.counters.trajectories, loop.counters.deaths)
            with self.stop.patient():
                loop.train()
                self.progress.close()
                summary = self._finish(loop, time.perf_counter() - started)
            status = "FINISHED" if summary["finished"] else "KILLED"
            return summary
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            ending.close()

    def _saved(self) -> LoopState:
        """The checkpoint to go on from. Raises ConfigError where the config leaves nothing to do from there."""
        from system import checkpoint
        from system.loop_state import LoopState

        saved = LoopState.of(checkpoint.read_latest(self.run_dir / "checkpoints", self.from_step))
        steps, done = self.config.learner.steps, saved.counters.step
        if done >= steps and not saved.is_of(self.config.task):
            raise ConfigError(
                f"learner.steps={steps}: the run has {done} updates, on another task, and so none left for this one; "
                "raise learner.steps"
            )
        return saved

    def _keep_config(self) -> None:
        path = self.run_dir / "config.yaml"
        # Without it the run could not be resumed.
        replace_text(path, config_file.dump(self.config))
        self.tracker.artifact(path)

    def _start_from(self, weights: np.ndarray) -> None:
        try:
            self.learner.restore(weights, 0)
        except CheckpointError as error:
            raise ConfigError(
                f"lora.start={self.config.lora.start!r} is not of this model with lora.rank={self.config.lora.rank} and "
                f"lora.targets={self.config.lora.targets}: {plain(error)}"
            ) from error

    def _sources(self, version: Callable[[], int], *, buffered: bool) -> tuple[Requests, Pool, Replay]:
        """Where training groups come from: samplers and replay, and the task's demonstrations where the config wants them.

        With `buffered` a checkpoint is to fill the replay buffer, so nothing is scored for it.
        """
        from learner.replay import Replay
        from system.demonstrations import Demonstrations, scored

        config, replay = self.config, Replay(self.config.replay)
        imitates = config.loss.kind == "mle"
        wanted = imitates or (config.replay.demonstrations and not buffered)
        groups = scored(self.problem, self.samplers) if wanted else []
        if not imitates:
            for group in groups:
                replay.add(group)
            return self.requests, self.samplers, replay
        prompts = [group.prompt for group in groups]
        return self.requests.of(prompts), Demonstrations(groups, self.samplers, version), replay

    # ------------------------------------------------------------------------------------------ while it runs

    def _describe_run(self) -> None:
        from deploy import environment
        from system.text import decode

        rows = [{"id": prompt.id, "text": decode(self.tokenizer, prompt.policy_tokens)} for prompt in self.problem.prompts]
        self.tracker.dataset(self.config.task.kind, rows)
        made_with = environment.describe()
        (self.run_dir / "environment.json").write_text(json.dumps(made_with, indent=2), encoding="utf-8")
        self.tracker.tags({f"environment.{name}": value for name, value in made_with.items()})
        self.tracker.artifact(self.run_dir / "environment.json")

    def _on_step(self, loop: Orchestrator, metrics: dict[str, float], fresh: list[Group]) -> None:
        step = loop.counters.step
        if step % self.config.tracking.sample_table_every == 0:
            self.tracker.table("samples", self._sample_rows(fresh), step)
        counters = loop.counters
        self.observer.look(step)
        self.standing.step, self.standing.metrics, self.standing.sampler_idle = step, metrics, self.observer.sampler_idle
        self.standing.seconds_left = (self.config.learner.steps - step) * counters.seconds / max(1, step)
        self.progress.update(self.standing)
        self.ray_metrics.update(step, metrics, trajectories=counters.trajectories, deaths=counters.deaths)
        for name, idle in self.observer.sampler_idle.items():
            self.ray_metrics.sampler_idle(name, idle)
        self.samplers.fit(metrics["idle/learner"])

    def _sample_rows(self, groups: list[Group]) -> list[dict[str, Any]]:
        from system.text import decode

        return [
            {
                "prompt": group.prompt.id,
                "text": decode(self.tokenizer, trajectory.tokens_T.tolist()),
                "log_reward": float(log_reward_T[-1]),
                "length": len(trajectory),
                "temperature": trajectory.behaviour.temperature,
                "epsilon": trajectory.behaviour.epsilon,
                "planted": bool(trajectory.behaviour.planted),
                "version": group.adapter_version,
            }
            for group in groups
            for trajectory, log_reward_T in zip(group.trajectories_K, group.log_reward_K, strict=True)
        ]

    def _evaluate(self, loop: Orchestrator) -> None:
        from system import evaluation
        from system.text import decode

        step = loop.counters.step
        # It takes long, and nothing is lost with it.
        with self.stop.patient(False):
            result = self._evaluation(step)
        result.metrics["seconds_training"] = loop.counters.seconds
        for row in result.samples:
            row["text"] = decode(self.tokenizer, row.pop("tokens"))
        self.evaluations = [(at, earlier) for at, earlier in self.evaluations if at != step] + [(step, result)]
        self.tracker.metrics(result.metrics, step)
        self.tracker.table("posterior_by_prompt", result.per_prompt, step)
        if result.samples:
            self.tracker.table("posterior_samples", result.samples, step)
        evaluation.write(self.run_dir / "evaluations", step, self.config.task, result)
        self.progress.say(f"evaluation at step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in result.metrics.items()))

    def _evaluation(self, step: int) -> Evaluation:
        from system import evaluation
        from system.text import decode

        if (listed := evaluation.without_samples(self.problem, self.learner)) is not None:
            return listed
        prompts = evaluation.spread(self.problem.prompts, self.config.learner.evaluation_prompts)
        return evaluation.sampled(
            self.requests.of(prompts), self.samplers, self.learner,
            samples=self.config.learner.evaluation_samples,
            temperature=self.config.learner.reward_temperature.end, round_=step,
            judge=evaluation.judge(self.problem, lambda tokens: decode(self.tokenizer, tokens), self.samplers),
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------- at the end

    def _finish(self, loop: Orchestrator, seconds: float) -> dict[str, Any]:
        import ray

        from deploy import html_report, report

        folder = self.run_dir / "adapter"
        # Asked to stop after its last update, a run has ended all the same.
        finished = loop.counters.step >= self.config.learner.steps
        if finished:
            adapter: Any = ray.get(loop.with_learner(lambda: self.learner.adapter(loop.counters.version)))
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
        from deploy import report

        self.observer.keep("driver", loop.timeline.drain())
        path = self.run_dir / "timeline.json"
        idle = report.timeline(path, self.observer.all_spans(), self.samplers.named())
        self.tracker.artifact(path)
        self.tracker.metrics({"idle/samplers": idle}, loop.counters.step)
        return idle


@contextlib.contextmanager
def _disk_faults_named(run_dir: Path) -> Iterator[None]:
    """The border for what a run writes. The kernel says of a write that fails neither the file nor what to do about it."""
    try:
        yield
    except OSError as error:
        cause: Any = plain(error)
        if cause.errno not in DISK_FAULTS:
            raise
        kept = any((run_dir / "checkpoints").glob("step-*"))
        raise RunError(
            f"{cause.filename or run_dir} cannot be written: {cause.strerror}; make room there or make it writable, then "
            + (f"--resume {run_dir}" if kept else "start the run again")
        ) from error


@command
def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config, run_dir, arguments = parse_arguments(argv)
    for warning in config.warnings():
        logger.warning(warning)
    if arguments.dry_run:
        print(config_file.dump(config), end="")
        return 0
    job = Job(config, run_dir, bool(arguments.resume), arguments.from_step)
    job.stop.hear()
    try:
        with _disk_faults_named(run_dir):
            summary = job.run()
    except KeyboardInterrupt:
        print("stopped at once; what the run's last checkpoint has can be resumed", file=sys.stderr)
        return STOPPED
    print(json.dumps(summary))
    return 0 if summary["finished"] else STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
