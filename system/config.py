"""The whole run in one frozen tree. Imports pydantic only, so that a mistake is named before torch loads.

A validator that compares two fields states a property without which the run could not work. `system.config_file` reads a
config; the larger sections are in files of their own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from system.learner_config import MLE, Learner, Loss, PolicyGradient, Pooled, Replay
from system.reward_config import ProductReward
from system.sampler_config import Actors, Sampler
from system.section import ConfigError, Section
from system.task_config import PROMPT_FILES, RandomNumber, Task

NAME = r"^[A-Za-z0-9][\w.-]*$"


# ------------------------------------------------------------------------------------------------ what is trained


class Model(Section):
    path: str = Field(default="packaged:smollm2-135m-instruct", min_length=1)
    """`packaged:NAME` (a model that comes with a Python package), a folder in Hugging Face format, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""


class Lora(Section):
    rank: int = Field(default=16, ge=1, le=512)
    """Of A and B: what an update can be, and what it costs."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is (alpha / rank) * B A."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Names of the linear modules that are adapted, as PEFT takes them. There is no dropout: log q must be exact."""
    layers: float = Field(default=1.0, gt=0, le=1)
    """Share of the model's layers that are adapted, the last ones, rounded up to whole layers. An update goes back through
    these alone, and a version merges these alone; the others stay the base's."""
    start: str | None = Field(default=None, min_length=1)
    """A run, or a PEFT folder, whose adapter training starts from, such as one of supervised fine-tuning; by default from the
    base model. The frozen model of the reward stays the base."""

    @property
    def shape(self) -> str:
        """What the weights of an adapter have to be made for, as settings."""
        targets = self.targets if isinstance(self.targets, str) else f"[{','.join(self.targets)}]"
        return f"lora.rank={self.rank} lora.layers={self.layers:g} lora.targets={targets}"


# ---------------------------------------------------------------------------------------------- around the run


class Tracking(Section):
    uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    """MLflow tracking URI: a SQLite file, or a server. By default MLFLOW_TRACKING_URI of the environment, as for MLflow itself,
    or else a file where the job is started."""
    experiment: str = Field(default="headwater", min_length=1)
    """Of MLflow, in which the run is found."""
    sweep: str | None = Field(default=None, pattern=NAME)
    """Runs of one sweep are children of one parent run of this name; `deploy/sweep.py` sets it."""
    model: str | None = Field(default=None, pattern=NAME)
    """The adapter of a run that ends becomes the next version of this registered model."""
    sample_table_every: int = Field(default=50, ge=1)
    """Updates between two tables of samples."""
    system_metrics_seconds: float = Field(default=10.0, gt=0)
    """Seconds between two readings of memory and CPU on every node."""
    flush_seconds: float = Field(default=5.0, gt=0)
    """Seconds between two attempts to hand the journal to the server."""
    close_seconds: float = Field(default=60.0, ge=0)
    """Longest wait for the server when the run ends; what it did not take stays in the journal."""


class Cluster(Section):
    address: str | None = None
    """Ray address; by default the cluster that this job was submitted to, or a new local one. Other nodes of the cluster need
    this folder and its environment at the same path: `ray job submit --working-dir .` brings the folder along."""
    local_cpus: int | None = Field(default=None, ge=1)
    """CPUs of a new local cluster; by default what the run asks for or the machine has, whichever is more."""
    dashboard: bool = False
    """Start Ray's dashboard with a new local cluster, on loopback."""
    wait_seconds: float = Field(default=0.0, ge=0)
    """How long a run that does not fit the nodes there are waits for more: an autoscaler's, or workers that still start. At
    most actors.start_seconds."""


class Config(Section):
    name: str = Field(default="run", pattern=NAME)
    """Names the run in MLflow and its folder."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of every draw and of the first LoRA weights."""
    output_dir: str = "runs"
    """Holds one folder per run: config, checkpoints, journal, summary."""
    model: Model = Model()
    lora: Lora = Lora()
    task: Task
    sampler: Sampler = Sampler()
    actors: Actors = Actors()
    replay: Replay = Replay()
    loss: Loss = Pooled()
    learner: Learner = Learner()
    tracking: Tracking = Field(default_factory=Tracking)
    cluster: Cluster = Cluster()

    @property
    def gpu_memory_utilization(self) -> float:
        """Of each engine."""
        return self.sampler.gpu_memory_utilization or 0.5 * (self.actors.gpus or 1.0)

    @property
    def canary_by_mean(self) -> bool:
        """Engine and learner agree at every token to within rounding, which bfloat16 does not promise."""
        return self.sampler.dtype == self.learner.dtype == "float32"

    @property
    def canary_tolerance(self) -> float:
        return self.sampler.canary_tolerance or (0.005 if self.canary_by_mean else 0.15)

    def warnings(self) -> list[str]:
        """What is allowed and hardly meant. A run may be shortened to have a look at it, so nothing here is an error."""
        temperature, steps, actors, found = self.learner.reward_temperature, self.learner.steps, self.actors, []
        # Supervised fine-tuning has no use for a temperature.
        if temperature.horizon >= steps and temperature.start != temperature.end and not isinstance(self.loss, MLE):
            found.append(
                f"learner.reward_temperature.horizon={temperature.horizon} with learner.steps={steps}: the last update has T = "
                f"{temperature.at(steps - 1):.3g}, while evaluations take T at its end, {temperature.end:g}; lower horizon "
                "below steps, or raise steps"
            )
        if actors.count > actors.most:
            found.append(f"actors.count={actors.count} counts for nothing beside min={actors.fewest} and max={actors.most}")
        ahead = (self.learner.max_staleness + 1) * self.learner.groups_per_update
        if ahead < actors.most:
            found.append(
                f"learner.max_staleness={self.learner.max_staleness} with groups_per_update={self.learner.groups_per_update} "
                f"lets {ahead} groups be under way at a time: {actors.most - ahead} of {actors.most} samplers have no work; "
                "raise groups_per_update or max_staleness, or lower actors.count or max"
            )
        computes = {
            "sampler.dtype": (self.sampler.dtype, actors.gpus),
            "sampler.reward_dtype": (self.sampler.reward_dtype, actors.gpus),
            "learner.dtype": (self.learner.dtype, self.learner.gpus),
        }
        if slow := [name for name, (dtype, gpus) in computes.items() if gpus and dtype == "float32"]:
            found.append(
                f"{', '.join(slow)} {'is' if len(slow) == 1 else 'are'} float32, which a GPU computes many times more slowly "
                "than bfloat16, in twice the memory; set bfloat16"
            )
        return found

    def warnings_about(self, prompts: int) -> list[str]:
        """The same, once it is known how many prompts the task has."""
        steps, groups = self.learner.steps, self.learner.groups_per_update
        drawn = f"learner.steps={steps} with groups_per_update={groups} draws {steps * groups} groups for {prompts} prompts"
        found = []
        if steps * groups < prompts:
            found.append(f"{drawn}: the others are never seen; raise steps, or lower task.limit")
        if prompts < self.learner.ranks:
            found.append(
                f"learner.ranks={self.learner.ranks} share out the prompts of an update, and the task has {prompts}: the other "
                "ranks have no work; lower learner.ranks"
            )
        replayed = 1 - self.replay.fresh
        if replayed and not self.replay.demonstrations and steps * groups <= prompts:
            found.append(
                f"{drawn}: replay.fresh={self.replay.fresh:g} replays earlier samples of a prompt, and none comes a second "
                "time; raise steps, lower task.limit, or set replay.fresh=1"
            )
        return found

    @model_validator(mode="after")
    def _the_loss_has_its_rewards(self) -> Config:
        if self.loss.prefix_rewards == "needed" and not self.task.reward.every_prefix:
            raise ValueError(
                f"loss.kind={self.loss.kind} compares states inside a trajectory, but task.reward.kind="
                f"{self.task.reward.kind} gives a reward at the end alone; use loss.kind=vargrad or pooled, "
                "or a reward with every_prefix=true"
            )
        return self

    @model_validator(mode="after")
    def _the_engine_can_use_its_gpu(self) -> Config:
        gpus, sampler = self.actors.gpus, self.sampler
        if gpus and sampler.install == "adapter" and sampler.dtype == "float32":
            raise ValueError(
                f"sampler.install=adapter with sampler.dtype=float32 and actors.gpus={gpus:g}: vLLM's LoRA kernels on a GPU "
                "take no float32; set sampler.dtype=bfloat16, or sampler.install=merged"
            )
        if gpus and self.gpu_memory_utilization > gpus:
            raise ValueError(
                f"sampler.gpu_memory_utilization={self.gpu_memory_utilization:g} is more of a GPU than actors.gpus={gpus:g}; "
                "lower it, or leave it out for half of actors.gpus"
            )
        return self

    @model_validator(mode="after")
    def _what_is_listed_is_the_posterior(self) -> Config:
        end = self.learner.reward_temperature.end
        if isinstance(self.task, RandomNumber) and self.task.is_listed and end > 1:
            raise ValueError(
                f"learner.reward_temperature.end={end:g} with task.kind=random_number: numbers stay equally likely, and what "
                "is none becomes likelier than the listed posterior says; set end=1 or below, or another task"
            )
        return self

    @model_validator(mode="after")
    def _a_contrast_has_labels(self) -> Config:
        contrasts = isinstance(self.task.reward, ProductReward) and self.task.reward.contrasts
        if contrasts and (stage := getattr(self.task, "stage", None)) != "reason":
            without = f"task.stage={stage}" if stage else f"task.kind={self.task.kind}"
            raise ValueError(
                f"task.reward has kind=contrast, which compares labels as evidence, but {without} has none; use it with "
                "kind=subjectivity and stage=reason"
            )
        return self

    @model_validator(mode="after")
    def _answers_are_imitated(self) -> Config:
        if (stage := getattr(self.task, "stage", "reason")) != "reason" and not isinstance(self.loss, MLE):
            raise ValueError(
                f"task.stage={stage} with loss.kind={self.loss.kind} would learn the frozen model's answers, right or wrong; "
                "set loss.kind=mle, or stage=reason"
            )
        return self

    @model_validator(mode="after")
    def _a_baseline_has_its_own_samples(self) -> Config:
        if isinstance(self.loss, MLE) and (self.replay.fresh != 1 or self.replay.demonstrations):
            raise ValueError(
                "loss.kind=mle learns from demonstrations alone; set "
                '"replay={fresh: 1, prioritised: 0, uniform: 0, demonstrations: false}"'
            )
        shares = {"replay.fresh": self.replay.fresh, "sampler.exploration.on_policy": self.sampler.exploration.on_policy}
        for field, share in shares.items():
            if isinstance(self.loss, PolicyGradient) and share != 1:
                raise ValueError(
                    f"loss.kind={self.loss.kind} learns from samples of the policy alone, but {field}={share:g}; set "
                    "sampler.exploration.on_policy=1, sampler.exploration.planted=0 and "
                    '"replay={fresh: 1, prioritised: 0, uniform: 0, demonstrations: false}"'
                )
        return self

    @model_validator(mode="after")
    def _actors_may_start_as_late_as_nodes_may_join(self) -> Config:
        if self.cluster.wait_seconds > self.actors.start_seconds:
            raise ValueError(
                f"cluster.wait_seconds={self.cluster.wait_seconds:g} is above actors.start_seconds="
                f"{self.actors.start_seconds:g}, after which a run ends whose actors are not placed and built; raise "
                "actors.start_seconds or lower cluster.wait_seconds"
            )
        return self

    @model_validator(mode="after")
    def _there_is_something_to_plant(self) -> Config:
        if (planted := self.sampler.exploration.planted) and not getattr(self.task, "keywords", ()):
            raise ValueError(
                f"sampler.exploration.planted={planted:g} writes task.keywords into samples, and task.kind={self.task.kind} "
                "has none; set planted=0, or use kind=constrained with keywords"
            )
        return self

    def check_planted(self, hints: Sequence[Sequence[int]]) -> None:
        """Raises ConfigError if there is nothing to plant that a sample has room for. `hints` are a prompt's, as tokens."""
        planted, length = self.sampler.exploration.planted, sum(map(len, hints))
        if planted and not 0 < length <= self.task.max_tokens:
            raise ConfigError(
                f"sampler.exploration.planted={planted:g}: the keywords are {length} tokens that can be drawn, and "
                f"task.max_tokens={self.task.max_tokens} has to hold them; change one of the two, or set planted=0"
            )

    def check_lengths(self, context_length: int, lengths: Mapping[str, int]) -> None:
        """Raises ConfigError if a prompt and task.max_tokens do not fit the model. `lengths` are a prompt's tokens by its id,
        evidence included."""
        drawn = self.task.max_tokens + getattr(self.task, "tool_tokens", 0) + 1
        too_long = {name: length for name, length in lengths.items() if length + drawn > context_length}
        if too_long:
            name = max(too_long, key=too_long.__getitem__)
            field = PROMPT_FILES.get(self.task.kind)
            file = f" in task.{field}={getattr(self.task, field)!r}" if field else ""
            raise ConfigError(
                f"task.max_tokens={self.task.max_tokens}: with prompt {name!r} ({too_long[name]} tokens, the longest of "
                f"{len(too_long)}{file} that do not fit) and the stop token {too_long[name] + drawn} tokens are needed, but "
                f"{self.model.path} has a context of {context_length}; shorten task.max_tokens or the prompts"
            )
