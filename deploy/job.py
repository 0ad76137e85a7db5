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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # `python deploy/job.py` puts deploy/ on the path, not the root
    sys.path.insert(0, str(ROOT))

from deploy.allocator import one_arena  # noqa: E402
from deploy.command import command, log_to_stderr, plain  # noqa: E402
from deploy.runs import find_run, make_folder, passes_away, starting_weights  # noqa: E402
from deploy.stop import Stop  # noqa: E402
from system import checkpoint, config_file  # noqa: E402
from system.checkpoint import CheckpointError  # noqa: E402
from system.config import Config, ConfigError, Lora  # noqa: E402
from system.functions import check_module  # noqa: E402
from system.reward_config import FunctionReward, factors  # noqa: E402
from system.run_error import RunError  # noqa: E402
from system.whole_file import replace_text  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

    from deploy.pool import RaySamplers
    from deploy.prepare import Prepared
    from deploy.progress import Progress
    from deploy.recorder import Recorder
    from learner.replay import Replay
    from system.handles import LearnerHandle, Pool
    from system.loop_state import LoopState
    from system.orchestrator import Orchestrator
    from system.requests import Requests
    from system.tasks.problem import Problem
    from system.tracking import Tracker
    from system.trajectory import Group, Prompt

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
    parser.add_argument("--check", action="store_true", help="read data and weights and call rewards once too, and stop")
    parser.add_argument(
        "--resume", metavar="RUN", help="folder of a run, or its name under runs/, with its own config; key=value may follow"
    )
    parser.add_argument("--from-step", metavar="N", type=int, help="with --resume: not from the newest checkpoint")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.from_step is not None and not arguments.resume:
        parser.error(f"--from-step {arguments.from_step} needs --resume RUN")
    if arguments.resume:
        overrides = [text for text in [arguments.config, *arguments.overrides] if text]
        if overrides and "=" not in overrides[0]:
            parser.error(f"--resume takes the run's own config: leave {overrides[0]} out")
        run_dir = find_run(arguments.resume)
        return config_file.load(run_dir / "config.yaml", overrides), run_dir, arguments
    if not arguments.config:
        parser.error("a config file is needed, such as deploy/configs/random_number.yaml")
    config = config_file.load(arguments.config, arguments.overrides)
    run_dir = Path(config.output_dir) / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return config, run_dir.resolve(), arguments


class Begun(NamedTuple):
    """What a run begins with."""

    saved: LoopState | None
    """The checkpoint that it goes on from."""
    prepared: Prepared
    """Model and data."""
    start: np.ndarray | None
    """Weights of another run that a new one starts from."""


class Job:
    """One run from start to summary. `run` returns the summary."""

    def __init__(self, config: Config, run_dir: Path, resume: bool, from_step: int | None = None) -> None:
        from system.tracking_uri import resolve_uri

        # What the folder keeps of the server means the same from any working directory; and a password in it is refused.
        tracking = config.tracking.model_copy(update={"uri": resolve_uri(config.tracking.uri)})
        self.config = config.model_copy(update={"tracking": tracking})
        self.run_dir, self.resume, self.from_step = run_dir, resume, from_step
        self.stop = Stop()

    def check(self) -> str:
        """What the task has, as a run would find it. Raises ConfigError for what would be refused of it, and CheckpointError
        for a checkpoint that cannot be gone on from."""
        from actors.trial import trial
        from system.text import decode

        prepared = self._begin().prepared
        problem = prepared.problem
        for warning in trial(self.config.task.reward, problem, lambda tokens: decode(prepared.tokenizer, tokens)):
            logger.warning(warning)
        kept = f", {len(problem.held_out)} of them held out" if problem.held_out else ""
        return (
            f"{len(problem.prompts)} prompts{kept}, contexts of up to {problem.longest_prompt} tokens; nothing is left running"
        )

    def run(self) -> dict[str, Any]:
        """Leaves a checkpoint of what was learned, and all that the run says of itself, whatever ends it."""
        config, run_dir, started = self.config, self.run_dir, time.perf_counter()
        # Before anything is imported that takes long, or a folder is made: what is refused is refused here.
        begun = self._begin()
        from deploy import ray_cluster
        from deploy.progress import show
        from system.tracking import Tracker

        make_folder(config, run_dir)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        # Each of its steps is taken, also where one more signal cuts the one before short.
        ending = contextlib.ExitStack()
        try:
            ending.callback(ray_cluster.disconnect)
            tracker = Tracker(run_dir, config, resume=self.resume)
            ending.callback(lambda: tracker.close(status))
            if not self.resume:
                tracker.artifact(keep_config(config, run_dir))
            progress = show()
            ending.callback(progress.close)
            ray_cluster.connect(config)
            loop, recorder = self._assemble(begun, tracker, progress, ending)
            del begun  # as large as the weights and the optimizer's moments
            logger.info("ready after %.0f s; run folder %s", time.perf_counter() - started, run_dir)
            with self.stop.patient():
                loop.train()
                progress.close()
                summary = recorder.finish(loop, time.perf_counter() - started)
            status = "FINISHED" if summary["finished"] else "KILLED"
            return summary
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            ending.close()

    def _assemble(
        self, begun: Begun, tracker: Tracker, progress: Progress, ending: contextlib.ExitStack
    ) -> tuple[Orchestrator, Recorder]:
        """The loop with its samplers and its learner, which stand where the run goes on from."""
        from deploy.pool import RaySamplers
        from deploy.ray_learner import RayLearner
        from deploy.ray_metrics import RayMetrics
        from deploy.readiness import wait_until_ready
        from deploy.recorder import Recorder
        from system.evaluation import needs_samples
        from system.orchestrator import Orchestrator

        config, run_dir = self.config, self.run_dir
        saved, problem = begun.saved, begun.prepared.problem
        learner = RayLearner(config, problem)
        samplers = RaySamplers(config, problem, lambda: learner.nodes)
        ending.callback(samplers.close)
        learner.room = samplers.room
        recorder = Recorder(
            config, run_dir, problem, begun.prepared.tokenizer, learner, samplers, tracker,
            progress, RayMetrics(run_dir.name), self.stop,
        )  # fmt: skip
        recorder.describe()
        wait_until_ready(learner, samplers)

        def on_step(loop: Orchestrator, metrics: dict[str, float], fresh: list[Group]) -> None:
            recorder.on_step(loop, metrics, fresh)
            # What it waited for an evaluation to begin no sampler more would have spared it.
            samplers.fit(metrics["seconds/wait"] / metrics["seconds/step"])

        buffered = saved is not None and saved.is_of(config.task)
        requests, pool, replay = sources(config, problem, samplers, lambda: loop.counters.version, buffered=buffered)
        loop = Orchestrator(
            config, requests, pool, learner, replay, tracker, run_dir / "checkpoints",
            on_step=on_step, evaluate=recorder.evaluate, evaluation_draws=needs_samples(problem), should_stop=self.stop,
        )  # fmt: skip
        if saved is not None:
            loop.restore(saved)
            learner.restore(saved.learner, loop.counters.step)
            # Not before: with settings that are refused here, the run could not be resumed again.
            tracker.artifact(keep_config(config, run_dir))
        elif begun.start is not None:
            start_from(begun.start, learner, config.lora)
            # A learner that dies begins again from here. Until then a death ends the run: a new one would have the base.
            loop.checkpoint(learner.save().result())
        recorder.restore(loop)
        return loop, recorder

    def _begin(self) -> Begun:
        """With a warning of what hardly fits. Raises ConfigError or CheckpointError for what is refused."""
        from deploy.prepare import prepare
        from system.demonstrations import shown

        config = self.config
        saved = self._saved() if self.resume else None
        for field, factor in factors(config.task.reward):
            if isinstance(factor, FunctionReward):
                check_module(factor.path, f"{field}.path")
        prepared = prepare(config)
        for warning in config.warnings_about(len(prepared.problem.trained)):
            logger.warning(warning)
        if config.loss.kind == "mle" or config.replay.demonstrations:
            shown(prepared.problem)
        return Begun(saved, prepared, starting_weights(config) if config.lora.start and saved is None else None)

    def _saved(self) -> LoopState:
        """The checkpoint to go on from. Raises ConfigError where the config leaves nothing to do from there."""
        from system.loop_state import LoopState

        saved = LoopState.latest(self.run_dir / "checkpoints", self.from_step)
        steps, done = self.config.learner.steps, saved.counters.step
        if done >= steps and not saved.is_of(self.config.task):
            raise ConfigError(
                f"learner.steps={steps}: the run has {done} updates, on another task, and so none left for this one; "
                "raise learner.steps"
            )
        return saved


def keep_config(config: Config, run_dir: Path) -> Path:
    """Whole or not at all: without it the run could not be resumed."""
    path = run_dir / "config.yaml"
    replace_text(path, config_file.dump(config))
    return path


def start_from(weights: np.ndarray, learner: LearnerHandle, lora: Lora) -> None:
    """Raises ConfigError for weights of another model, rank or share of the layers than the learner's."""
    try:
        learner.restore(weights, 0)
    except CheckpointError as error:
        raise ConfigError(
            f"lora.start={lora.start!r} is not of this model with {lora.shape}; set them to those of the run that it is from: "
            f"{plain(error)}"
        ) from error


def sources(
    config: Config, problem: Problem, samplers: RaySamplers, version: Callable[[], int], *, buffered: bool
) -> tuple[Requests, Pool, Replay]:
    """Where training groups come from: what is asked for, samplers and replay, and the task's demonstrations where the config
    wants them.

    With `buffered` a checkpoint is to fill the replay buffer, so nothing is scored for it.
    """
    from learner.replay import Replay
    from system.demonstrations import Demonstrations, scored
    from system.requests import Requests

    sampler, replay = config.sampler, Replay(config.replay)
    imitates = config.loss.kind == "mle"
    wanted = imitates or (config.replay.demonstrations and not buffered)
    groups = scored(problem, samplers) if wanted else []
    prompts: Sequence[Prompt] = problem.trained
    pool: Pool = samplers
    if imitates:
        prompts, pool = [group.prompt for group in groups], Demonstrations(groups, samplers, version)
    else:
        for group in groups:
            replay.add(group)
    longest = problem.constraints.max_tokens
    return Requests(prompts, sampler.samples_per_prompt, sampler.exploration, config.seed, longest), pool, replay


@contextlib.contextmanager
def _disk_faults_named(run_dir: Path) -> Iterator[None]:
    """The border for what a run writes. The kernel says of a write that fails neither the file nor what to do about it."""
    try:
        yield
    except OSError as error:
        cause: Any = plain(error)
        if cause.errno not in DISK_FAULTS:
            raise
        raise RunError(
            f"{cause.filename or run_dir} cannot be written: {cause.strerror}; make room there or make it writable, then "
            + (f"--resume {run_dir}" if checkpoint.steps(run_dir / "checkpoints") else "start the run again")
        ) from error


@command
def main(argv: list[str]) -> int:
    one_arena()
    log_to_stderr()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config, run_dir, arguments = parse_arguments(argv)
    for warning in config.warnings():
        logger.warning(warning)
    job = Job(config, run_dir, bool(arguments.resume), arguments.from_step)
    scheme, _, database = job.config.tracking.uri.partition("://")
    written = {"output_dir": (config.output_dir, run_dir)}
    if scheme == "sqlite":
        written["tracking.uri"] = config.tracking.uri, Path(database)
    for field, (value, path) in written.items():
        if passes_away(path):
            logger.warning(
                "%s=%r is in the copy of the working directory that the cluster removes after the job: give one that stays",
                field, value,
            )  # fmt: skip
    if arguments.dry_run:
        print(config_file.dump(config), end="")
        return 0
    if arguments.check:
        print(job.check())
        return 0
    job.stop.hear()
    try:
        with _disk_faults_named(run_dir):
            summary = job.run()
    except KeyboardInterrupt:
        kept = checkpoint.steps(run_dir / "checkpoints")
        way_on = f"; --resume {run_dir} goes on from its last checkpoint" if kept else ", before a checkpoint"
        print(f"stopped at once{way_on}", file=sys.stderr)
        return STOPPED
    print(json.dumps(summary))
    return 0 if summary["finished"] else STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
