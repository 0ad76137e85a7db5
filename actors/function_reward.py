"""log R by a python function of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from system.config import ConfigError
from system.scores import Scores
from system.trajectory import Prompt, Trajectory


class NoReward(str):
    """The fault of a function that gave what is no number at all: no text excuses it."""


class Function:
    """f(prompt, text, tokens) / beta, at every prefix that can stop or at the end alone."""

    def __init__(
        self,
        function: Callable[..., Any],
        decode: Callable[[list[int]], str],
        beta: float = 1.0,
        every_prefix: bool = False,
        may_stop: Callable[[Sequence[int], int], bool] = lambda tokens, actions: True,
        *,
        batch: bool = False,
        concurrency: int = 1,
    ) -> None:
        """`may_stop` says whether a sample can stop after these tokens, of which so many are actions. With `batch` the function
        takes lists of texts and of their tokens, and returns one of numbers. It is called for `concurrency` prefixes at a
        time."""
        self.tokens_forwarded = self.progress = 0
        self.function = function
        self.decode = decode
        self.beta = beta
        self.every_prefix = every_prefix
        self.may_stop = may_stop
        self.batch = batch
        self._callers = ThreadPoolExecutor(concurrency, thread_name_prefix="function") if concurrency > 1 else None

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        """A sample is faulty where the function raised, took too long, or returned NaN, an infinity or no number at all."""
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
        return Scores(result, faults)

    def _prefixes(self, trajectories_K: Sequence[Trajectory]) -> list[tuple[int, ...]]:
        """Those that are scored, each once."""
        return list(dict.fromkeys(tuple(tr.tokens_T[:t].tolist()) for tr in trajectories_K for t in self._called_at(tr)))

    def _called_at(self, trajectory: Trajectory) -> list[int]:
        """Lengths of the prefixes that are scored. A text that cannot be drawn is nothing that the function has to know."""
        tokens, is_action_T = trajectory.tokens_T.tolist(), trajectory.is_action_T
        before_T = np.cumsum(is_action_T) - is_action_T
        inside = np.flatnonzero(is_action_T).tolist() if self.every_prefix else []
        return [*(t for t in inside if self.may_stop(tokens[:t], int(before_T[t]))), len(trajectory)]

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
            values = self.function(prompt, texts, [list(prefix) for prefix in prefixes])
            values = list(values) if isinstance(values, Iterable) else values
        except ConfigError:
            raise
        # The same border: of one call for all of them nothing is known that could be kept.
        except Exception as error:
            fault = f"{self._name} failed for prompt {prompt.id!r}, {len(texts)} texts: {type(error).__name__}: {error}"
            return dict.fromkeys(prefixes, fault)
        finally:
            self.progress += 1
        if not isinstance(values, list) or len(values) != len(texts):
            returned = f"{len(values)} values" if isinstance(values, list) else f"{values!r}, which is no list,"
            fault = f"{self._name} returned {returned} for prompt {prompt.id!r}, {len(texts)} texts; return one for each"
            return dict.fromkeys(prefixes, NoReward(fault))
        return {p: self._log_reward(prompt, text, value) for p, text, value in zip(prefixes, texts, values, strict=True)}

    @property
    def _name(self) -> str:
        return f"reward function {getattr(self.function, '__qualname__', self.function)!r}"

    def _log_reward(self, prompt: Prompt, text: str, value: Any) -> float | str:
        is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if not is_number or not np.isfinite(value):
            fault = (
                f"{self._name} returned {value!r} for prompt {prompt.id!r}, text {text!r}; "
                "return a finite number (a floor, not -inf, for the impossible)"
            )
            return fault if is_number else NoReward(fault)
        return float(value) / self.beta
