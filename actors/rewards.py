"""log R at every prefix: the frozen model's posterior, a python function, and products of them.

A reward scores a group at once, since the samples of a prompt share prefixes. Entry t of its result is the untempered
log R, in nats, of stopping after t tokens; NaN where it has none. Samples that cannot be scored are named by a RewardError,
which has the log R of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from system.config import ConfigError
from system.function_process import FunctionProcesses
from system.functions import import_function
from system.language_model import LanguageModel
from system.log_rewards import LogRewards
from system.prefix_tree import Packed, PrefixTree, rows_by_budget
from system.reward_config import (
    ContrastReward,
    Factor,
    FunctionReward,
    LMPosterior,
    ProductReward,
    at_ends,
    factors,
    names,
)
from system.reward_error import RewardError, tolerated
from system.trajectory import Prompt, Trajectory


class Reward(Protocol):
    @property
    def tokens_forwarded(self) -> int:
        """Tokens that a model has computed for it since the start."""
        ...

    @property
    def progress(self) -> int:
        """Grows while it scores: tokens that a model has computed, calls that came back."""
        ...

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> list[np.ndarray]:
        """K arrays float64 [T + 1]. Raises RewardError."""
        ...


class Posterior:
    """log p(Z stop | X), plus log p(Y | X Z stop) where the prompt has evidence Y, under the frozen model.

    One packed pass: each distinct prefix once, and a branch with the stop and Y after each of them, in place of T + 1
    passes. A group that does not fit the token budget is several rows, which go on from one reading of X where the model
    can. `tokens_forwarded` counts what that costs.
    """

    def __init__(self, model: LanguageModel, stop: Sequence[int], token_budget: int = 1024, every_prefix: bool = True) -> None:
        """Without `every_prefix`, log R is known where a trajectory of the group ends, and NaN elsewhere."""
        self.model = model
        self.every_prefix = every_prefix
        self.stop = tuple(stop)
        self.token_budget = token_budget
        self.tokens_forwarded = 0

    @property
    def progress(self) -> int:
        return self.tokens_forwarded

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> list[np.ndarray]:
        suffix = self.stop + tuple(prompt.evidence_tokens or ())
        read, context = prompt.reward_tokens, None
        parts = self._parts(len(read), trajectories_K, suffix)
        if len(parts) > 1 and len(read) > 1 and (context := self.model.read(read[:-1])) is not None:
            self.tokens_forwarded += context.length
            read = read[-1:]
            parts = self._parts(len(read), trajectories_K, suffix)
        pieces = [Packed.of(tree, read, suffix, self._branches(tree, suffix)) for tree, _ in parts]
        result: list[np.ndarray] = [np.zeros(0)] * len(trajectories_K)
        for row in rows_by_budget([len(piece) for piece in pieces], self.token_budget):
            self.tokens_forwarded += sum(len(pieces[index]) for index in row)
            for index, (edge_N, suffix_N) in zip(row, self.model.score([pieces[index] for index in row], context), strict=True):
                tree, members = parts[index]
                for k, nodes_T in zip(members, tree.nodes_K, strict=True):
                    result[k] = np.cumsum(edge_N[nodes_T]) + (suffix_N[nodes_T] if suffix else 0.0)
        return result

    def _branches(self, tree: PrefixTree, suffix: tuple[int, ...]) -> np.ndarray | None:
        return None if self.every_prefix or not suffix else tree.is_end_N

    def _parts(
        self, before: int, trajectories_K: Sequence[Trajectory], suffix: tuple[int, ...]
    ) -> list[tuple[PrefixTree, list[int]]]:
        """The group as one tree, or as several with neighbouring samples where one would not fit the token budget with the
        `before` tokens that it begins with. Rows that each begin with a long prompt hold as many tokens of samples at least:
        it would be read for nearly every sample."""
        order = sorted(range(len(trajectories_K)), key=lambda k: trajectories_K[k].tokens_T.tolist())
        tree = PrefixTree.of([trajectories_K[k] for k in order])
        branches = len(tree) if self.every_prefix else len(order)
        tokens = before + len(tree) + branches * max(0, len(suffix) - 1)
        if tokens <= max(self.token_budget, 2 * before) or len(order) == 1:
            return [(tree, order)]
        half = len(order) // 2
        parts = []
        for members in (order[:half], order[half:]):
            for subtree, inner in self._parts(before, [trajectories_K[k] for k in members], suffix):
                parts.append((subtree, [members[k] for k in inner]))
        return parts


class Contrast:
    """power * log of how much of p(Y' | X Z stop), over all evidences Y' that a prompt may have, is the prompt's own Y's."""

    def __init__(self, posterior: Posterior, evidences: Mapping[str, Sequence[tuple[int, ...]]], power: float = 1.0) -> None:
        """`evidences` has, by a prompt's id, its own and those of the other labels."""
        self.posterior, self.evidences, self.power = posterior, evidences, power

    @property
    def tokens_forwarded(self) -> int:
        return self.posterior.tokens_forwarded

    @property
    def progress(self) -> int:
        return self.posterior.progress

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> list[np.ndarray]:
        others = [evidence for evidence in self.evidences[prompt.id] if evidence != prompt.evidence_tokens]
        prompts = [prompt, *(replace(prompt, evidence_tokens=evidence) for evidence in others)]
        # p(Z stop | X) is in each of them and cancels.
        log_joint_EK = [self.posterior.score(one, trajectories_K) for one in prompts]
        return [
            self.power * (own_T - np.logaddexp.reduce((own_T, *others_ET)))
            for own_T, *others_ET in zip(*log_joint_EK, strict=True)
        ]


class Function:
    """f(prompt, text, tokens) / beta, at every prefix that can stop or at the end alone."""

    def __init__(
        self,
        function: Callable[..., Any],
        decode: Callable[[list[int]], str],
        beta: float = 1.0,
        every_prefix: bool = False,
        min_tokens: int = 0,
        *,
        batch: bool = False,
        concurrency: int = 1,
    ) -> None:
        """`min_tokens` is the fewest actions after which a sample can stop. With `batch` the function takes lists of texts and
        of their tokens, and returns one of numbers. It is called for `concurrency` prefixes at a time."""
        self.tokens_forwarded = self.progress = 0
        self.function = function
        self.decode = decode
        self.beta = beta
        self.every_prefix = every_prefix
        self.min_tokens = min_tokens
        self.batch = batch
        self._callers = ThreadPoolExecutor(concurrency, thread_name_prefix="function") if concurrency > 1 else None

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> list[np.ndarray]:
        """Raises RewardError where the function raised, took too long, or returned NaN, an infinity or no number at all."""
        known: dict[tuple[int, ...], float | str] = {}
        if self.batch:
            known = self._at_once(prompt, trajectories_K)
        elif self._callers is not None:
            prefixes = self._prefixes(trajectories_K)
            known = dict(zip(prefixes, self._callers.map(partial(self._call, prompt), map(list, prefixes)), strict=True))
        result, faults = [], {}
        for k, trajectory in enumerate(trajectories_K):
            tokens = trajectory.tokens_T.tolist()
            log_reward_T = np.full(len(tokens) + 1, np.nan)
            for t in self._called_at(trajectory):
                prefix = tuple(tokens[:t])
                if prefix not in known:
                    known[prefix] = self._call(prompt, list(prefix))
                value = known[prefix]
                if isinstance(value, str):
                    faults[k] = value
                    break
                log_reward_T[t] = value
            result.append(log_reward_T)
        if faults:
            raise RewardError(faults, result)
        return result

    def _prefixes(self, trajectories_K: Sequence[Trajectory]) -> list[tuple[int, ...]]:
        """Those that are scored, each once."""
        return list(dict.fromkeys(tuple(tr.tokens_T[:t].tolist()) for tr in trajectories_K for t in self._called_at(tr)))

    def _called_at(self, trajectory: Trajectory) -> list[int]:
        """Lengths of the prefixes that are scored. A text that cannot be drawn is nothing that the function has to know."""
        inside_T = trajectory.is_action_T & (np.cumsum(trajectory.is_action_T) > self.min_tokens)
        return [*(np.flatnonzero(inside_T).tolist() if self.every_prefix else ()), len(trajectory)]

    def _call(self, prompt: Prompt, tokens: list[int]) -> float | str:
        """log R, or what is wrong."""
        text = self.decode(tokens)
        try:
            value = self.function(prompt, text, tokens)
        except ConfigError:
            raise
        # A border: what the user's function does with one text is the fault of that sample alone, and is counted.
        except Exception as error:
            return f"{self._name} failed for prompt {prompt.id!r}, text {text!r}: {type(error).__name__}: {error}"
        finally:
            self.progress += 1
        return self._log_reward(prompt, text, value)

    def _at_once(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> dict[tuple[int, ...], float | str]:
        """log R, or what is wrong, of each distinct prefix that is scored."""
        prefixes = self._prefixes(trajectories_K)
        texts = [self.decode(list(prefix)) for prefix in prefixes]
        try:
            values = list(self.function(prompt, texts, [list(prefix) for prefix in prefixes]))
        except ConfigError:
            raise
        # The same border: of one call for all of them nothing is known that could be kept.
        except Exception as error:
            fault = f"{self._name} failed for prompt {prompt.id!r}, {len(texts)} texts: {type(error).__name__}: {error}"
            return dict.fromkeys(prefixes, fault)
        finally:
            self.progress += 1
        if len(values) != len(texts):
            fault = (
                f"{self._name} returned {len(values)} values for prompt {prompt.id!r}, {len(texts)} texts; return one for each"
            )
            return dict.fromkeys(prefixes, fault)
        return {p: self._log_reward(prompt, text, value) for p, text, value in zip(prefixes, texts, values, strict=True)}

    @property
    def _name(self) -> str:
        return f"reward function {getattr(self.function, '__qualname__', self.function)!r}"

    def _log_reward(self, prompt: Prompt, text: str, value: Any) -> float | str:
        is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if not is_number or not np.isfinite(value):
            return (
                f"{self._name} returned {value!r} for prompt {prompt.id!r}, text {text!r}; "
                "return a finite number (a floor, not -inf, for the impossible)"
            )
        return float(value) / self.beta


class Part(NamedTuple):
    """A factor of a product."""

    name: str
    reward: Reward
    unit: float = 1.0
    """Nats of its log R times this are what it is reported in."""


class Product:
    """The product of rewards: log-rewards add up, and a state has one where all factors have one. What each factor says of a
    sample goes with the result."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    @property
    def tokens_forwarded(self) -> int:
        return sum(part.reward.tokens_forwarded for part in self.parts)

    @property
    def progress(self) -> int:
        return sum(part.reward.progress for part in self.parts)

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> LogRewards:
        faults: dict[int, str] = {}
        scores = []
        for part in self.parts:
            # Every factor has its say, so that what is left of a group is whole.
            log_reward_K, wrong = tolerated(partial(part.reward.score, prompt, trajectories_K))
            faults = wrong | faults
            scores.append(log_reward_K)
        ends = {
            part.name: part.unit * np.array([log_reward_T[-1] for log_reward_T in log_reward_K])
            for part, log_reward_K in zip(self.parts, scores, strict=True)
        }
        result = LogRewards((np.sum(per_factor, axis=0) for per_factor in zip(*scores, strict=True)), ends)
        if faults:
            raise RewardError(faults, result)
        return result


class Checked:
    """Refuses what no learner could use: a log R at the end that is not finite, or an infinity anywhere.

    Inside a tool's output nothing can stop, so there is NaN.
    """

    def __init__(self, reward: Reward, decode: Callable[[list[int]], str]) -> None:
        self.reward = reward
        self.decode = decode

    @property
    def tokens_forwarded(self) -> int:
        return self.reward.tokens_forwarded

    @property
    def progress(self) -> int:
        return self.reward.progress

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> LogRewards:
        """Raises RewardError with the prompt and the sequence."""
        # What it has scored is checked as well before it goes on.
        scores, wrong = tolerated(partial(self.reward.score, prompt, trajectories_K))
        faults = dict(wrong)
        if len(scores) != len(trajectories_K):
            message = f"prompt {prompt.id!r}: {len(scores)} log-rewards for {len(trajectories_K)} trajectories"
            raise RewardError(dict.fromkeys(range(len(trajectories_K)), message), [])
        result = LogRewards((), scores.factors_K)
        for k, (trajectory, log_reward_T) in enumerate(zip(trajectories_K, scores, strict=True)):
            if k not in faults and not _learnable(trajectory, log_reward_T):
                faults[k] = (
                    f"prompt {prompt.id!r}: log R {log_reward_T.tolist()} for {self.decode(trajectory.tokens_T.tolist())!r} "
                    f"({len(trajectory)} tokens); {len(trajectory) + 1} values are needed, finite at the end"
                )
            can_stop_T = np.append(trajectory.is_action_T, True)
            result.append(log_reward_T if k in faults else np.where(can_stop_T, log_reward_T, np.nan))
        if faults:
            raise RewardError(faults, result)
        return result


def _learnable(trajectory: Trajectory, log_reward_T: np.ndarray) -> bool:
    return len(log_reward_T) == len(trajectory) + 1 and bool(np.isfinite(log_reward_T[-1]) and not np.isinf(log_reward_T).any())


def needs_language_model(section: LMPosterior | FunctionReward | ProductReward) -> bool:
    return any(isinstance(factor, (LMPosterior, ContrastReward)) for _, factor in factors(section))


def build(
    section: LMPosterior | FunctionReward | ProductReward,
    *,
    model: LanguageModel | None,
    stop: Sequence[int],
    decode: Callable[[list[int]], str],
    token_budget: int,
    min_tokens: int = 0,
    evidences: Mapping[str, Sequence[tuple[int, ...]]] | None = None,
) -> Reward:
    """The reward of a config section `task.reward`; `model` may be None where `needs_language_model` says so.

    `min_tokens` is the fewest actions after which a sample can stop, `evidences` what a contrast is over, by a prompt's id.

    Raises:
        ConfigError: a function cannot be imported.
    """

    def one(field: str, factor: Factor) -> Reward:
        if isinstance(factor, FunctionReward):
            function = _function(factor, f"{field}.path")
            how: dict[str, Any] = {"batch": factor.batch, "concurrency": factor.concurrency}
            return Function(function, decode, factor.beta, factor.every_prefix, min_tokens, **how)
        if model is None:
            raise ValueError(f"a reward of kind {factor.kind} needs the frozen model")
        posterior = Posterior(model, stop, token_budget, factor.every_prefix)
        return Contrast(posterior, evidences or {}, factor.power) if isinstance(factor, ContrastReward) else posterior

    if isinstance(section, ProductReward):
        # Where one factor is not known, what the others say is for nothing.
        section = section if section.every_prefix else at_ends(section)
        parts = zip(names(section), factors(section), strict=True)
        return Checked(Product([Part(name, one(*factor), factor[1].unit) for name, factor in parts]), decode)
    [factor] = factors(section)
    return Checked(one(*factor), decode)


def _function(section: FunctionReward, field: str) -> Callable[..., Any]:
    if section.seconds is None:
        return import_function(section.path, field)
    return FunctionProcesses(section.path, field, section.seconds, section.start_seconds, section.concurrency)
