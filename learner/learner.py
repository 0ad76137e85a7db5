"""The learner: groups in, one optimizer step, and a new adapter out. A plain class; Ray is applied in deploy.

An update packs each group's prefix tree once, fills rows up to the token budget, and adds up the gradients of the rows;
the loss is the mean over all groups of the update, however they fall into rows and the rows onto ranks. Left out of the
GFlowNet losses on purpose: a critic, a KL penalty (the prior is inside the reward), ratios and clipping against the
behaviour policy (see learner.losses); baselines that have them are in learner.baselines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from learner import baselines, losses
from learner.baselines import Baseline
from learner.piece import Piece, cut
from learner.policy import Policy
from learner.ranks import Ranks
from learner.states import NodeLogQ, node_log_reward, states_of
from system import learner_config
from system.adapters import Adapter, Canary
from system.checkpoint import CheckpointError
from system.config import Config
from system.constraints import Constraints
from system.handles import GroupLogQ
from system.models import locate
from system.posterior import Bounds
from system.prefix_tree import Packed, PrefixTree, rows_by_budget
from system.pretrained import resolve_device
from system.tasks.problem import Outline, Problem
from system.timeline import Timeline
from system.trajectory import Group

CANARY_TOKENS = 24
OTHER_MODEL = 0.2
"""Nats a token by which two models differ at least: more than bfloat16 alone makes (0.05)."""


def lr_at(config: learner_config.Learner, step: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up that never starts at 0, then the decay to lr * final_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.decay == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps))
    left = 1.0 - done if config.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr * (config.final_lr + (1.0 - config.final_lr) * left)


class Facts(NamedTuple):
    """Of one group in an update; NaN where unknown. A small loss alone is no evidence that q is the posterior."""

    loss: float
    tokens: float
    """Forwarded."""
    log_z: float
    """Mean of u over all samples, exploring and replayed ones too, nats: log Z at the posterior, and no bound before it."""
    spread: float
    """Variance of the same, nats²."""
    ess: float
    """Effective share of the samples under the weights exp u."""
    log_q_stop: float
    """Mean log q of the stop where samples end, nats."""


class PackedGroup(NamedTuple):
    """A group as it goes into a row."""

    group: Group
    piece: Piece
    log_reward_N: np.ndarray
    """float64: untempered log R, nats; NaN where the loss has no use for the state."""


class Learner:
    def __init__(
        self,
        config: Config,
        folder: Path,
        constraints: Constraints,
        base_model: str,
        canary_tokens: Sequence[int],
        ranks: Ranks | None = None,
    ) -> None:
        """`folder` holds the base model's files, `base_model` is the name under which adapters are published.

        With several `ranks` each has a Learner like this one: `update` and `restore` are called on all of them with the same
        arguments, and where the base is in shards so are `adapter` and `score`.
        """
        self.config = config.learner
        self.ranks = ranks or Ranks()
        torch.manual_seed(config.seed)
        device = resolve_device(self.config.device, self.config.gpus)
        if device.type == "cpu":
            torch.set_num_threads(self.config.thread_count)
        self.constraints = constraints
        self.policy = Policy(
            folder,
            config.lora,
            constraints,
            dtype=getattr(torch, self.config.dtype),
            device=device,
            logits_chunk=self.config.logits_chunk,
            gradient_checkpointing=self.config.gradient_checkpointing,
            ranks=self.ranks if self.ranks.in_lockstep else None,
            attention=self.config.attention,
        )
        self._parameters = list(self.policy.parameters.values())
        self.ranks.equalise(self._parameters)
        self.optimizer = torch.optim.AdamW(
            self._parameters, lr=self.config.lr, betas=self.config.betas, weight_decay=self.config.weight_decay, fused=True
        )
        self.objective = baselines.build(config.loss) or losses.build(config.loss)
        self._needs_base = isinstance(self.objective, Baseline) and self.objective.needs_base
        self.step = 0
        self.timeline = Timeline()
        self.base_model = base_model
        self._canary_tokens = np.array(canary_tokens[:CANARY_TOKENS], np.int64)
        with self.policy.base():
            self._canary_base = self._canary_log_probs()

    @classmethod
    def build(cls, config: Config, problem: Problem | Outline, ranks: Ranks | None = None) -> Learner:
        """The learner of a run; its canary is the first prompt. Raises ConfigError where the model cannot be had."""
        return cls(config, locate(config.model), problem.constraints, config.model.path, problem.canary, ranks)

    # ---------------------------------------------------------------------------------------------- the update

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """One optimizer step on the mean loss of the groups. Returns its metrics, on every rank those of all; seconds, nats.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; the weights are left as they were, on every rank.
        """
        started = time.perf_counter()
        temperature = self.config.reward_temperature.at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        facts_G = np.zeros((len(groups), len(Facts._fields)))
        for loss, facts in self._rows(groups, temperature):
            loss.backward()
            for index, values in facts.items():
                facts_G[index] = values
        self.ranks.sum_gradients(self._parameters)
        by_name = dict(zip(Facts._fields, self.ranks.sum(facts_G).T, strict=True))
        total, tokens = float(by_name.pop("loss").mean()), float(by_name.pop("tokens").sum())
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"update {self.step}: loss {total}, gradient norm {norm} on prompts "
                f"{sorted({group.prompt.id for group in groups})[:4]}; lower learner.lr or use float32"
            )
        lr = lr_at(self.config, self.step)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = lr
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - started
        return {
            "loss": total,
            "grad_norm": norm,
            "lr": lr,
            "reward_temperature": temperature,
            "tokens/forwarded": tokens,
            "rate/learner_tokens_per_second": tokens / seconds,
            "seconds/update": seconds,
            **{name: _mean_of_known(value_G) for name, value_G in by_name.items()},
        }

    def score(self, groups: Sequence[Group]) -> list[GroupLogQ]:
        """log q of the trajectories under the current policy."""
        trees = [PrefixTree.of(group.trajectories_K) for group in groups]
        pieces = [self._piece(tree, group, tree.is_end_N) for tree, group in zip(trees, groups, strict=True)]
        scores: dict[int, GroupLogQ] = {}
        for row in rows_by_budget([len(piece) for piece in pieces], self.config.token_budget):
            with torch.no_grad():
                log_q = self._log_q([pieces[index] for index in row])
            for index, (edge, stop) in zip(row, log_q, strict=True):
                edge_N, stop_N = edge.double().cpu().numpy(), stop.double().cpu().numpy()
                tree = trees[index]
                stop_K = stop_N[tree.ends_K]
                path_K = np.array([edge_N[nodes_T].sum() for nodes_T in tree.nodes_K])
                scores[index] = GroupLogQ(path_K + stop_K, stop_K)
        return [scores[index] for index in range(len(groups))]

    def _pack(self, group: Group) -> PackedGroup:
        tree = PrefixTree.of(group.trajectories_K)
        log_reward_N = node_log_reward(tree, group)
        if isinstance(self.objective, Baseline):
            log_reward_N[~tree.is_end_N] = np.nan
        piece = self._piece(tree, group, np.isfinite(log_reward_N))
        log_reward_N[~piece.may_stop_N] = np.nan
        return PackedGroup(group, piece, log_reward_N)

    def _piece(self, tree: PrefixTree, group: Group, wanted_N: np.ndarray) -> Piece:
        context = group.prompt.policy_tokens
        piece = Piece.of(tree, context, self.constraints, wanted_N)
        # More passes on one rank than on the others would break their step.
        return piece if self.ranks.in_lockstep else cut(piece, group.trajectories_K, context, self.config.token_budget)

    def _log_q(self, pieces: Sequence[Piece]) -> list[NodeLogQ]:
        """Of the pieces of one row; one in parts, which is longer than a row, is alone in its own."""
        return [self.policy.log_q_in_parts(pieces[0])] if pieces[0].parts else self.policy.log_q(pieces)

    def _rows(self, groups: Sequence[Group], temperature: float) -> Iterator[tuple[Tensor, dict[int, Facts]]]:
        """A row of packed trees of this rank at a time: its part of the loss, and the facts of each group in it, by index."""
        packed = [self._pack(group) for group in groups]
        lengths = [len(each.piece) for each in packed]
        for row in self.ranks.rows(lengths, self.config.token_budget):
            # A row that only keeps step with the other ranks forwards the shortest group, for nothing.
            pieces = [packed[index].piece for index in row or [int(np.argmin(lengths))]]
            log_q = self._log_q(pieces)
            base: Sequence[NodeLogQ | None] = [None] * len(pieces)
            if self._needs_base:
                with torch.no_grad(), self.policy.base():
                    base = self._log_q(pieces)
            if not row:
                yield 0.0 * log_q[0].edge_N.sum(), {}
                continue
            loss_G, facts_G = [], {}
            for index, log_q_N, base_N in zip(row, log_q, base, strict=True):
                loss, facts_G[index] = self._loss(packed[index], log_q_N, base_N, temperature)
                loss_G.append(loss)
            yield torch.stack(loss_G).sum() / len(groups), facts_G

    def _loss(self, packed: PackedGroup, log_q: NodeLogQ, base: NodeLogQ | None, temperature: float) -> tuple[Tensor, Facts]:
        """Of one group."""
        group, piece, log_reward_N = packed
        states = states_of(piece.tree, log_reward_N, log_q, temperature)
        if isinstance(self.objective, Baseline):
            loss = self.objective.loss(baselines.actions_of(piece.tree, piece.chosen_N, group, log_q, base, temperature))
        else:
            loss = self.objective(states)
        # Parts are computed once more for their gradients.
        passes = 1 + bool(piece.parts) + self._needs_base
        tokens = passes * (sum(len(part.piece) for part in piece.parts) or len(piece))
        return loss, _facts(float(loss.detach()), tokens, states, log_q.stop_N.detach()[piece.tree.ends_K.tolist()])

    # ------------------------------------------------------------------------------------- what leaves the learner

    def adapter(self, version: int) -> Adapter:
        """The current LoRA weights as a version to publish, with a canary that proves its delivery."""
        canary = Canary(tuple(self._canary_tokens.tolist()), self._canary_log_probs(), self._canary_base)
        tensors = self.policy.adapter_tensors()
        peft_config = self.policy.adapter_config() | {"base_model_name_or_path": self.base_model}
        return Adapter.of(version, self.step, tensors, peft_config, self.base_model, canary)

    def save(self) -> np.ndarray:
        """All that the next update depends on, as uint8 safetensors: LoRA weights, optimizer moments, step."""
        tensors = {f"adapter/{name}": array for name, array in self.policy.adapter_tensors().items()}
        tensors |= {"canary/tokens": self._canary_tokens, "canary/base": np.array(self._canary_base)}
        tensors |= {"scale": np.array(self.policy.scale), "step": np.array(self.step)}
        for name, parameter in self.policy.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value.detach().cpu().numpy()
        return np.frombuffer(safetensors.numpy.save(tensors, {"base_model": self.base_model}), np.uint8)

    def restore(self, saved: np.ndarray, step: int) -> None:
        """Continues from `save`. Raises CheckpointError if it is of another model, lora section or step."""
        tensors = safetensors.numpy.load(saved.tobytes())
        if (its_own := int(tensors.get("step", step))) != step:
            raise CheckpointError(f"the checkpoint of step {step} has the weights of step {its_own}: it cannot be gone on from")
        # An adapter that training starts from has neither these nor a scale: its folder was checked.
        if "canary/tokens" in tensors:
            self._check_base(tensors["canary/tokens"], tensors["canary/base"])
        prefix = "adapter/"
        adapter = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
        try:
            self.policy.load_adapter(adapter)
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} has another lora section than this run: {error}; set lora to what the run "
                "began with"
            ) from error
        scale = float(tensors.get("scale", self.policy.scale))
        if not math.isclose(scale, self.policy.scale):
            raise CheckpointError(
                f"the checkpoint of step {step} has lora.alpha / lora.rank = {scale:g}, this run {self.policy.scale:g}: "
                "its weights would stand for another policy; set lora.alpha to what the run began with"
            )
        for name, parameter in self.policy.parameters.items():
            state: dict[str, Tensor] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (array := tensors.get(f"optimizer/{key}/{name}")) is not None:
                    state[key] = torch.from_numpy(array).to(parameter.device)
            if state:
                self.optimizer.state[parameter] = state
        self.step = step

    def _check_base(self, tokens_T: np.ndarray, logp_T: np.ndarray) -> None:
        """A base model is known by what it says, not by its path: a folder may move, and a hub id may get new weights."""
        error = math.inf
        if tokens_T.max() < self.constraints.vocab_size:
            with self.policy.base():
                error = float(np.abs(np.array(self._canary_log_probs(tokens_T)) - logp_T).mean())
        if not error <= OTHER_MODEL:
            raise CheckpointError(
                f"the checkpoint is of another model than model.path={self.base_model!r}: their log-probs of the same tokens "
                f"differ by {error:.3g} nats a token; set model.path, and model.revision, to the model that the run began with"
            )

    def _canary_log_probs(self, tokens: np.ndarray | None = None) -> tuple[float, ...]:
        """Of the canary's tokens unless others are given."""
        model, tokens = self.policy.language_model, self._canary_tokens if tokens is None else tokens
        with torch.no_grad():
            hidden = model.hidden([Packed.of(PrefixTree.of([]), tokens.tolist())])
            logp_T = model.log_probs(hidden, np.arange(len(tokens) - 1), tokens[1:])
        return tuple(logp_T.double().cpu().tolist())


def _mean_of_known(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _facts(loss: float, tokens: float, states: losses.States, log_q_stop_K: Tensor) -> Facts:
    u_K = states.u_end_K.detach().double().cpu().numpy()
    bounds = Bounds.of(u_K) if len(u_K) > 1 else None
    log_z, spread, ess = (bounds.log_z_lower, bounds.spread, bounds.ess) if bounds else (math.nan,) * 3
    return Facts(loss, tokens, log_z, spread, ess, float(log_q_stop_K.mean()))
