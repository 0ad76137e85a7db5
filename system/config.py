"""The whole run in one frozen tree. Imports pydantic and yaml only, so that a mistake is named before torch loads.

A YAML file gives the values, `key=value` on the command line overrides them, and a validator that compares two fields
states a property without which the run could not work.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

NEEDS_PREFIX_REWARDS = ("db", "subtb", "tb")
"""Losses whose pairs include states inside a trajectory, so that each needs a reward of its own."""


class ConfigError(ValueError):
    """The configuration cannot run. The message names the field, the value and the fix."""


class Section(BaseModel):
    """A typo in a key is an error, a section never changes, and the text below a field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yes_is_not_1(cls, values: Any) -> Any:
        """YAML reads `yes` and `on` as true, which pydantic would take for the number 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation is not bool:
                raise ValueError(f"{name}={value} is a truth value; give a number, or put a text in quotes")
        return values


# ------------------------------------------------------------------------------------------------ what is trained


class Model(Section):
    path: str = Field(default="packaged:smollm2-135m-instruct", min_length=1)
    """`packaged:NAME` (a model that comes with a Python package), a folder in Hugging Face format, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""


class Lora(Section):
    rank: int = Field(default=16, ge=1, le=512)
    alpha: float = Field(default=32.0, gt=0)
    """The update is (alpha / rank) * B A."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Names of the linear modules that are adapted, as PEFT takes them. There is no dropout: log q must be exact."""


# ---------------------------------------------------------------------------------------------------- the target


FUNCTION_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


class LMPosterior(Section):
    """log p(Z stop | X), plus log p(Y | X Z stop) where a prompt has evidence Y."""

    kind: Literal["lm_posterior"] = "lm_posterior"
    every_prefix: bool = True
    """False: where a trajectory ends alone, which saves the evidence at every other prefix; for `vargrad` or `pooled`."""


class FunctionReward(Section):
    """A python function `f(prompt: Prompt, text: str, tokens: list[int]) -> float` as log R = f / beta, in nats."""

    kind: Literal["function"] = "function"
    path: str = Field(pattern=FUNCTION_PATH)
    """Import path, `package.module:function`."""
    beta: float = Field(default=1.0, gt=0)
    """Strength of the pull towards the prior, as in p(Z | X) exp(r / beta)."""
    every_prefix: bool = False
    """True: called at each prefix that can stop. False: at the end alone, and only `vargrad` or `pooled` can learn."""


class ProductReward(Section):
    """The product of rewards: their logs add up. With `lm_posterior` and a verifier: p(Z | X) exp(r / beta)."""

    kind: Literal["product"] = "product"
    of: tuple[Annotated[LMPosterior | FunctionReward, Field(discriminator="kind")], ...] = Field(min_length=2)

    @property
    def every_prefix(self) -> bool:
        return all(factor.every_prefix for factor in self.of)


Reward = Annotated[LMPosterior | FunctionReward | ProductReward, Field(discriminator="kind")]


def _check_template(prompt: str, **values: object) -> None:
    """Raises ValueError for a prompt with anything else to fill in than `values`."""
    try:
        prompt.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        names = " and ".join(f"{{{name}}}" for name in values)
        raise ValueError(f"prompt={prompt!r}: only {names} can be filled in; write {{{{ and }}}} for braces") from error


class RandomNumber(Section):
    """An integer, uniform over low..high: the posterior is known exactly, so this task measures the method."""

    kind: Literal["random_number"] = "random_number"
    low: int = Field(default=0, ge=0)
    high: int = Field(default=100, ge=1, le=9999)
    prompt: str = Field(default="The following is a random integer drawn uniformly between {low} and {high}: ", min_length=1)
    """`{low}` and `{high}` are filled in."""
    stop: str = Field(default=".", min_length=1)
    """What ends a number: a text that is one token."""
    support: Literal["digits", "vocabulary"] = "digits"
    """What may be drawn before the stop. With `vocabulary`, as in the paper, what is a number has to be learned too."""
    floor: float = Field(default=-12.0, le=-10.0)
    """log R of anything that is not one of the numbers, nats. A number has log R = 0."""
    reward: Reward = FunctionReward(path="system.tasks.random_number:log_reward", every_prefix=True)
    """`system.tasks.random_number:paper_log_reward` is the paper's."""
    longest: int | None = Field(default=None, ge=1, le=16)
    """Most tokens of a draw; by default the digits of `high`."""

    @property
    def min_tokens(self) -> int:
        return 0

    @property
    def max_tokens(self) -> int:
        return self.longest or len(str(self.high))

    @model_validator(mode="after")
    def _an_interval(self) -> RandomNumber:
        if self.high <= self.low:
            raise ValueError(f"high={self.high} must be above low={self.low}; raise high or lower low")
        digits = len(str(self.high))
        if self.max_tokens < digits:
            raise ValueError(f"longest={self.longest} is too short for high={self.high}; raise longest to {digits}")
        _check_template(self.prompt, low=self.low, high=self.high)
        return self


class Drawn(Section):
    """Which prompts a run takes of a file, and how long what is drawn for them may be."""

    limit: int | None = Field(default=None, ge=1)
    """Take only this many prompts."""
    offset: int = Field(default=0, ge=0)
    """Skip this many prompts first."""
    min_tokens: int = Field(default=1, ge=0)
    max_tokens: int = Field(default=30, ge=1)

    @model_validator(mode="after")
    def _lengths(self) -> Drawn:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}: nothing can be drawn; lower min_tokens"
            )
        return self


class Sentence(Drawn):
    """What may be drawn where Z is one sentence."""

    stop: str = Field(default=".", min_length=1)
    """The end of a sentence: a text that is one token. Its log-probability is part of the reward."""
    illegal: tuple[str, ...] = (
        "\n", "\r", "\t", '"', "“", "”", "?", "!", ":", ";", "(", ")", "[", "]", "<", ">", "http", "www", ".",
    )  # fmt: skip
    """A token whose text contains one of these is outside the policy's support, as are special tokens."""
    reward: Reward = LMPosterior()


class NextSentence(Sentence):
    prompts: str = "packaged"
    """A UTF-8 text file with one prompt a line, or `packaged` for a small one that comes with the project."""


class Continuation(NextSentence):
    """The next sentence, from the tempered posterior p(Z . | X)^(1/T), with T from learner.reward_temperature."""

    kind: Literal["continuation"] = "continuation"


class Constrained(NextSentence):
    """The next sentence, from p(Z . | X) among those that satisfy all that is asked for."""

    kind: Literal["constrained"] = "constrained"
    keywords: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Words that must be there, in any order and case."""
    pattern: str | None = None
    """A regular expression that must be found in the sentence."""
    predicate: str | None = Field(default=None, pattern=FUNCTION_PATH)
    """Import path of a function `f(prompt: Prompt, text: str, tokens: list[int]) -> bool` that must be true."""
    floor: float = Field(default=-20.0, le=-5.0)
    """log c of a sentence that does not satisfy them, nats."""
    reward: Reward = ProductReward(
        of=(LMPosterior(), FunctionReward(path="system.tasks.constrained:log_constraint", every_prefix=True))
    )

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> Constrained:
        if not (self.keywords or self.pattern or self.predicate):
            raise ValueError("keywords, pattern and predicate are all empty: set one of them, or use kind=continuation")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r} is no regular expression: {error}") from error
        return self


class Infilling(Sentence):
    """The missing sentence Z of a story, from p(Z | X, Y) in proportion to p(X Z . Y): X is before it, Y after."""

    kind: Literal["infilling"] = "infilling"
    stories: str = "packaged"
    """JSONL: each line {"sentences": [texts]}, of which `gap` is left out, or {"before": text, "after": text}, with
    "middle" where it is known. `packaged` is a small file that comes with the project."""
    gap: int = Field(default=3, ge=1)
    """Number of the missing sentence, from 0."""
    prompt: str = Field(default="Beginning: {before}\nEnding: {after}\nMiddle:", min_length=1)
    """What the policy sees; `{before}` and `{after}` are filled in."""
    max_tokens: int = Field(default=25, ge=1)

    @model_validator(mode="after")
    def _a_text_to_fill_in(self) -> Infilling:
        _check_template(self.prompt, before="", after="")
        return self


class Verifiable(Drawn):
    """Answers that a program checks, from p(Z . | X) exp(r / beta): the reward is known at the end alone."""

    kind: Literal["verifiable"] = "verifiable"
    questions: str = "packaged"
    """JSONL, each line {"question": text, "answer": text or number}; `packaged` for all sums of two digits."""
    prompt: str = Field(default="Question: {question}\nAnswer:", min_length=1)
    """`{question}` is filled in."""
    max_tokens: int = Field(default=24, ge=1)
    stop: str = Field(default="\n", min_length=1)
    """The end of an answer: a text that is one token."""
    reward: Reward = ProductReward(of=(LMPosterior(), FunctionReward(path="system.tasks.verifiable:last_number", beta=0.1)))

    @model_validator(mode="after")
    def _a_question_to_fill_in(self) -> Verifiable:
        _check_template(self.prompt, question="")
        return self


class Arithmetic(Drawn):
    """Rationales that work out a sum with a calculator, from p(Z . "The answer is Y." | examples X)."""

    kind: Literal["arithmetic"] = "arithmetic"
    questions: str = "generated"
    """`generated`, or a JSON or JSONL file: {"question": "Question: 1 + 2 = ? Answer:", "answer": 3}, or the paper's files."""
    rationales: str | None = None
    """With questions from a file: a file of questions that have a "rationale" too."""
    split: Literal["train", "test"] = "train"
    """`test`: generated questions that are in no training set; from a file, those of `questions` without `rationales`."""
    operands: tuple[int, ...] = Field(default=(3, 4), min_length=1)
    """Generated questions have one of these numbers of operands."""
    test_operands: tuple[int, ...] | None = None
    """Of the test questions; by default as `operands`."""
    count: int = Field(default=1000, ge=1)
    """Generated questions."""
    worked: int = Field(default=50, ge=0)
    """Generated training questions that have a rationale."""
    examples: int = Field(default=3, ge=0)
    """Worked examples in front of every question, the first of those with a rationale."""
    min_tokens: int = Field(default=5, ge=0)
    max_tokens: int = Field(default=32, ge=1)
    """Actions: the calculator's tokens do not count."""
    tool_tokens: int = Field(default=24, ge=0)
    """Most tokens that the calculator writes into one sample."""
    reward: Reward = LMPosterior(every_prefix=False)

    @field_validator("operands", "test_operands")
    @classmethod
    def _few_operands(cls, operands: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if operands is not None and (not operands or not all(2 <= number <= 10 for number in operands)):
            raise ValueError("each number of operands must be from 2 to 10, as in [3, 4]")
        return operands


class Subjectivity(Drawn):
    """Texts with labels. `reason` trains a rationale Z towards p(Z, label | X); the other stages answer with a label.

    `label` answers from the text alone, and `predict` from the text and a rationale that an earlier run drew. Both imitate
    the records' labels with loss.kind=mle.
    """

    kind: Literal["subjectivity"] = "subjectivity"
    stage: Literal["reason", "label", "predict"] = "reason"
    records: str = "packaged"
    """JSONL: each line {"text": text, "label": one of `labels`, or its number from 0}, with "label_text" where a number is
    to be checked. `packaged` is a small file that comes with the project."""
    labels: tuple[Annotated[str, Field(min_length=1)], ...] = ("objective", "subjective")
    prompt: str = 'Classify this movie review as objective or subjective: "{text}" This review is'
    """What a rationale follows; `{text}` is filled in."""
    label_prompt: str = 'Classify this movie review as objective or subjective: "{text}" It is'
    """What a label follows without a rationale; `{text}` is filled in."""
    evidence: str = " so it is {label}."
    """What follows a rationale and its stop; `{label}` is filled in. Where the policy answers, its end is the stop."""
    rationales: str | None = None
    """JSONL that `deploy/evaluate.py` wrote of a `reason` run on these records: each line {"prompt": id, "text": Z}.
    Several rationales of a record become as many prompts, which vote on its label."""
    examples: int = Field(default=0, ge=0)
    """This many labelled records of `examples_from`, the first, stand in front of every prompt."""
    examples_from: str | None = None
    """A file such as `records`. A record is never among its own examples."""
    stop: str = Field(default=",", min_length=1)
    """The end of a rationale: a text that is one token. Its log-probability is part of the reward."""
    illegal: tuple[str, ...] = ("\n", "\r", "\t", '"', "“", "”", "?", "!", ":", ";", "(", ")", ".", ",")
    """A token whose text contains one of these is no part of a rationale, as are special tokens."""
    max_tokens: int = Field(default=5, ge=1)
    reward: Reward = LMPosterior()

    @model_validator(mode="after")
    def _texts_to_fill_in(self) -> Subjectivity:
        _check_template(self.prompt, text="")
        _check_template(self.label_prompt, text="")
        _check_template(self.evidence, label="")
        if self.evidence.format(label="") == self.evidence.format(label="x"):
            raise ValueError(f"evidence={self.evidence!r} is the same for every label; write {{label}} where the label belongs")
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(f"labels={list(self.labels)} must be two or more that differ")
        return self

    @model_validator(mode="after")
    def _files_are_there_for_what_needs_them(self) -> Subjectivity:
        if (self.stage == "predict") != bool(self.rationales):
            raise ValueError(
                f"stage={self.stage} with rationales={self.rationales!r}: stage=predict reads the rationales of an earlier "
                "run, and no other stage does; set both or neither"
            )
        if bool(self.examples) != bool(self.examples_from):
            raise ValueError(
                f"examples={self.examples} with examples_from={self.examples_from!r}: set how many and the file, or neither"
            )
        return self


Task = Annotated[
    RandomNumber | Continuation | Infilling | Constrained | Verifiable | Arithmetic | Subjectivity, Field(discriminator="kind")
]


# ------------------------------------------------------------------------------------------------- who makes data


class Exploration(Section):
    """How the samples of a group are drawn. GFlowNet losses need no correction for it, but must see the modes."""

    on_policy: float = Field(default=0.5, ge=0, le=1)
    """Share of each group that is drawn from the policy itself; the rest explores by the settings below."""
    epsilon: float = Field(default=0.0, ge=0, lt=1)
    """Exploring samples mix this share of uniform-over-the-support into every token."""
    temperature: tuple[float, float] = (0.5, 2.0)
    """Each exploring sample draws its softmax temperature uniformly from this interval."""

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
    """How a new version enters the engine: `merged` into the base weights, or as a LoRA `adapter`. auto: merged on CPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the engine. Merging into bfloat16 loses small updates."""
    reward_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen model that scores."""
    token_budget: int = Field(default=1024, ge=64)
    """Most tokens in one row of the scoring pass. The cost of attention grows with its square; a GPU takes more at once."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Sequences that the engine decodes at once."""
    kv_cache_mb: int = Field(default=512, ge=16)
    """Size of the engine's KV cache on CPU, MiB."""
    gpu_memory_utilization: float = Field(default=0.5, gt=0, le=1)
    """Share of a GPU that the engine takes."""
    groups_in_flight: int = Field(default=2, ge=1)
    """Groups that one sampler works on at once. Two or more leave no idle tail between groups."""
    canary_tolerance: float | None = Field(default=None, gt=0)
    """Largest mean difference, nats a token, between the engine's and the learner's log-probs of the canary.
    By default 0.005 if both compute in float32, else 0.15: bfloat16 alone makes about 0.05.
    What an update has to differ by to be proven to have arrived is this much, so it says little of early bfloat16 versions."""


class Actors(Section):
    count: int = Field(default=1, ge=1)
    """Number of sampler actors."""
    cpus: float = Field(default=1, ge=0)
    """CPUs reserved for each, and its number of threads (rounded down, at least one)."""
    gpus: float = Field(default=0, ge=0)
    """GPUs reserved for each; fractions share a GPU."""
    max_deaths: int = Field(default=3, ge=0)
    """The run stops after this many deaths of samplers without a group in between."""

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))


# ------------------------------------------------------------------------------------------------- who uses data


class Replay(Section):
    """Each update mixes fresh samples with replayed ones of the same prompt. Shares add up to 1."""

    capacity: int = Field(default=64, ge=1)
    """Distinct trajectories kept for each prompt."""
    fresh: float = Field(default=1.0, gt=0, le=1)
    prioritised: float = Field(default=0.0, ge=0, lt=1)
    """Drawn in proportion to exp(log R / prioritised_temperature)."""
    uniform: float = Field(default=0.0, ge=0, lt=1)
    prioritised_temperature: float = Field(default=1.0, gt=0)
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
    """λ: a pair of states d tokens apart weighs λ^(d-1)."""


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
    lr: float = Field(default=1e-3, gt=0)
    warmup_steps: int = Field(default=5, ge=0)
    """The learning rate rises linearly over these, from lr / (warmup_steps + 1): the first step is never at 0."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """After warm-up, down to lr * final_lr at the last step."""
    final_lr: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
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
    gradient_checkpointing: bool = False
    threads: int = Field(default=1, ge=1)
    cpus: float = Field(default=1, ge=0)
    """CPUs reserved for the learner."""
    gpus: float = Field(default=0, ge=0)
    """GPUs reserved for the learner."""
    publish_every: int = Field(default=1, ge=1)
    """Updates between two adapter versions."""
    max_staleness: int = Field(default=1, ge=0)
    """Largest number of updates between the adapter that drew a group and the update that uses it fresh. 0: synchronous."""
    checkpoint_every: int = Field(default=50, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    """Updates between two evaluations; by default before the first and after the last alone."""
    evaluation_prompts: int = Field(default=64, ge=1)
    """An evaluation takes this many prompts, evenly spaced, where there are more."""
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


# ---------------------------------------------------------------------------------------------- around the run


class Tracking(Section):
    uri: str = "sqlite:///mlflow.db"
    """MLflow tracking URI: a SQLite file, or a server."""
    experiment: str = Field(default="headwater", min_length=1)
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


class Config(Section):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Names the run in MLflow and its folder."""
    seed: int = Field(default=0, ge=0)
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
    tracking: Tracking = Tracking()
    cluster: Cluster = Cluster()

    @property
    def canary_tolerance(self) -> float:
        exact = self.sampler.dtype == self.learner.dtype == "float32"
        return self.sampler.canary_tolerance or (0.005 if exact else 0.15)

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
                    'sampler.exploration.on_policy=1 and "replay={fresh: 1, prioritised: 0, uniform: 0}"'
                )
        return self

    def check_lengths(self, context_length: int, longest_prompt: int) -> None:
        """Raises ConfigError if the longest prompt (tokens, evidence included) and task.max_tokens do not fit the model."""
        needed = longest_prompt + self.task.max_tokens + getattr(self.task, "tool_tokens", 0) + 1
        if needed > context_length:
            raise ConfigError(
                f"task.max_tokens={self.task.max_tokens}: with the longest prompt ({longest_prompt} tokens) and the stop token "
                f"{needed} tokens are needed, but {self.model.path} has a context of {context_length}; "
                "shorten task.max_tokens or the prompts"
            )

    def check_resources(self, cpus: float, gpus: float) -> None:
        """Raises ConfigError if the learner and all samplers together need more than a cluster has."""
        for kind, have in (("cpus", cpus), ("gpus", gpus)):
            each, own = getattr(self.actors, kind), getattr(self.learner, kind)
            needed = own + self.actors.count * each
            if needed > have + 1e-9:
                raise ConfigError(
                    f"actors.count={self.actors.count}: learner.{kind}={own:g} and {self.actors.count} x actors.{kind}={each:g}"
                    f" need {needed:g} {kind}, but the cluster has {have:g}; lower one of these"
                )


# ------------------------------------------------------------------------------------------------------ reading it


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["actors.count=2", "loss.kind=subtb"]` as a nested dict; a value is read as YAML.

    Raises:
        ConfigError: an entry without `=` or with an empty key, a value that is not YAML, or a field of a plain value.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            raise ConfigError(f"override {override!r} is not of the form key=value, such as actors.count=2")
        node = tree
        for name in names[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {name!r} was already set to a plain value; leave one of the two out")
        try:
            node[names[-1]] = yaml.safe_load(value)
        # ValueError: a date that is none, such as 2001-13-01.
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"override {override!r}: the value is not YAML ({_where(error)}); put it in quotes") from error
    return tree


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`. A section whose kind changes starts afresh: the old kind's fields mean nothing to it."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            result[key] = _merged(old, value)
        else:
            result[key] = value
    return result


class _UniqueKeys(yaml.SafeLoader):
    """A section that is written twice is an error: YAML itself would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is set twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _where(error: Exception) -> str:
    """What is wrong with a YAML text and where, on one line."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + (getattr(error, "problem", None) or str(error).splitlines()[0])


MESSAGES = {
    "extra_forbidden": "no such field; check the spelling (--dry-run prints all fields)",
    "missing": "must be set",
    "model_type": "must be a section, a mapping of fields; leave it out for the defaults",
    "model_attributes_type": "must be a section, a mapping of fields with a kind",
    "string_type": "must be a text; put it in quotes",
    "tuple_type": "must be a list, such as [a, b]",
}
"""By pydantic's type of error, where its own message does not say what to do."""


def _child(node: Any, part: int | str) -> Any:
    """What stands at `part` of a section or a list; None where nothing does."""
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, (list, tuple)) and isinstance(part, int) and part < len(node):
        return node[part]
    return None


def _field(location: Iterable[int | str], tree: Any) -> str:
    """A field as the user writes it: pydantic's location has the kind of a section and the branch of a union as well."""
    names: list[str] = []
    node: Any = tree
    for part in location:
        is_kind = isinstance(node, dict) and part not in node and part == node.get("kind")
        is_branch = isinstance(part, str) and not isinstance(node, dict)
        if not is_kind and not is_branch:
            names.append(str(part))
            node = _child(node, part)
    return ".".join(names)


def _kinds(union: Any) -> str:
    return ", ".join(section.model_fields["kind"].default for section in get_args(get_args(union)[0]))


def _readable(error: ValidationError, tree: dict[str, Any]) -> str:
    lines = []
    for problem in error.errors():
        kind, field, value = problem["type"], _field(problem["loc"], tree), problem["input"]
        message = MESSAGES.get(kind, problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be"))
        context = problem.get("ctx", {})
        about_section = isinstance(value, (dict, BaseModel)) and (kind == "value_error" or kind.startswith("union_tag"))
        shown = "" if about_section or kind == "missing" else f"={_short(repr(value))}"
        if kind == "union_tag_invalid":
            field, shown = f"{field}.kind", f"={context['tag']!r}"
            message = f"must be one of {context['expected_tags']}"
        elif kind == "union_tag_not_found" or (kind == "missing" and field == "task"):
            union = {"task": Task, "loss": Loss}.get(field, Reward)
            field, message = f"{field}.kind", f"must be set, to one of {_kinds(union)}"
        lines.append(f"{field or 'config'}{shown}: {message}")
    return "\n".join(lines)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}…"


def parse(tree: Any) -> Config:
    """A nested dict as a Config. Raises ConfigError, one line for each field that is wrong."""
    if not isinstance(tree, dict):
        raise ConfigError(f"a config is a mapping of sections, not {type(tree).__name__}")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_readable(error, tree)) from error


def load(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, lays the overrides on it, and validates the result.

    Raises:
        ConfigError: the file is missing, not UTF-8 or not YAML, or a value is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(
            f"config {str(path)!r} cannot be read: {error.strerror}; name a YAML file, such as one of deploy/configs"
        ) from error
    try:
        tree = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"config {str(path)!r} is not YAML ({_where(error)}); correct it there") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config {str(path)!r} is a {type(tree).__name__}, but must be a mapping of sections")
    return parse(_merged(tree, parse_overrides(overrides)))


def dump(config: Config) -> str:
    """The resolved config as YAML, which `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(config: Config) -> dict[str, Any]:
    """`{"learner.lr": 0.001, ...}`: the leaves of the tree, for a tracker."""

    def leaves(prefix: str, node: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from leaves(f"{prefix}.{key}" if prefix else key, value)
        elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
            yield from leaves(prefix, {str(index): item for index, item in enumerate(node)})
        else:
            yield prefix, node

    return dict(leaves("", config.model_dump(mode="json")))
