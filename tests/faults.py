"""Sampler actors that fail as they are told. What is to happen once leaves a mark, a file in config.output_dir."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.ray_actors import BuiltActor, SamplerActor
from system.config import Config, ConfigError
from system.orchestrator import Orchestrator
from system.timeline import Timeline
from system.trajectory import Group, Request
from tests.fakes import group_for


@dataclass(frozen=True)
class Faults:
    """By group number, each once unless `always`."""

    crashes: frozenset[int] = frozenset()
    """The process ends."""
    hangs: frozenset[int] = frozenset()
    """No answer for an hour."""
    failed_builds: int = 0
    """The first so many samplers cannot be built."""
    killed_builds: int = 0
    """The process of the first so many samplers ends while they are built."""
    always: bool = False
    seconds: float = 0.0
    """Of each group."""
    gets_further: bool = False
    """All the while."""

    @property
    def outline(self) -> Faults:
        """They take the place of a problem."""
        return self


@dataclass
class Part:
    """Answers without a model."""

    config: Config
    faults: Faults
    timeline: Timeline = field(default_factory=Timeline)

    def __post_init__(self) -> None:
        for number in range(self.faults.failed_builds):
            if once(self.config, f"build-{number}"):
                raise ConfigError("this actor cannot be built")
        for number in range(self.faults.killed_builds):
            if once(self.config, f"killed-{number}"):
                os._exit(1)

    @property
    def progress(self) -> int:
        return time.monotonic_ns() if self.faults.gets_further else 0

    def sample(self, request: Request, adapter: int) -> Group:
        time.sleep(self.faults.seconds)
        if self._struck(request.group_id, self.faults.crashes):
            os._exit(1)
        if self._struck(request.group_id, self.faults.hangs):
            time.sleep(3600)
        return group_for(request, adapter)

    def _struck(self, group_id: int, groups: frozenset[int]) -> bool:
        return group_id in groups and (self.faults.always or once(self.config, f"group-{group_id}"))


class FaultySampler(BuiltActor):
    def __init__(self, config: Config, faults: Faults) -> None:
        self.construct(Part, config, faults)

    def sample(self, request: Request, adapter: int) -> Group:
        return self.part.sample(request, adapter)

    def progress(self) -> int:
        return self.part.progress

    def node(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()


class IdleLearner(BuiltActor):
    """Takes the place of a learner, or of one of its ranks, and says where."""

    def __init__(self, rank: int, size: int) -> None:
        pass

    def open_meeting(self) -> tuple[str, int]:
        return "127.0.0.1", 0

    def build(self, config: Config, faults: Faults, meeting: tuple[str, int] | None) -> None:
        self.construct(Part, config, faults)

    def node(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()


class LostLearner(IdleLearner):
    """Killed over its model, as one that finds no memory for it."""

    def build(self, config: Config, faults: Faults, meeting: tuple[str, int] | None) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class LostRank(IdleLearner):
    """The last rank is killed over its model, which all others complain of just before."""

    def __init__(self, rank: int, size: int) -> None:
        self._is_last = rank == size - 1

    def build(self, config: Config, faults: Faults, meeting: tuple[str, int] | None) -> None:
        mark = Path(config.output_dir) / "dying"
        if self._is_last:
            mark.touch()
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        while not mark.exists():
            time.sleep(0.01)
        self.construct(_broken)


def _broken() -> None:
    raise RuntimeError("Connection closed by peer")


class HangingLearner(IdleLearner):
    """No answer to an update for an hour."""

    def update(self, groups: list[Group]) -> None:
        time.sleep(3600)


class OutOfMemory(SamplerActor):
    """A real sampler whose engine finds no memory over its first step."""

    def __init__(self, config: Config, problem: Any) -> None:
        super().__init__(config, problem)
        engine, steps = self.part._engine, iter(range(10**9))
        step = engine.step

        def failing() -> Any:
            if self.fails(config, next(steps)):
                raise MemoryError("cannot allocate 1 TiB")
            return step()

        engine.step = failing

    def fails(self, config: Config, step: int) -> bool:
        return True


class OutOfMemoryOnce(OutOfMemory):
    """Over its third step, once."""

    def fails(self, config: Config, step: int) -> bool:
        return step == 2 and once(config, "memory")


class LostAdapterOnce(SamplerActor):
    """A real sampler whose engine says of its second version that it is installed, and keeps the first, once."""

    def __init__(self, config: Config, problem: Any) -> None:
        super().__init__(config, problem)
        engine: Any = self.part._engine
        install, asked = engine.install, iter(range(10**9))

        def losing(adapter: Any) -> dict[str, float]:
            lost = next(asked) == 1 and once(config, "adapter")
            return {"seconds": 0.0} if lost else install(adapter)

        engine.install = losing


def once(config: Config, name: str) -> bool:
    """True the first time that anyone asks, in any process."""
    try:
        (Path(config.output_dir) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def assert_each_counts_once(used: list[int], updates: int, loop: Orchestrator) -> None:
    """A group that a fault held back is used all the same, in time for the last update or by none."""
    assert len(used) == len(set(used)) == updates
    assert set(range(loop.counters.next_group)) - set(used) == set(loop.flow.unused())
