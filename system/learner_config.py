"""The sections of a config that say what the data is used for: replay, the losses, the learner."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from system.section import Section

DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"


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


class LossSection(Section):
    prefix_rewards: ClassVar[Literal["needed", "used", "unused"]] = "unused"
    """Whether the loss learns from rewards inside a trajectory: it cannot do without, or does where there are some."""


class Pooled(LossSection):
    prefix_rewards = "used"
    kind: Literal["pooled"] = "pooled"


class VarGrad(LossSection):
    kind: Literal["vargrad"] = "vargrad"


class TrajectoryBalance(LossSection):
    prefix_rewards = "needed"
    kind: Literal["tb"] = "tb"


class DetailedBalance(LossSection):
    prefix_rewards = "needed"
    kind: Literal["db"] = "db"


class SubTB(LossSection):
    prefix_rewards = "needed"
    kind: Literal["subtb"] = "subtb"
    decay: float = Field(default=1.0, gt=0, le=1)
    """λ: a pair of states of one sample weighs λ^(d-1), d counting the states from one to the other that can stop."""


class PolicyGradient(LossSection):
    """What GRPO, PPO and RLOO share: they maximise the reward instead of sampling in proportion to it, from own samples."""

    kl: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence to the base model."""


class Clipped(PolicyGradient):
    clip: float = Field(default=0.2, gt=0, lt=1)
    """Ratios to the policy that drew a sample count within 1 ± clip."""


class GRPO(Clipped):
    """A baseline: advantages are standardised within the group, and each trajectory weighs the same."""

    kind: Literal["grpo"] = "grpo"


class PPO(Clipped):
    """A baseline, as GRPO, with the KL inside the reward and every action of a group weighing the same."""

    kind: Literal["ppo"] = "ppo"


class RLOO(PolicyGradient):
    """A baseline, as GRPO: REINFORCE with the other samples of the group as its baseline."""

    kind: Literal["rloo"] = "rloo"


class MLE(LossSection):
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
    """Groups that make one update. Those of one prompt are one tree; the loss is the mean over prompts."""
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
    device: str = Field(default="auto", pattern=DEVICE)
    """auto: CUDA where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base weights and activations. LoRA weights are kept, and the loss computed, in float32."""
    token_budget: int = Field(default=2048, ge=64)
    """Most tokens of one micro-batch: the trees of an update are packed into rows of this length, with which memory grows.
    What an update has of one prompt, replayed samples included, is cut where it is more, for one forward pass more; with
    `shard_base` it is a row of its own. A row has the tokens of one sample at least, and as many as its prompt."""
    logits_chunk: int = Field(default=256, ge=1)
    """Positions whose logits exist at one time; twice as many where a baseline with `kl` asks the base too."""
    attention: Literal["auto", "dense", "block"] = "auto"
    """Of the learner and of the frozen model that scores: a mask for each pair of a row's tokens (`dense`; on a CPU what nobody
    sees is left out), or FlexAttention over the blocks of the prefix trees (`block`). auto: block on CUDA where it works, which
    is logged where it does not."""
    gradient_checkpointing: bool = False
    """Keep no activations of a layer for the backward pass and compute them again: less memory, a third more work."""
    ranks: int = Field(default=1, ge=1)
    """Processes that share the groups of an update (data parallel); what they learn is what one would."""
    shard_base: bool = False
    """Keep each frozen layer in shards over the ranks, for a base model that does not fit one GPU."""
    threads: int | None = Field(default=None, ge=1)
    """Of each rank; by default as many as cpus (rounded down, at least one)."""
    cpus: float = Field(default=1, ge=0)
    """CPUs reserved for each rank."""
    gpus: float = Field(default=0, ge=0)
    """GPUs reserved for each rank."""
    publish_every: int = Field(default=4, ge=1)
    """Updates between two adapter versions."""
    max_staleness: int = Field(default=6, ge=0)
    """Most updates that an adapter may be behind when the group it draws is used: no group is asked for that would exceed it.
    0: synchronous. A slow group may still come older: it is counted, and used, but by policy gradients, which drop it."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Updates between two checkpoints: at most so many are done again after a fault."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """The newest checkpoints are kept: at least two, so that a damaged one has another before it; more for `--step N` of the
    commands that use a run."""
    answer_seconds: float = Field(default=1800.0, gt=0)
    """A learner that answers a call with nothing for this long is killed, and made again from the last checkpoint and the
    batches since. It has to allow for the slowest update, the scores of an evaluation, and the first kernels to compile."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Updates between two evaluations; by default before the first and after the last alone."""
    evaluation_prompts: int = Field(default=64, ge=1)
    """Most prompts of an evaluation, evenly spaced; where prompts vote for a record, most records."""
    evaluation_samples: int = Field(default=32, ge=2)
    """On-policy samples of each prompt in an evaluation, where the outcomes cannot be listed."""

    @property
    def thread_count(self) -> int:
        return self.threads or max(1, int(self.cpus))

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
                f"no sample would be fresh enough between two versions; set max_staleness >= {self.publish_every - 1} or "
                f"publish_every <= {self.max_staleness + 1}"
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
            if self.device == "cpu" and self.gpus:
                raise ValueError(f"gpus={self.gpus:g} would be reserved for device=cpu; set gpus=0, or device=auto")
            if self.gpus > 1:
                raise ValueError(
                    f"gpus={self.gpus:g} would be reserved for one rank, which computes on one; for several GPUs set "
                    f"ranks={int(self.gpus)} and gpus=1"
                )
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
