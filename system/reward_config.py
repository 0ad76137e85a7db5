"""The sections of a config that say in proportion to what is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from system.section import Section

FUNCTION_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


def _is_no_file(path: str) -> str:
    module, _, function = path.partition(":")
    if module.endswith(".py"):
        raise ValueError(f"must be a module and not a file; leave .py out: {module.removesuffix('.py')}:{function}")
    return path


FunctionPath = Annotated[str, Field(pattern=FUNCTION_PATH), AfterValidator(_is_no_file)]


class LMPosterior(Section):
    """log p(Z stop | X), plus log p(Y | X Z stop) where a prompt has evidence Y."""

    kind: Literal["lm_posterior"] = "lm_posterior"
    every_prefix: bool = True
    """False: where a trajectory ends alone, which saves the evidence at every other prefix; for `vargrad` or `pooled`."""

    @property
    def name(self) -> str:
        return self.kind

    @property
    def unit(self) -> float:
        """It is reported in nats."""
        return 1.0


class FunctionReward(Section):
    """A python function `f(prompt: Prompt, text: str, tokens: list[int]) -> float` as log R = f / beta, in nats."""

    kind: Literal["function"] = "function"
    path: FunctionPath
    """Import path, `package.module:function`."""
    beta: float = Field(default=1.0, gt=0)
    """Strength of the pull towards the prior, as in p(Z | X) exp(r / beta)."""
    every_prefix: bool = False
    """True: called at each prefix that can stop. False: at the end alone, and only `vargrad` or `pooled` can learn."""
    batch: bool = False
    """True: called once for all of a group, `f(prompt, texts, tokens) -> list[float]` with a list of texts and one of their
    tokens, as a reward model computes them or a judge is asked, many at a time."""
    seconds: float | None = Field(default=10.0, gt=0)
    """Longest time of a call. The function runs in a process of its own, which is ended when a call takes longer.
    null: in the sampler's process and without a limit, for a function that is known to end."""
    start_seconds: float = Field(default=120.0, gt=0)
    """Longest wait until that process has imported it; what it needs, such as a model, may be loaded then."""
    concurrency: int = Field(default=1, ge=1)
    """Such processes in each sampler, for as many samples of a group at a time: for a judge that is waited for."""

    @model_validator(mode="after")
    def _there_are_calls_and_processes_to_share(self) -> FunctionReward:
        if self.concurrency > 1 and (self.batch or self.seconds is None):
            what = "batch=true is one call for a group" if self.batch else "seconds=null is without a process of its own"
            raise ValueError(f"concurrency={self.concurrency} shares calls out over processes, but {what}; set concurrency=1")
        return self

    @property
    def name(self) -> str:
        return self.path.partition(":")[2]

    @property
    def unit(self) -> float:
        """It is reported as the function returned it."""
        return self.beta


class ContrastReward(Section):
    """(p(Y | X Z stop) / Σ p(Y' | X Z stop))^power, over the evidence Y and those of the task's other labels: how well Z tells
    the label. Beside `lm_posterior` it sharpens a likelihood that is too soft for the label to matter to Z."""

    kind: Literal["contrast"] = "contrast"
    power: float = Field(default=1.0, gt=0)
    """1 for the share itself; more sharpens it."""
    every_prefix: bool = True
    """As of `lm_posterior`."""

    @property
    def name(self) -> str:
        return self.kind

    @property
    def unit(self) -> float:
        """It is reported as the log of the share itself, in nats."""
        return 1 / self.power


Factor = Annotated[LMPosterior | FunctionReward | ContrastReward, Field(discriminator="kind")]


class ProductReward(Section):
    """The product of rewards: their logs add up. With `lm_posterior` and a verifier: p(Z | X) exp(r / beta)."""

    kind: Literal["product"] = "product"
    of: tuple[Factor, ...] = Field(min_length=2)
    """The factors."""

    @property
    def every_prefix(self) -> bool:
        return all(factor.every_prefix for factor in self.of)

    @property
    def contrasts(self) -> bool:
        return any(isinstance(factor, ContrastReward) for factor in self.of)


Reward = Annotated[LMPosterior | FunctionReward | ProductReward, Field(discriminator="kind")]


def factors(reward: Reward, field: str = "task.reward") -> Iterator[tuple[str, Factor]]:
    """(its field in a config, a factor) of each."""
    if isinstance(reward, ProductReward):
        yield from ((f"{field}.of.{at}", factor) for at, factor in enumerate(reward.of))
    else:
        yield field, reward


def names(reward: ProductReward) -> list[str]:
    """What its factors are called where they are reported: by their kind or function, with their place where two have one
    name."""
    called = [factor.name for factor in reward.of]
    return [name if called.count(name) == 1 else f"{at}.{name}" for at, name in enumerate(called)]


def functions_at_every_prefix(reward: Reward) -> FunctionReward | ProductReward | None:
    """The part of a reward that is known at every prefix and asks no model; None where there is none."""
    functions = [f for _, f in factors(reward) if isinstance(f, FunctionReward) and f.every_prefix]
    return ProductReward(of=tuple(functions)) if len(functions) > 1 else functions[0] if functions else None


R = TypeVar("R", bound=LMPosterior | FunctionReward | ContrastReward | ProductReward)


def at_ends(reward: R) -> R:
    """The same reward, computed where a sample ends alone."""
    ends = {"every_prefix": False}
    if isinstance(reward, ProductReward):
        return reward.model_copy(update={"of": tuple(factor.model_copy(update=ends) for factor in reward.of)})
    return reward.model_copy(update=ends)
