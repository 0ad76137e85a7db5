"""A sampler with its reward, from the config of a run and the problem of its task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase

from actors import rewards
from actors.engine import Engine
from actors.sampler import Sampler
from actors.settings import EngineSettings
from system.config import Config, ConfigError
from system.language_model import LanguageModel
from system.models import context_length, locate
from system.pretrained import load_pretrained, load_tokenizer, resolve_device
from system.reward_config import at_ends
from system.tasks.problem import Outline, Problem
from system.text import decode

SHORTEST_CONTEXT = 128
"""Tokens that an engine holds at least where the model does, so that an adapter's canary fits."""


def build_reward(
    config: Config, problem: Problem | Outline, tokenizer: PreTrainedTokenizerBase, model: LanguageModel | None
) -> rewards.Reward:
    """At the prefixes that the loss makes use of. Raises ConfigError if a function of the config cannot be imported."""
    return rewards.build(
        config.task.reward if config.loss.prefix_rewards != "unused" else at_ends(config.task.reward),
        model=model,
        stop=problem.reward_stop,
        decode=lambda tokens: decode(tokenizer, tokens),
        token_budget=config.sampler.token_budget,
        may_stop=problem.constraints.can_stop,
        evidences=problem.evidences,
    )


def engine_settings(config: Config, problem: Problem | Outline, context_length: int) -> EngineSettings:
    """Those of a run, for the longest prompt and sample of its problem, on a model with a context of so many tokens."""
    section = config.sampler
    install = section.install
    if install == "auto":
        install = "adapter" if torch.cuda.is_available() and section.dtype == "bfloat16" else "merged"
    needed = problem.longest_prompt + problem.constraints.longest
    return EngineSettings(
        max_model_len=min(context_length, max(SHORTEST_CONTEXT, needed)),
        install=install,
        drain=section.drain,
        rounding=section.rounding,
        dtype=section.dtype,
        max_num_seqs=section.max_num_seqs,
        enforce_eager=section.enforce_eager,
        kv_cache_mb=section.kv_cache_mb,
        gpu_memory_utilization=config.gpu_memory_utilization,
        shares_gpu=config.actors.gpus % 1 > 0,
        canary_tolerance=config.canary_tolerance,
        canary_by_mean=config.canary_by_mean,
        max_lora_rank=config.lora.rank,
        threads=config.actors.threads,
        seed=config.seed,
    )


def build_sampler(config: Config, problem: Problem | Outline, on_death: Callable[[], None] = lambda: None) -> Sampler:
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
    settings = engine_settings(config, problem, context_length(folder))
    arguments = folder, config.model.path, problem.constraints, settings, problem.tool
    try:
        return Sampler(lambda: Engine(*arguments), reward, on_death)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"model.path={config.model.path!r} cannot be run by vLLM with the settings of sampler: {error}"
        ) from error
