"""A sampler and a learner in this process, without Ray: how a finished run is evaluated and sampled from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.prepare import prepare
from deploy.runs import load_adapter
from system.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from actors.sampler import Sampler
    from learner.learner import Learner
    from system.adapters import Adapter
    from system.handles import GroupLogQ
    from system.scores import Scores
    from system.tasks.problem import Problem
    from system.trajectory import Group, Prompt, Request, Trajectory


@dataclass
class Local:
    """Both models behind the handles that `system.evaluation` takes. Build it with `opened`."""

    config: Config
    problem: Problem
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    learner: Learner
    callers: ThreadPoolExecutor
    adapter: Adapter
    """That is drawn with."""

    def use(self, adapter: Path) -> None:
        """From now on both models are the base with a run's adapter file.

        Raises:
            ConfigError: the adapter is of another model or rank.
        """
        load_adapter(self.learner.policy, adapter, self.config.model.path, self.config.lora)
        self.publish(self.learner.adapter(self.adapter.version + 1))

    def publish(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def sample(self, request: Request) -> Future[Group]:
        return self.callers.submit(self.sampler.sample, request, self.adapter)

    def log_reward(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Future[Scores]:
        return self.callers.submit(self.sampler.score, prompt, trajectories_K)

    def score(self, groups: Sequence[Group]) -> Future[list[GroupLogQ]]:
        return self.callers.submit(self.learner.score, groups)


@contextmanager
def opened(config: Config, samples: int) -> Iterator[Local]:
    """The engine and the learner of a config, for groups of so many samples: both the base model, until they are told to `use`
    an adapter.

    Raises:
        ConfigError: as `prepare`, and where either cannot be built.
    """
    from actors.build import build_sampler
    from learner.learner import Learner

    prepared = prepare(config)
    learner = Learner.build(config, prepared.problem)
    sampler = build_sampler(config, prepared.problem)
    with ThreadPoolExecutor(config.sampler.groups_at_once(samples)) as callers:
        try:
            yield Local(config, prepared.problem, prepared.tokenizer, sampler, learner, callers, learner.adapter(0))
        finally:
            sampler.close()
