"""A sampler with its reward, from the config of a run and the problem of its task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase

from actors import rewards
from actors.sampler import Sampler
from system.config import Config, ConfigError
from system.language_model import LanguageModel
from system.learner_config import USES_PREFIX_REWARDS
from system.models import locate
from system.pretrained import load_pretrained, load_tokenizer, resolve_device
from system.reward_config import at_ends
from system.tasks.problem import Problem
from system.text import decode


def build_reward(
    config: Config, problem: Problem, tokenizer: PreTrainedTokenizerBase, model: LanguageModel | None
) -> rewards.Reward:
    """At the prefixes that the loss makes use of. Raises ConfigError if a function of the config cannot be imported."""
    return rewards.build(
        config.task.reward if config.loss.kind in USES_PREFIX_REWARDS else at_ends(config.task.reward),
        model=model,
        stop=problem.reward_stop,
        decode=lambda tokens: decode(tokenizer, tokens),
        token_budget=config.sampler.token_budget,
        min_tokens=problem.constraints.min_tokens,
        evidences=problem.evidences,
    )


def build_sampler(config: Config, problem: Problem, on_death: Callable[[], None] = lambda: None) -> Sampler:
    """Loads the engine, and the frozen model too if the reward needs one.

    Raises:
        ConfigError: the model or the reward of the config cannot be had, or vLLM cannot run the model with these settings.
    """
    folder = locate(config.model)
    tokenizer = load_tokenizer(folder)
    model = None
    # Where none is reserved for it, an actor sees them all: those of the learner and of others.
    device = resolve_device("auto" if config.actors.gpus else "cpu", config.actors.gpus)
    if rewards.needs_language_model(config.task.reward):
        base = load_pretrained(folder, getattr(torch, config.sampler.reward_dtype), device)
        model = LanguageModel(base, attention=config.learner.attention)
    reward = build_reward(config, problem, tokenizer, model)
    try:
        return Sampler.build(
            config, folder, problem.constraints, reward,
            longest_prompt=problem.longest_prompt, tool=problem.tool, on_death=on_death,
        )  # fmt: skip
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"model.path={config.model.path!r} cannot be run by vLLM with the settings of sampler: {error}"
        ) from error
