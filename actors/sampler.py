"""The sampler: groups of trajectories with their rewards, drawn by an engine that follows the learner's versions.

One thread owns the engine. Callers queue work and wait, so groups of several callers overlap in the engine, and the
reward of one is computed while others are drawn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from system.adapters import Adapter, AdapterError
from system.run_error import RunError
from system.scores import Scores
from system.timeline import Timeline
from system.trajectory import Group, Prompt, Request, Trajectory

if TYPE_CHECKING:
    from actors.engine import Engine
    from actors.rewards import Reward

logger = logging.getLogger(__name__)


class EngineDied(RunError):
    """The engine's thread ended by an error, or the sampler was closed: what was asked for will not come."""


@dataclass
class _Job:
    """A group for the engine's thread to draw."""

    request: Request
    adapter: Adapter
    done: Future[Group] = field(default_factory=Future)
    version: int = -1
    """The one that it was begun with."""


class Sampler:
    """Thread-safe. A new version is installed as soon as a group asks for it and the engine takes it (`Engine.takes_version`),
    between two tokens of what is being drawn."""

    def __init__(self, make: Callable[[], Engine], reward: Reward, on_death: Callable[[], None] = lambda: None) -> None:
        """Owns the engine that `make` returns, and raises what it raises. `on_death` is called once, after all callers were
        told, if the engine's thread fails."""
        # Not above: a driver knows the errors of this module, and needs no torch.
        from actors.engine import Installed

        self._reward, self._on_death = reward, on_death
        self._queue: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._wake = threading.Condition()
        self._ended: str | None = None
        self._seconds = {"generate": 0.0, "reward": 0.0, "install": 0.0}
        self._groups = 0
        self.timeline = Timeline()
        self._serving = -1
        """The version installed last, also while another one is on its way in; -1 for none."""
        self._installed = Installed()
        # One thread for all rewards: each thread that computes would get OpenMP threads of its own.
        self._rewards = ThreadPoolExecutor(1, thread_name_prefix="reward")
        made: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(make, made), name="engine", daemon=True)
        self._thread.start()
        try:
            made.result()
        except BaseException:
            # Ctrl-C, say: no thread may be left in vLLM's code when the process ends.
            self._ended = "it was never ready"
            self._thread.join()
            raise
        self._started = time.perf_counter()

    # --------------------------------------------------------------------------------------------- for any thread

    def sample(self, request: Request, adapter: Adapter) -> Group:
        """Draws a group under `adapter`, or under a newer version if that is installed already, and scores it.

        Blocks until the group is done. `Group.adapter_version` names the version that it was begun with; samples that the
        reward could not score are left out, and `Group.faults` says why.

        Raises:
            ValueError: the request does not fit the engine.
            AdapterError: `adapter` had to be installed and was refused.
            EngineDied: the engine failed, now or earlier, or the sampler is closed.
            Exception: what the reward raised.
        """
        self._engine.check(request)
        job = _Job(request, adapter)
        with self._wake:
            if self._ended:
                raise EngineDied(self._ended)
            self._queue.append(job)
            self._wake.notify()
        return job.done.result()

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        """log R at every prefix of trajectories that may come from anywhere."""
        return self._rewards.submit(self._reward.score, prompt, trajectories_K).result()

    def stats(self) -> dict[str, float]:
        """Totals since the start and the state of the last install; seconds, tokens, nats."""
        elapsed = time.perf_counter() - self._started
        return {
            "tokens": float(self._engine.tokens),
            "prompt_tokens": float(self._engine.prompt_tokens),
            "reward_tokens": float(self._reward.tokens_forwarded),
            "groups": float(self._groups),
            "generate_seconds": self._seconds["generate"],
            "reward_seconds": self._seconds["reward"],
            "install_seconds": self._seconds["install"],
            "last_install_seconds": self._installed.seconds,
            "canary_error": self._installed.canary_error,
            "canary_signal": self._installed.canary_signal,
            "effective_update": self._installed.effective_update,
            "version": float(self._serving),
            "busy": (self._seconds["generate"] + self._seconds["install"]) / elapsed,
        }

    @property
    def progress(self) -> int:
        """Grows while it draws or scores: tokens, and calls of the reward."""
        return self._engine.progress + self._reward.progress

    def close(self) -> None:
        """Ends the engine; callers that still wait get EngineDied. May be called twice."""
        with self._wake:
            self._ended = self._ended or "the sampler was closed"
            self._wake.notify()
        self._thread.join()
        self._rewards.shutdown()

    # -------------------------------------------------------------------------------------- in the engine's thread

    def _run(self, make: Callable[[], Engine], made: Future[None]) -> None:
        # Made here: OpenMP has threads for each thread that computes, and with more of them than cores they fall asleep
        # between two kernels.
        try:
            self._engine = make()
        except BaseException as error:
            made.set_exception(error)
            return
        made.set_result(None)
        died = False
        try:
            while self._admit():
                started = time.perf_counter()
                with self.timeline.span("generate", "engine", version=self._version):
                    complete = self._engine.step()
                for ticket, trajectories_K in complete:
                    self._groups += 1
                    self._rewards.submit(self._deliver, self._running[ticket], trajectories_K)
                    # Not before: whoever waits for what could not be handed on is told with the others.
                    del self._running[ticket]
                self._seconds["generate"] += time.perf_counter() - started
            self._engine.close()
        # A border: whatever ended this thread must reach those who wait for it, and `on_death`.
        except BaseException as error:
            died = True
            logger.exception("the engine's thread ends")
            self._ended = f"the engine died: {type(error).__name__}: {error}"
        with self._wake:
            self._ended = self._ended or "the sampler was closed"
            waiting = [*self._running.values(), *self._queue]
            self._running, self._queue = {}, deque()
        for job in waiting:
            job.done.set_exception(EngineDied(self._ended))
        if died:
            self._on_death()

    def _admit(self) -> bool:
        """Waits for work and hands the engine all that may start now. False when the sampler is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._queue or self._running or self._ended)
            if self._ended:
                return False
        while self._queue:
            job = self._queue[0]
            if not self._serves(job.adapter):
                if not self._engine.takes_version:
                    return True
                if not self._install(job):
                    continue
                if not self._serves(job.adapter):
                    raise AdapterError(f"version {job.adapter.version} was installed, but the engine has {self._version}")
            job.version = self._version
            self._running[self._engine.add(job.request)] = job
            self._queue.popleft()
        return True

    @property
    def _version(self) -> int:
        return self._engine.installed.version if self._engine.installed else -1

    def _serves(self, adapter: Adapter) -> bool:
        """What is installed is `adapter`, or newer."""
        installed = self._engine.installed
        if installed is None:
            return False
        return adapter.version < installed.version or (adapter.version, adapter.sha256) == (installed.version, installed.sha256)

    def _install(self, job: _Job) -> bool:
        started = time.perf_counter()
        try:
            with self.timeline.span("install", "engine", version=job.adapter.version):
                self._installed = self._engine.install(job.adapter)
        # A border: a refused adapter is the caller's to hear of; the engine says by `installed` what is left.
        except AdapterError as error:
            refused = [self._queue.popleft()]
            if not self._engine.busy:
                # It dropped what it was drawing, if it was, with its weights.
                refused += self._running.values()
                self._running = {}
            for lost in refused:
                lost.done.set_exception(error)
            return False
        finally:
            self._seconds["install"] += time.perf_counter() - started
            self._serving = self._version
        return True

    # -------------------------------------------------------------------------------------- in the rewards' thread

    def _deliver(self, job: _Job, trajectories_K: tuple[Trajectory, ...]) -> None:
        started = time.perf_counter()
        prompt = job.request.prompt
        try:
            with self.timeline.span("reward", "reward", group=job.request.group_id):
                scores = self._reward.score(prompt, trajectories_K)
            group = scores.group(prompt, trajectories_K, job.version, job.request.group_id)
        # A border: an error of the reward is for the caller that asked for this group.
        except BaseException as error:
            job.done.set_exception(error)
        else:
            job.done.set_result(group)
        self._seconds["reward"] += time.perf_counter() - started
