"""vLLM in this process, drawing groups of trajectories under one adapter version.

vLLM is imported here, and in the cache that it calls back (`actors.prompt_sharing`).

A logits processor of ours draws the tokens, and leaves vLLM, which takes the likeliest, no other: the support and the
exploration are defined by `system.constraints` and `actors.behaviour` alone, and log-probs are those of the behaviour.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from actors.merging import Merging
from actors.settings import BLOCK, EngineSettings, engine_environment, max_lora_rank
from system.adapters import Adapter, AdapterError, BaseWeights
from system.constraints import Constraints
from system.tools import Player, Tool
from system.trajectory import Behaviour, Request, Trajectory

if TYPE_CHECKING:
    import torch
    from vllm.outputs import CompletionOutput, RequestOutput


CANARY = "canary"
LORAS = 2
"""Versions that draw beside the base at a time: the newest, and the one before it until its groups are complete."""


@dataclass
class _Group:
    """A group in the engine: filled as its samples finish, in any order."""

    behaviours_K: tuple[Behaviour, ...]
    lora: Any
    """The adapter beside the base that draws it; None where versions are merged."""
    trajectories: dict[int, Trajectory] = field(default_factory=dict)


class Installed(NamedTuple):
    """What the install of a version took and showed; NaN is what is not known."""

    seconds: float = math.nan
    canary_error: float = math.nan
    """Nats a token: mean distance of the canary's log-probs from the learner's."""
    canary_signal: float = math.nan
    """Nats a token: mean distance of the learner's from the base's, which is what the canary could have shown."""
    effective_update: float = math.nan
    """As `Merging.write`. None of an adapter beside the base, which is written into no weight."""


class _Sample(NamedTuple):
    """What is asked of vLLM."""

    name: str
    tokens: Sequence[int]
    params: Any
    lora: Any


class Engine:
    """Draws from base + the installed adapter. Not thread-safe: one thread calls it.

    `installed` is the adapter that the next sample is drawn with; None while nothing is known to be right. `tokens` were drawn
    and `prompt_tokens` computed since the start: a prompt's tokens count where they are not read from a cache.
    """

    def __init__(
        self, folder: Path, base_model: str, constraints: Constraints, settings: EngineSettings, tool: Tool | None = None
    ) -> None:
        """`folder` holds the base model's files, `base_model` is the name that adapters give their base.

        Raises:
            ValueError: vLLM cannot run this model or these settings.
        """
        import torch

        gpu = torch.cuda.is_available()
        for name, value in engine_environment(settings.threads, gpu).items():
            os.environ.setdefault(name, value)
        import vllm

        self.constraints, self.settings, self.base_model, self.tool = constraints, settings, base_model, tool
        self.installed: Adapter | None = None
        self.tokens = 0
        self.prompt_tokens = 0
        self._base = BaseWeights(folder)
        self._loras: list[Any] = []
        """In vLLM beside the base, the one of `installed` last."""
        self._salt = ""
        """Of the keys and values that the merged weights compute: vLLM shares them between requests of one salt alone."""
        self._tickets, self._installs = itertools.count(1), itertools.count(1)
        self._groups: dict[int, _Group] = {}
        self._waiting: deque[_Sample] = deque()
        """For a place in the batch. They are held back here, so that a canary never waits for one."""
        self._in_vllm = 0
        """Samples that have one."""
        self._early: list[RequestOutput] = []
        """Samples that were complete while a canary was computed."""
        self._drawn: dict[str, list[tuple[int, float]]] = {}
        """By the name of a sample that is being drawn: its tokens so far, with their log-probs."""
        memory: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization} if gpu else {"block_size": BLOCK}
        if not gpu or settings.shares_gpu:
            memory["kv_cache_memory_bytes"] = settings.kv_cache_mb << 20
        if not gpu:
            # On a GPU blocks are short enough, and a connector would refuse its expandable segments of memory.
            memory["kv_transfer_config"] = {
                "kv_connector": "PromptSharing", "kv_connector_module_path": "actors.prompt_sharing", "kv_role": "kv_both",
                "kv_connector_extra_config": {"prompts": settings.shared_prompts},
            }  # fmt: skip
        if settings.install == "adapter":
            rank = max_lora_rank(settings.max_lora_rank)
            memory |= {
                "enable_lora": True, "max_lora_rank": rank, "max_loras": LORAS, "max_cpu_loras": LORAS + 1,
                # Without the output layer, which no adapter has, and which vLLM would compute for every row all the same: on
                # CPU it cannot where a canary is among them.
                "lora_target_modules": self._base.linear_in_layers(),
            }  # fmt: skip
        self._llm = vllm.LLM(
            str(folder), skip_tokenizer_init=True, dtype=settings.dtype, max_model_len=settings.max_model_len,
            # A place more, for the canary.
            max_num_seqs=settings.max_num_seqs + 1, seed=settings.seed, enforce_eager=settings.enforce_eager or not gpu,
            generation_config="vllm", load_format="safetensors", logits_processors=[_processor(constraints, tool, self._drawn)],
            # A prompt is computed in one step: after half of it there is nothing to draw.
            enable_chunked_prefill=False, max_num_batched_tokens=max(4096, settings.max_model_len),
            # The processor reads the tokens drawn so far, and an asynchronous scheduler would be a step ahead of them.
            enable_prefix_caching=True, async_scheduling=False, **memory,
        )  # fmt: skip
        self._engine = self._llm.llm_engine
        self._merging = Merging(self._llm.apply_model(lambda model: model)[0], self._base, settings.rounding)

    # ---------------------------------------------------------------------------------------------------- sampling

    @property
    def busy(self) -> bool:
        """Groups are being drawn."""
        return bool(self._groups)

    @property
    def takes_version(self) -> bool:
        """A version may be installed now: with `drain` when nothing is drawn, else when it would be no more than the second
        of those that draw beside the base. Versions that are merged draw one after the other."""
        if self.settings.drain:
            return not self.busy
        return len({id(group.lora) for group in self._groups.values()}) < LORAS

    @property
    def progress(self) -> int:
        """Grows with every token, those of samples that are not complete among them. For any thread."""
        return self.prompt_tokens + self.tokens + sum(map(len, list(self._drawn.values())))

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that this engine cannot draw."""
        prompt, limit = request.prompt, self.settings.max_model_len
        if len(prompt.policy_tokens) + self.constraints.longest > limit:
            raise ValueError(
                f"prompt {prompt.id!r}: {len(prompt.policy_tokens)} tokens and samples of {self.constraints.longest} "
                f"are more than the engine's {limit}; build it with a larger max_model_len"
            )
        if not 0 <= min(prompt.policy_tokens) <= max(prompt.policy_tokens) < self.constraints.vocab_size:
            raise ValueError(f"prompt {prompt.id!r} has tokens outside the vocabulary of {self.constraints.vocab_size}")
        if not request.behaviours_K:
            raise ValueError(f"group {request.group_id} asks for no samples: behaviours_K is empty")
        for behaviour in request.behaviours_K:
            if not (behaviour.temperature > 0 and 0 <= behaviour.epsilon < 1):
                raise ValueError(f"group {request.group_id}: {behaviour} needs temperature > 0 and 0 <= epsilon < 1")
            depths, tokens = zip(*behaviour.planted, strict=True) if behaviour.planted else ((), ())
            ascending = [depth for depth in range(self.constraints.max_tokens) if depth in depths]
            if list(depths) != ascending or not self.constraints.allows(tokens):
                raise ValueError(f"group {request.group_id}: {behaviour} plants what cannot be drawn there")

    def add(self, request: Request) -> int:
        """Queues a group; `step` names it by the number returned. K requests share the prompt's full blocks.

        Raises:
            ValueError: as `check`.
            RuntimeError: no adapter is installed.
        """
        import vllm
        from vllm.sampling_params import RequestOutputKind

        self.check(request)
        if self.installed is None:
            raise RuntimeError("no adapter is installed: the engine would sample from unknown weights")
        ticket = next(self._tickets)
        lora = self._loras[-1] if self._loras else None
        self._groups[ticket] = _Group(request.behaviours_K, lora)
        for k, behaviour in enumerate(request.behaviours_K):
            name = f"{ticket}/{k}"
            params = vllm.SamplingParams(
                temperature=0.0, max_tokens=self.constraints.longest + bool(self.tool),
                stop_token_ids=[self.constraints.stop_token], ignore_eos=True, detokenize=False,
                extra_args={"name": name, "behaviour": behaviour, "seed": (request.seed, k)},
                output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            self._waiting.append(_Sample(name, request.prompt.policy_tokens, params, lora))
        return ticket

    def step(self) -> list[tuple[int, tuple[Trajectory, ...]]]:
        """One token for every running sample. Returns the groups that are complete, by number."""
        complete = []
        outputs, self._early = self._early or self._finished(), []
        for output in outputs:
            assert output.prompt_token_ids is not None
            self.prompt_tokens += len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
            ticket, k = map(int, output.request_id.split("/"))
            group = self._groups[ticket]
            drawn = self._drawn.pop(output.request_id, [])
            group.trajectories[k] = self._trajectory(output.outputs[0], drawn, group.behaviours_K[k])
            if len(group.trajectories) == len(group.behaviours_K):
                del self._groups[ticket]
                complete.append((ticket, tuple(group.trajectories[k] for k in range(len(group.behaviours_K)))))
        if complete:
            self._unload()
        return complete

    def _finished(self) -> list[RequestOutput]:
        """What is complete after one step of vLLM, in which the samples have all places but the canary's."""
        while self._waiting and self._in_vllm < self.settings.max_num_seqs:
            self._submit(self._waiting.popleft())
            self._in_vllm += 1
        done = [output for output in cast("list[RequestOutput]", self._engine.step()) if output.finished]
        self._in_vllm -= sum(output.request_id != CANARY for output in done)
        return done

    def _submit(self, sample: _Sample) -> None:
        # By its own version beside the base, else by the weights that there are now.
        salt = sample.lora.lora_name if sample.lora else self._salt
        prompt: Any = {"prompt_token_ids": list(sample.tokens), "cache_salt": salt}
        self._engine.add_request(sample.name, prompt, sample.params, lora_request=sample.lora)

    def _trajectory(self, output: CompletionOutput, drawn: list[tuple[int, float]], behaviour: Behaviour) -> Trajectory:
        tokens, logp = list(output.token_ids), np.array([value for _, value in drawn], np.float32)
        as_drawn = tokens == [token for token, _ in drawn]
        if output.finish_reason not in ("stop", "length") or not as_drawn or not np.isfinite(logp).all():
            raise RuntimeError(
                f"vLLM ended a sample with {output.finish_reason!r} and the tokens {tokens[:8]}…, where {drawn[:8]}… were drawn"
            )
        self.tokens += len(tokens)
        # With a tool, a sample of the most actions still has room, and its stop is drawn as the only token there is.
        if output.finish_reason == "stop":
            tokens = tokens[:-1]
        else:
            logp = np.append(logp, np.float32(0))
        player = Player(self.tool, self.constraints.tool_tokens)
        for token in tokens:
            player.push(token)
        is_action_T = np.array(player.is_action, bool)
        stop = "forced" if player.depth == self.constraints.max_tokens else "sampled"
        return Trajectory(np.array(tokens, np.int32), is_action_T, logp, stop, behaviour)

    # -------------------------------------------------------------------------------------------------- installing

    def install(self, adapter: Adapter) -> Installed:
        """Makes `adapter` what the next group is drawn with, and proves it by the canary.

        Groups that are being drawn go on: by their own version where it is beside the base, else by the new weights from the
        next token on, over the keys and values of those before. Each token's log-prob is what it was drawn with either way.

        Raises:
            AdapterError: the adapter is damaged, of another model or not plain LoRA: what was installed stays. Or its
                canary is wrong: an adapter beside the base leaves the version before it in place; merged weights
                leave `installed` at None and drop what is being drawn, and nothing is sampled until another version is
                installed.
            RuntimeError: not unless `takes_version`.
        """
        if not self.takes_version:
            raise RuntimeError("groups are being drawn, and the engine has no room for another version beside theirs")
        started = time.perf_counter()
        adapter.verify(self.base_model)
        if adapter.canary and len(adapter.canary.tokens_T) >= self.settings.max_model_len:
            raise AdapterError(
                f"adapter {adapter.version}: its canary of {len(adapter.canary.tokens_T)} tokens does not fit the engine's "
                f"max_model_len={self.settings.max_model_len}, the task's longest prompt and sample; raise task.max_tokens"
            )
        updates = self._base.by_weight(adapter.updates())
        effective = math.nan
        if self.settings.install == "merged":
            self._merging.check(updates)
            self.installed = None
            effective = self._merging.write(updates)
            self._salt = f"version-{adapter.version}-{next(self._installs)}"
            try:
                error = self._canary(adapter, None)
            except AdapterError:
                self._drop_groups()
                raise
        else:
            error = self._install_beside(adapter)
        self.installed = adapter
        signal = math.nan
        if adapter.canary:
            signal = float(np.mean(np.abs(np.subtract(adapter.canary.logp_T, adapter.canary.base_logp_T))))
        return Installed(time.perf_counter() - started, error, signal, effective)

    def _install_beside(self, adapter: Adapter) -> float:
        """Loads a LoRA adapter under an id, name and folder that were never used: vLLM caches by each of them."""
        from vllm.lora.request import LoRARequest

        number = next(self._installs)
        # Read here, and never again: the engine has room for every version in use. A killed process leaves no files.
        with tempfile.TemporaryDirectory(prefix="headwater-adapter-") as folder:
            path = adapter.materialise(Path(folder) / "adapter")
            lora = LoRARequest(f"version-{adapter.version}-{number}", number, str(path))
            self._engine.add_lora(lora)
        try:
            error = self._canary(adapter, lora)
        except AdapterError:
            self._engine.remove_lora(number)
            raise
        self._loras.append(lora)
        self._unload()
        return error

    def _unload(self) -> None:
        """Versions that neither draw nor will."""
        in_use = [group.lora for group in self._groups.values()] + self._loras[-1:]
        for lora in [lora for lora in self._loras if lora not in in_use]:
            self._engine.remove_lora(lora.lora_int_id)
            self._loras.remove(lora)

    def _drop_groups(self) -> None:
        """They have tokens of weights that are not what they should be."""
        names = [f"{ticket}/{k}" for ticket, group in self._groups.items() for k in range(len(group.behaviours_K))]
        self._engine.abort_request(names)
        self._in_vllm = 0
        for kept in (self._groups, self._drawn, self._waiting, self._early):
            kept.clear()

    def _canary(self, adapter: Adapter, lora: Any) -> float:
        """Mean distance, nats a token, between the engine's log-probs of the canary and the learner's.

        Raises:
            AdapterError: that is above the tolerance; or, where the two do not both compute in float32, the median is. In
                bfloat16 single tokens may be nats away whatever the weights are, and say nothing of these.
        """
        import vllm

        if adapter.canary is None:
            return math.nan
        tokens = adapter.canary.tokens_T
        params = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=0.0)
        self._submit(_Sample(CANARY, tokens, params, lora))
        scored: RequestOutput | None = None
        while scored is None:
            for output in self._finished():
                if output.request_id == CANARY:
                    scored = output
                else:
                    self._early.append(output)
        rows: Any = scored.prompt_logprobs
        logp_T = [row[token].logprob for row, token in zip(rows[1:], tokens[1:], strict=True)]
        distance_T = np.abs(np.subtract(logp_T, adapter.canary.logp_T))
        by_mean = self.settings.canary_by_mean
        typical = float(np.mean(distance_T) if by_mean else np.median(distance_T))
        # Written so that NaN fails too.
        if not typical <= self.settings.canary_tolerance:
            coarse = ", or bfloat16 is too coarse for what was learned: learner.dtype=float32 and sampler.dtype=float32 tell"
            raise AdapterError(
                f"adapter version {adapter.version}: the engine's canary is {typical:.4g} nats a token away from the "
                f"learner's, above sampler.canary_tolerance={self.settings.canary_tolerance:g}: these are not the published "
                f"weights{'' if by_mean else coarse}"
            )
        return float(np.mean(distance_T))

    def close(self) -> None:
        """Ends vLLM and frees its memory. No method may be called afterwards."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.installed = None
        self._engine.engine_core.shutdown()
        # The merging has the model's modules, and the base its weights.
        del self._llm, self._engine, self._merging, self._base
        cleanup_dist_env_and_memory()


def _processor(constraints: Constraints, tool: Tool | None, drawn: dict[str, list[tuple[int, float]]]) -> Any:
    """A vLLM logits processor class that draws, under `constraints`, `tool` and each request's behaviour, for the whole batch.

    What it draws of a sample is in `drawn`, by its name.
    """
    import torch
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates
    from vllm.v1.sample.logits_processor.interface import LogitsProcessor

    from actors.behaviour import Running, TokenDraw

    class BehaviourProcessor(LogitsProcessor):
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            self.draw = TokenDraw(constraints, device)
            self.rows: dict[int, Running] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            def state(params: Any, _: Any, output: list[int]) -> Running | None:
                # The canary has no behaviour: it scores the model itself.
                if not (asked := params.extra_args):
                    return None
                # One token more than the longest: the stop.
                uniforms_T2 = np.random.default_rng(asked["seed"]).random((constraints.longest + 1, 2))
                # One that vLLM had put off comes back with what was drawn of it.
                so_far = drawn.setdefault(asked["name"], [])
                player = Player(tool, constraints.tool_tokens)
                return Running(asked["behaviour"], output, constraints, player, uniforms_T2, so_far)

            process_dict_updates(self.rows, batch_update, state)

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            if not self.rows:
                return logits
            numbers, running_B = zip(*sorted(self.rows.items()), strict=True)
            # A canary's row may be among them.
            alone = len(numbers) == len(logits)
            token_B, logp_B = self.draw(logits if alone else logits[list(numbers)], [running.row() for running in running_B])
            for running, token, logp in zip(running_B, token_B.tolist(), logp_B.tolist(), strict=True):
                running.record(token, logp)
            logits[list(numbers), token_B] = torch.inf
            return logits

    return BehaviourProcessor
