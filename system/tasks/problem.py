"""What a task gives to the system, whatever it is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from system.config import ConfigError
from system.constraints import Constraints
from system.text import decode, special_tokens
from system.tools import Tool
from system.trajectory import Prompt, Trajectory, sampled


@dataclass(frozen=True, eq=False)
class Outline:
    """What samplers and the learner know of a problem beforehand. Prompts come with what is asked of them."""

    constraints: Constraints
    reward_stop: tuple[int, ...]
    tool: Tool | None
    evidences: Mapping[str, tuple[tuple[int, ...], ...]]
    longest_prompt: int
    canary: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """Prompts to sample for, and the support of what may be sampled."""

    prompts: tuple[Prompt, ...]
    constraints: Constraints
    reward_stop: tuple[int, ...]
    """What the frozen model scores between Z and the evidence Y: the end of a sentence, say."""
    outcomes: tuple[Trajectory, ...] | None = None
    """Every outcome that the target gives mass worth counting, where they can be listed; the same for all prompts."""
    log_target_O: np.ndarray | None = None
    """float64 [O]: normalised log-probability of each outcome under the target, nats."""
    demonstrations: Mapping[str, tuple[Trajectory, ...]] = field(default_factory=dict)
    """Prompt id -> samples that are known to be good, and that the policy could draw: a story's own sentence, a worked
    rationale. What `loss.kind=mle` imitates and `replay.demonstrations` starts the buffer with."""
    undrawable: int = 0
    """Demonstrations that are left out: too long for the policy to draw, or with tokens that are not allowed."""
    why_undrawable: str = ""
    """Of the first of them."""
    held_out: frozenset[str] = frozenset()
    """Ids of prompts that are for evaluations alone."""
    exact: frozenset[str] = frozenset()
    """Ids of prompts whose demonstration is an exact sample of p(Z . Y | X), such as stories that the model told itself."""
    tool: Tool | None = None
    """Writes into samples while they are drawn, at most `constraints.tool_tokens` tokens each."""
    alternatives: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Prompt id -> the evidences Y that its own stands against: those of other labels. In evaluations each sample Z votes
    for the evidence that the frozen model finds likeliest after it."""
    choices: tuple[Trajectory, ...] = ()
    """Where the policy answers: all that it may say, the same for all prompts; a prompt's demonstration is what is right.
    Evaluations ask for the likeliest choice; prompts of the same meta["record"] vote."""
    judge: Callable[[Prompt, Sequence[str], Sequence[Sequence[int]], int], dict[str, float]] | None = None
    """Scores K on-policy samples of one prompt, their texts and tokens, by what the task is about: accuracy, overlap, validity.
    The last argument is how many more were drawn whose reward could not be had: no answer, and so wrong ones. K may be 0 then.
    A function of a module, since it travels between processes. Evaluations log the means over prompts as task/…."""

    @property
    def trained(self) -> tuple[Prompt, ...]:
        """What samplers and demonstrations are asked for in training."""
        return tuple(prompt for prompt in self.prompts if prompt.id not in self.held_out)

    @property
    def evaluated(self) -> tuple[Prompt, ...]:
        """What an evaluation is on: what is held out, or everything where nothing is."""
        return tuple(prompt for prompt in self.prompts if prompt.id in self.held_out) or self.prompts

    def record(self, prompt: Prompt) -> str:
        """What the prompts that vote together have in common; a prompt's own id where none does."""
        return prompt.meta.get("record", prompt.id) if self.choices else prompt.id

    def holding_out(self, count: int) -> Problem:
        """The same with the last `count` records held out. Raises ConfigError if that leaves nothing to train on."""
        records = list(dict.fromkeys(map(self.record, self.prompts)))
        if count >= len(records):
            raise ConfigError(f"task.held_out={count} leaves nothing of {len(records)} prompts to train on; lower it")
        last = set(records[len(records) - count :])
        return replace(self, held_out=frozenset(prompt.id for prompt in self.prompts if self.record(prompt) in last))

    @property
    def outline(self) -> Outline:
        """What actors are sent: no prompts, but for the evidences of those that have several."""
        return Outline(self.constraints, self.reward_stop, self.tool, self.evidences, self.longest_prompt, self.canary)

    @property
    def canary(self) -> tuple[int, ...]:
        """Tokens that show whether an adapter is the one that was published: the first prompt's."""
        return self.prompts[0].policy_tokens + self.prompts[0].reward_tokens

    @property
    def evidences(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Prompt id -> its own evidence and the alternatives, of the prompts that have some."""
        return {p.id: (p.evidence_tokens or (), *self.alternatives[p.id]) for p in self.prompts if p.id in self.alternatives}

    @property
    def lengths(self) -> dict[str, int]:
        """Prompt id -> tokens of the longest context that a model has to hold besides Z."""

        def scored(prompt: Prompt) -> int:
            evidences = prompt.evidence_tokens or (), *self.alternatives.get(prompt.id, ())
            return len(prompt.reward_tokens) + len(self.reward_stop) + max(map(len, evidences))

        return {prompt.id: max(len(prompt.policy_tokens), scored(prompt)) for prompt in self.prompts}

    @property
    def longest_prompt(self) -> int:
        """The largest of `lengths`."""
        return max(self.lengths.values())


def demonstrated(
    samples: Mapping[str, Sequence[Sequence[int]]], constraints: Constraints, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Those fields of a problem, from tokens of known good samples, without their stop, by prompt id."""
    kept: dict[str, list[Trajectory]] = {}
    refused: list[tuple[str, Sequence[int]]] = []
    for name, tokens_K in samples.items():
        for tokens in tokens_K:
            if constraints.admits(tokens):
                kept.setdefault(name, []).append(sampled(tokens, max_tokens=constraints.max_tokens))
            else:
                refused.append((name, tokens))
    return {
        "demonstrations": {name: tuple(samples_K) for name, samples_K in kept.items()},
        "undrawable": len(refused),
        "why_undrawable": why_undrawable(*refused[0], constraints, tokenizer) if refused else "",
    }


def why_undrawable(name: str, tokens: Sequence[int], constraints: Constraints, tokenizer: PreTrainedTokenizerBase) -> str:
    """What keeps the policy from drawing these tokens for prompt `name`."""
    shown = f"{name!r}, {decode(tokenizer, tokens)!r}"
    for token in tokens:
        if not constraints.allows([token]):
            is_stop = token == constraints.stop_token
            what = "is task.stop, which ends a sample" if is_stop else "may not be drawn (task.illegal, or a special token)"
            return f"{shown}: the token {decode(tokenizer, [token])!r} {what}"
    if not constraints.min_tokens <= len(tokens) <= constraints.max_tokens:
        within = f"task.min_tokens={constraints.min_tokens} and task.max_tokens={constraints.max_tokens}"
        return f"{shown}: {len(tokens)} tokens are not between {within}"
    return f"{shown}: it is without what task.guided=true puts into every sample"


def completions(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, stop: str, where: str) -> list[list[int]]:
    """Tokens, without the stop, of what a record, as `files.joined` has it, calls known good samples of its prompt. Raises
    ConfigError for what are no texts."""
    texts = record.get("completions", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f'{where}: "completion" is a text, and "completions" a list of texts')
    return [tokenizer.encode(text.removesuffix(stop), add_special_tokens=False) for text in texts]


def support(section: Any, tokenizer: PreTrainedTokenizerBase, stop: int, allowed: Sequence[int] | np.ndarray) -> Constraints:
    """What a config section lets the policy draw: its lengths, the allowed tokens and the stop.

    Raises:
        ConfigError: the section's `illegal` leaves nothing but the stop.
    """
    if hasattr(section, "illegal") and np.isin(allowed, [stop]).all():
        raise ConfigError(f"task.illegal={list(section.illegal)} leaves no token of this tokenizer to draw; remove some of it")
    return Constraints.of(
        stop_token=stop,
        min_tokens=section.min_tokens,
        max_tokens=section.max_tokens,
        vocab_size=len(tokenizer),
        allowed=allowed,
        tool_tokens=getattr(section, "tool_tokens", 0),
    )


def single_token(tokenizer: PreTrainedTokenizerBase, text: str, field: str) -> int:
    """The id of a text that is one token where it follows a letter. Raises ConfigError naming the field otherwise."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    # At the start of a text some tokenizers put a space of their own in front, which makes it another token.
    letter, both = encode("a"), encode(f"a{text}")
    ids = both[len(letter) :] if both[: len(letter)] == letter else encode(text)
    if len(ids) != 1:
        pieces = [tokenizer.decode([token]) for token in ids]
        raise ConfigError(
            f"{field}={text!r} is {len(ids)} tokens for this tokenizer, {pieces}: it must be exactly one; take one of "
            "them, or another text"
        )
    return ids[0]


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The vocabulary without its special tokens."""
    special = special_tokens(tokenizer)
    return [token for token in range(len(tokenizer)) if token not in special]


def context_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """A context as the model expects it: with the tokenizer's own beginning-of-sequence token, if it has one, once, and with
    no end-of-sequence token but one that is in the text. Raises ConfigError for a text without a token."""
    written = tokenizer.encode(text, add_special_tokens=False)
    begun = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    ids = written if begun else tokenizer.encode(text, add_special_tokens=True)
    if ids[-1:] == [tokenizer.eos_token_id] and ids[-len(written) :] != written:
        ids = ids[:-1]
    if not ids:
        raise ConfigError(f"prompt {text!r} is no token for this tokenizer, and a policy needs one to go on from")
    return tuple(ids)


def chat_context(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], where: str) -> tuple[str, tuple[int, ...]]:
    """(text, tokens) of a conversation as the tokenizer's chat template writes it, up to where the assistant answers, or goes
    on where the last message is its own.

    Raises:
        ConfigError: there is no template, or it does not take these messages; `where` says whose they are.
    """
    try:
        begun = messages[-1]["role"] == "assistant"
        text = str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
            )
        )
    # A border: a template is a program of the model's, and raises what it likes.
    except Exception as error:
        raise ConfigError(f"{where}: the model's chat template does not take it: {error}") from error
    # The template has written all special tokens.
    return text, tuple(tokenizer.encode(text, add_special_tokens=False))
