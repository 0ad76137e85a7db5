"""The whole run in one frozen tree. Imports pydantic only, so that a mistake is named before torch loads.

A validator that compares two fields states a property without which the run could not work. `system.config_file` reads a
config, `system.task_config` has the tasks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from system.section import ConfigError, Section
from system.task_config import PROMPT_FILES, ProductReward, RandomNumber, Task

NAME = r"^[A-Za-z0-9][\w.-]*$"
NEEDS_PREFIX_REWARDS = ("db", "subtb", "tb")
"""Losses whose pairs include states inside a trajectory, so that each needs a reward of its own."""


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
    start: str | None = Field(default=None, min_length=1)
    """A run, or a PEFT folder, whose adapter training starts from, such as one of supervised fine-tuning; by default from the
    base model. The frozen model of the reward stays the base."""


# ------------------------------------------------------------------------------------------------- who makes data


class Exploration(Section):
    """How the samples of a group are drawn. GFlowNet losses need no correction for it, but must see the modes."""

    on_policy: float = Field(default=0.5, ge=0, le=1)
    """Share of each group that is drawn from the policy itself; the rest explores by the settings below."""
    epsilon: float = Field(default=0.0, ge=0, lt=1)
    """Exploring samples mix this share of uniform-over-the-support into every token."""
    temperature: tuple[float, float] = (0.5, 2.0)
    """Each exploring sample draws its softmax temperature uniformly from this interval."""
    planted: float = Field(default=0.0, ge=0, le=1)
    """Share of the exploring samples into which the task's keywords are written at random places: where the policy hardly ever
    meets a constraint by itself, it has nothing to learn from."""
    horizon: int | None = Field(default=None, ge=1)
    """Groups over which the share that explores falls to none, linearly; by default it stays. The end of a run then improves
    what the policy draws, after its beginning has found what there is to draw."""

    def at(self, group_id: int) -> Exploration:
        """As it is for group `group_id`, from 0."""
        if self.horizon is None:
            return self
        left = max(0.0, 1.0 - group_id / self.horizon)
        return self.model_copy(update={"on_policy": 1.0 - (1.0 - self.on_policy) * left})

    def counts(self, samples: int) -> tuple[int, int]:
        """Of a group of so many: (those from the policy itself, those of the others into which keywords are written)."""
        on_policy = round(self.on_policy * samples)
        return on_policy, round(self.planted * (samples - on_policy))

    @model_validator(mode="after")
    def _an_interval(self) -> Exploration:
        low, high = self.temperature
        if not 0 < low <= high:
            raise ValueError(f"temperature={list(self.temperature)} must be [low, high] with 0 < low <= high")
        return self


class Sampler(Section):
    samples_per_prompt: int = Field(default=16, ge=2)
    """K, the size of a group. Two at least: one sample says nothing about log Z."""
    exploration: Exploration = Exploration()
    install: Literal["auto", "merged", "adapter"] = "auto"
    """How a new version enters the engine: `merged` into the base weights, or as a LoRA `adapter`. auto: as an adapter on CUDA
    with dtype=bfloat16 (vLLM's LoRA kernels there take no float32), merged elsewhere."""
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    """Of weights that are merged in bfloat16. To the nearest, small updates are lost; `stochastic` keeps them on average."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the engine."""
    reward_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen model that scores."""
    token_budget: int = Field(default=1024, ge=64)
    """Most tokens in one row of the scoring pass. The cost of attention grows with its square; a GPU takes more at once."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Sequences that the engine decodes at once."""
    kv_cache_mb: int = Field(default=512, ge=16)
    """Size of the engine's KV cache on CPU, MiB."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of a whole GPU that the engine takes; by default half of actors.gpus. The frozen model that scores is beside it."""
    max_reward_faults: int = Field(default=100, ge=0)
    """Samples for which the reward raises, hangs or gives no finite number are left out of their groups and counted.
    The run stops when there are more than this many in all."""
    canary_tolerance: float | None = Field(default=None, gt=0)
    """Largest difference, nats, between the engine's and the learner's log-probs of half of the canary's tokens (the median).
    By default 0.005 if both compute in float32, else 0.15: bfloat16 alone makes about 0.05.
    What an update has to differ by to be proven to have arrived is this much, so it says little of early bfloat16 versions."""

    def groups_at_once(self, samples: int) -> int:
        """Groups of so many samples that fill one engine, and one more, which leaves no idle tail between them."""
        return -(-self.max_num_seqs // samples) + 1

    @model_validator(mode="after")
    def _what_is_planted_is_in_some_sample(self) -> Sampler:
        on_policy, planted = self.exploration.counts(self.samples_per_prompt)
        if self.exploration.planted and not planted:
            raise ValueError(
                f"exploration.planted={self.exploration.planted:g} is no whole sample: of samples_per_prompt="
                f"{self.samples_per_prompt} with exploration.on_policy={self.exploration.on_policy:g}, "
                f"{self.samples_per_prompt - on_policy} explore; raise planted, lower on_policy, or set planted=0"
            )
        return self


class Actors(Section):
    count: int = Field(default=1, ge=1)
    """Number of sampler actors: short for min and max of the same number."""
    min: int | None = Field(default=None, ge=1)
    """Samplers that the run starts with, and that a cluster must have room for; by default count."""
    max: int | None = Field(default=None, ge=1)
    """Samplers that the pool grows to while the learner waits for groups and the cluster has room, and from which it goes back
    to min while there is no work for all; by default count."""
    cpus: float = Field(default=1, ge=0)
    """CPUs reserved for each, and its number of threads (rounded down, at least one)."""
    gpus: float = Field(default=0, ge=0, le=1)
    """GPUs reserved for each; fractions share a GPU."""
    max_deaths: int = Field(default=3, ge=0)
    """The run stops after more than this many deaths in a row: of samplers without a group in between, or of the learner
    without a checkpoint in between."""
    answer_seconds: float = Field(default=300.0, gt=0)
    """A sampler that is asked and answers nothing for this long is killed and replaced; one that rests is asked for a sign of
    life as often. Long enough for the slowest group, and for the first one, which installs a version and compiles kernels."""
    start_seconds: float = Field(default=600.0, gt=0)
    """Longest wait for an actor to be placed and built: a first start converts or fetches the model."""

    @property
    def fewest(self) -> int:
        return self.count if self.min is None else self.min

    @property
    def most(self) -> int:
        return max(self.fewest, self.count) if self.max is None else self.max

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    @model_validator(mode="after")
    def _a_range(self) -> Actors:
        if self.fewest > self.most:
            raise ValueError(f"min={self.fewest} is above max={self.most}; lower min (by default count) or raise max")
        return self


# ------------------------------------------------------------------------------------------------- who uses data


class Replay(Section):
    """Each update mixes fresh samples with replayed ones of the same prompt. Shares add up to 1."""

    capacity: int = Field(default=64, ge=1)
    """Distinct trajectories kept for each prompt."""
    fresh: float = Field(default=1.0, gt=0, le=1)
    """Of the samples of an update, those that were drawn for it."""
    prioritised: float = Field(default=0.0, ge=0, lt=1)
    """Drawn in proportion to exp(log R / prioritised_temperature)."""
    uniform: float = Field(default=0.0, ge=0, lt=1)
    """Drawn alike from what the buffer has of the prompt."""
    prioritised_temperature: float = Field(default=1.0, gt=0)
    """Higher draws the best less often; nats."""
    demonstrations: bool = False
    """Start with the task's demonstrations in the buffer."""

    @model_validator(mode="after")
    def _shares(self) -> Replay:
        total = self.fresh + self.prioritised + self.uniform
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"fresh={self.fresh:g}, prioritised={self.prioritised:g} and uniform={self.uniform:g} add up to {total:g}, "
                "but shares add up to 1; change one of them"
            )
        if self.demonstrations and not (self.prioritised or self.uniform):
            raise ValueError(
                f"demonstrations=true with fresh={self.fresh:g}: they would be in a buffer that nothing is drawn from; lower "
                "fresh and raise prioritised or uniform, or set demonstrations=false"
            )
        return self


class Pooled(Section):
    kind: Literal["pooled"] = "pooled"


class VarGrad(Section):
    kind: Literal["vargrad"] = "vargrad"


class TrajectoryBalance(Section):
    kind: Literal["tb"] = "tb"


class DetailedBalance(Section):
    kind: Literal["db"] = "db"


class SubTB(Section):
    kind: Literal["subtb"] = "subtb"
    decay: float = Field(default=1.0, gt=0, le=1)
    """λ: a pair of states of one sample weighs λ^(d-1), d counting the states from one to the other that can stop."""


class Clipped(Section):
    """What GRPO and PPO share: they maximise the reward instead of sampling in proportion to it, from own samples."""

    clip: float = Field(default=0.2, gt=0, lt=1)
    """Ratios to the policy that drew a sample count within 1 ± clip."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence to the base model."""


class GRPO(Clipped):
    """A baseline: advantages are standardised within the group, and each trajectory weighs the same."""

    kind: Literal["grpo"] = "grpo"


class PPO(Clipped):
    """A baseline, as GRPO, with the KL inside the reward and every action of a group weighing the same."""

    kind: Literal["ppo"] = "ppo"


class RLOO(Section):
    """A baseline, as GRPO: REINFORCE with the other samples of the group as its baseline."""

    kind: Literal["rloo"] = "rloo"
    kl: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence to the base model."""


class MLE(Section):
    """A baseline: supervised fine-tuning on the task's demonstrations. Samplers draw for evaluations alone."""

    kind: Literal["mle"] = "mle"


Loss = Annotated[
    Pooled | VarGrad | TrajectoryBalance | DetailedBalance | SubTB | GRPO | PPO | RLOO | MLE, Field(discriminator="kind")
]


class RewardTemperature(Section):
    """T in R^(1/T): linear from start to end over `horizon` steps, then constant."""

    start: float = Field(default=1.0, gt=0)
    end: float = Field(default=1.0, gt=0)
    horizon: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _a_way_takes_steps(self) -> RewardTemperature:
        if self.horizon == 0 and self.start != self.end:
            raise ValueError(
                f"start={self.start:g} would never be used: horizon=0 goes to end={self.end:g} at once; "
                "set horizon, or set start and end to the same"
            )
        return self

    def at(self, step: int) -> float:
        done = 1.0 if self.horizon == 0 else min(1.0, step / self.horizon)
        return self.start + (self.end - self.start) * done


class Learner(Section):
    steps: int = Field(default=100, ge=1)
    """Updates in the run."""
    groups_per_update: int = Field(default=1, ge=1)
    """Prompts whose groups make one update; the loss is their mean."""
    lr: float = Field(default=1e-3, gt=0)
    """The largest learning rate of AdamW. Where the spread of u does not fall within some sixty updates, lower it."""
    warmup_steps: int = Field(default=5, ge=0)
    """The learning rate rises linearly over these, from lr / (warmup_steps + 1): the first step is never at 0."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """After warm-up, down to lr * final_lr at the last step."""
    final_lr: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    """Of the LoRA weights, towards the base model."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of AdamW: how long it remembers the gradient, and its square."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    reward_temperature: RewardTemperature = RewardTemperature()
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto: CUDA where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base weights and activations. LoRA weights and the loss are float32."""
    token_budget: int = Field(default=2048, ge=64)
    """Most tokens of one micro-batch: the trees of an update are packed into rows of this length."""
    logits_chunk: int = Field(default=256, ge=1)
    """Positions whose logits exist at one time."""
    attention: Literal["auto", "dense", "block"] = "auto"
    """Of the learner and of the frozen model that scores: a mask for each pair of a row's tokens (`dense`), or FlexAttention
    over the blocks of the prefix trees (`block`). auto: block on CUDA where it works, which is logged where it does not."""
    gradient_checkpointing: bool = False
    """Keep no activations of a layer for the backward pass and compute them again: less memory, a third more work."""
    ranks: int = Field(default=1, ge=1)
    """Processes that share the groups of an update (data parallel); what they learn is what one would."""
    shard_base: bool = False
    """Keep each frozen layer in shards over the ranks, for a base model that does not fit one GPU."""
    threads: int = Field(default=1, ge=1)
    """Of each rank."""
    cpus: float = Field(default=1, ge=0)
    """CPUs reserved for each rank."""
    gpus: float = Field(default=0, ge=0)
    """GPUs reserved for each rank."""
    publish_every: int = Field(default=1, ge=1)
    """Updates between two adapter versions."""
    max_staleness: int = Field(default=1, ge=0)
    """Largest number of updates between the adapter that drew a group and the update that uses it fresh. 0: synchronous."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Updates between two checkpoints: at most so many are done again after a fault."""
    answer_seconds: float = Field(default=1800.0, gt=0)
    """A learner that answers a call with nothing for this long is killed, and made again from the last checkpoint and the
    batches since. It has to allow for the slowest update, the scores of an evaluation, and the first kernels to compile."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Updates between two evaluations; by default before the first and after the last alone."""
    evaluation_prompts: int = Field(default=64, ge=1)
    """An evaluation takes this many prompts, evenly spaced, where there are more; where prompts vote for a record, this many
    records."""
    evaluation_samples: int = Field(default=32, ge=2)
    """On-policy samples of each prompt in an evaluation, where the outcomes cannot be listed."""

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each of the two must be in [0, 1), as in [0.9, 0.99]")
        return betas

    @model_validator(mode="after")
    def _the_loop_can_fill_a_batch(self) -> Learner:
        if self.max_staleness < self.publish_every - 1:
            raise ValueError(
                f"max_staleness={self.max_staleness} is below publish_every - 1 = {self.publish_every - 1}: "
                f"no sample would be fresh enough between two versions; set max_staleness >= {self.publish_every - 1}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be below steps={self.steps}; lower warmup_steps or raise steps"
            )
        return self

    @model_validator(mode="after")
    def _every_rank_has_work_and_a_device(self) -> Learner:
        if self.ranks == 1:
            if self.shard_base:
                raise ValueError("shard_base=true has nothing to share with ranks=1; raise ranks or set shard_base=false")
            return self
        if self.ranks > self.groups_per_update and not self.shard_base:
            raise ValueError(
                f"ranks={self.ranks} share groups_per_update={self.groups_per_update}, so some would never have work; "
                f"set groups_per_update >= {self.ranks} or lower ranks"
            )
        if self.gpus not in (0, 1):
            raise ValueError(
                f"gpus={self.gpus:g}, but each of ranks={self.ranks} computes on one GPU or on none; set gpus=1 or 0"
            )
        wrong = self.gpus if self.device == "cpu" else self.device.startswith("cuda") and not self.gpus
        if wrong or self.device.startswith("cuda:"):
            raise ValueError(
                f"device={self.device} with ranks={self.ranks} and gpus={self.gpus:g}: each rank sees the GPUs that are "
                "reserved for it alone; use device=auto or cuda with gpus=1, or device=cpu with gpus=0"
            )
        return self


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
    """Ray address; by default the cluster that this job was submitted to, or a new local one."""
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
    def canary_tolerance(self) -> float:
        exact = self.sampler.dtype == self.learner.dtype == "float32"
        return self.sampler.canary_tolerance or (0.005 if exact else 0.15)

    def warnings(self) -> list[str]:
        """What is allowed and hardly meant. A run may be shortened to have a look at it, so nothing here is an error."""
        temperature, steps = self.learner.reward_temperature, self.learner.steps
        # Supervised fine-tuning has no use for a temperature.
        if temperature.horizon < steps or temperature.start == temperature.end or isinstance(self.loss, MLE):
            return []
        return [
            f"learner.reward_temperature.horizon={temperature.horizon} with learner.steps={steps}: the last update has T = "
            f"{temperature.at(steps - 1):.3g}, while evaluations take T at its end, {temperature.end:g}; lower horizon below "
            "steps, or raise steps"
        ]

    def warnings_about(self, prompts: int) -> list[str]:
        """The same, once it is known how many prompts the task has."""
        steps, groups = self.learner.steps, self.learner.groups_per_update
        drawn = f"learner.steps={steps} with groups_per_update={groups} draws {steps * groups} groups for {prompts} prompts"
        found = []
        if steps * groups < prompts:
            found.append(f"{drawn}: the others are never seen; raise steps, or lower task.limit")
        replayed = 1 - self.replay.fresh
        if replayed and not self.replay.demonstrations and steps * groups <= prompts:
            found.append(
                f"{drawn}: replay.fresh={self.replay.fresh:g} replays earlier samples of a prompt, and none comes a second "
                "time; raise steps, lower task.limit, or set replay.fresh=1"
            )
        return found

    @model_validator(mode="after")
    def _the_loss_has_its_rewards(self) -> Config:
        if self.loss.kind in NEEDS_PREFIX_REWARDS and not self.task.reward.every_prefix:
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
        if isinstance(self.task, RandomNumber) and end > 1:
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
            if isinstance(self.loss, (Clipped, RLOO)) and share != 1:
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
