"""The sections of a config that say who makes the data, and how: exploration, the engine, the actors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from system.section import Section


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
    drain: bool = False
    """True: a sampler finishes what it draws before it takes a version, so that each group is of one version. Else it takes it
    at the next token: what is being drawn goes on by its own adapter (beside the base two versions draw at a time, and a third
    waits) or, where versions are merged, by the new weights. No loss minds, since the learner computes log q itself, and those
    with ratios know the log-prob that each token was drawn with."""
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    """Of weights that are merged in bfloat16. To the nearest, small updates are lost; `stochastic` keeps them on average."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the engine."""
    reward_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen model that scores."""
    token_budget: int | None = Field(default=None, ge=64)
    """Most tokens in one row of the scoring pass, by default 16,384 with block attention (learner.attention), and 1,024 with
    dense masks, with which the cost of attention grows with a row's square."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Sequences that the engine decodes at once."""
    kv_cache_mb: int = Field(default=512, ge=16)
    """Size of the engine's KV cache, MiB, on a CPU and on a GPU that it shares (actors.gpus=0.5, say): of a GPU of its own it
    takes what gpu_memory_utilization leaves."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of a whole GPU that the engine takes, and that must be free when it starts; by default half of actors.gpus. The
    frozen model that scores is beside it."""
    enforce_eager: bool = True
    """False, on a GPU: vLLM compiles the model and records CUDA graphs, for which it starts more slowly and draws faster."""
    max_reward_faults: int = Field(default=100, ge=0)
    """Samples for which the reward raises, hangs or gives no finite number are left out of their groups and counted.
    The run stops when more than this many of its last 10,000 samples are such."""
    canary_tolerance: float | None = Field(default=None, gt=0)
    """Largest difference, nats, between the engine's and the learner's log-probs of the canary's tokens: their mean if both
    compute in float32, else their median, since bfloat16 may be nats off at a token whatever the weights are. By default 0.005
    and 0.15: bfloat16 alone makes about 0.05.
    A smaller update cannot be proven to have arrived, as early ones in bfloat16 often are."""

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
    """The run stops after more than this many deaths in a row: of samplers without a group in between or over the same group,
    or of the learner without a checkpoint in between."""
    answer_seconds: float = Field(default=300.0, gt=0)
    """A busy sampler without progress (an answer, a token, a call of its reward) for this long is killed and replaced; an idle
    one is asked for a sign of life as often. Long enough to install the first version, to compile kernels, and for a call of
    the reward."""
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
