"""A causal language model over packed trees: one forward pass gives every log-prob that is asked for.

Used by the rewards (the frozen base) and by the learner (base + LoRA). Two costs are avoided: a shared prefix is
computed once, by the attention pattern of `system.prefix_tree`, and logits exist only for a chunk of the positions
that something is predicted from, in the forward and in the backward pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from system import tree_attention
from system.config import ConfigError
from system.constraints import Constraints
from system.output_layer import ChunkedLogProbs, Head
from system.prefix_tree import Packed, PrefixTree
from system.run_error import first_line
from system.trajectory import sampled

logger = logging.getLogger(__name__)

SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest difference, nats, between the packed pass and the model's own forward on a short prompt."""
CHECKED = 4
"""Such prompts, of which one at least has to agree."""

CONTEXT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference of hidden states, relative, with and without a context that was read before."""


TESTED = "Llama, GPT-2, Gemma 3"


@dataclass(frozen=True, eq=False)
class Context:
    """Tokens that a model has read, for rows that go on from them."""

    cache: DynamicCache
    """Keys and values of each layer."""
    length: int
    """Tokens."""


class LanguageModel:
    """The packed forward over a Hugging Face model, whose modules may have been adapted in place.

    Raises:
        ConfigError: the model gives other log-probs when it is called this way than by its own forward, so its
            architecture does something here that is not known (checked on short samples of four prompts); or it has
            layers of a kind that is not.
    """

    def __init__(
        self, model: PreTrainedModel, logits_chunk: int = 256, attention: Literal["auto", "dense", "block"] = "auto"
    ) -> None:
        """`attention` as in `system.learner_config.Learner`. What was chosen is the attribute of that name."""
        self.model = model
        self.logits_chunk = logits_chunk
        config = model.config.get_text_config()
        self._layer_types = set(getattr(config, "layer_types", None) or ())
        # The check on short samples cannot see the chunks of an attention; what is no attention it does see.
        attentions = {kind for kind in self._layer_types if kind.endswith("attention")}
        if unknown := attentions - {"full_attention", "sliding_attention"}:
            kinds = ", ".join(sorted(unknown))
            raise _refusal(model, f"has layers of {kinds}, and packed rows have masks for full attention and windows alone")
        self._window: int | None = getattr(config, "sliding_window", None)
        if self._layer_types == {"full_attention"}:  # a window that no layer has
            self._window = None
        head: Any = model.get_output_embeddings()
        if head is None:
            raise _refusal(model, "has no output embeddings, so it is no causal language model")
        softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._head = Head(head.weight, getattr(head, "bias", None), softcap)
        self._selected: tuple[Constraints, Head] | None = None
        self.attention = "dense"
        if self.device.type == "cpu" and self.model.config._attn_implementation == "sdpa":
            self.model.set_attn_implementation(tree_attention.NAME)
        if attention == "block" or (attention == "auto" and self.device.type == "cuda"):
            self._use_blocks(required=attention == "block")
        if self.attention == "dense":
            self._check()

    @property
    def device(self) -> torch.device:
        return self._head.weight_CH.device

    @property
    def vocab_size(self) -> int:
        return self._head.weight_CH.shape[0]

    def read(self, tokens: Sequence[int]) -> Context | None:
        """Without gradients. None where rows cannot go on from what was read: with windows, with block attention, and in
        architectures whose cache takes no mask of ours."""
        return self._read(tokens) if self._goes_on else None

    @cached_property
    def _goes_on(self) -> bool:
        return self.attention == "dense" and self._window is None and self._check_context()

    def _read(self, tokens: Sequence[int]) -> Context:
        decoder: Any = self.model.base_model
        with torch.no_grad():
            cache = decoder(input_ids=self._put(np.array(tokens, np.int64))[None], use_cache=True).past_key_values
        return Context(cache, len(tokens))

    def hidden(self, pieces: Sequence[Packed], context: Context | None = None) -> torch.Tensor:
        """Final hidden states [L, H] of pieces laid end to end in one row; pieces do not see each other. All of them go on
        from the `context`, if there is one."""
        offsets = np.cumsum([0] + [len(piece) for piece in pieces])
        ids = np.concatenate([piece.input_ids_L for piece in pieces])
        positions = np.concatenate([piece.position_ids_L for piece in pieces])
        ends = np.concatenate([piece.end_L + offset for piece, offset in zip(pieces, offsets, strict=False)])
        length = len(ids)
        if self.attention == "block":
            # The padding sees itself alone.
            more = tree_attention.padded(length) - length
            ids, positions = np.pad(ids, (0, more)), np.pad(positions, (0, more))
            ends = np.concatenate([ends, np.arange(length, length + more) + 1])
        mask, cached = self._mask(ends, positions, context.length if context else 0), {"use_cache": False}
        if context is not None:
            positions = positions + context.length
            cached = {"use_cache": True, "past_key_values": context.cache}
        decoder: Any = self.model.base_model
        output = decoder(input_ids=self._put(ids)[None], position_ids=self._put(positions)[None], attention_mask=mask, **cached)
        if context is not None:
            # The row was added to it.
            context.cache.crop(-len(ids))
        return output.last_hidden_state[0, :length]

    def log_probs(
        self,
        hidden_LH: torch.Tensor,
        position_Q: np.ndarray,
        token_Q: np.ndarray,
        constraints: Constraints | None = None,
        may_stop_Q: np.ndarray | None = None,
    ) -> torch.Tensor:
        """log p(token | position), float32 [Q], nats.

        With constraints, normalised over their columns; `may_stop_Q` says at which queries' positions the stop is
        among them (queries of one position must agree). Without, over the whole vocabulary.
        """
        positions, row_Q = np.unique(position_Q, return_inverse=True)
        order = np.argsort(row_Q, kind="stable")
        head, column_Q, closed_M = self._head, token_Q, None
        if constraints is not None:
            head, column_Q = self._head_of(constraints), constraints.column_of(token_Q)
            if may_stop_Q is not None and not may_stop_Q.all():
                closed = np.zeros(len(positions), bool)
                closed[row_Q] = ~may_stop_Q
                closed_M = self._put(closed)
        sorted_Q = ChunkedLogProbs.apply(
            hidden_LH[self._put(positions)],
            replace(head, closed_M=closed_M, chunk=self.logits_chunk),
            self._put(row_Q[order]),
            self._put(column_Q[order]),
        )
        return sorted_Q[self._put(np.argsort(order))]

    def _head_of(self, constraints: Constraints) -> Head:
        """The output layer over the columns of the constraints; one selection is kept, since a run has one support."""
        if self._selected is None or self._selected[0] is not constraints:
            head = self._head
            if len(constraints.columns) != self.vocab_size:
                columns = self._put(constraints.columns)
                bias = None if head.bias_C is None else head.bias_C[columns]
                head = replace(head, weight_CH=head.weight_CH[columns], bias_C=bias)
            self._selected = (constraints, replace(head, stop_column=constraints.stop_column))
        return self._selected[1]

    def score(self, pieces: Sequence[Packed], context: Context | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Without gradients: per piece, float64 [N] log p(node | parent) (0 at the root), and [N] log p(suffix | node).

        The second is NaN where a node has no branch. Over the whole vocabulary, at temperature 1. With a `context`, pieces
        have what comes after it alone, one token of their own context at least.
        """
        positions, tokens, offset = [], [], 0
        for piece in pieces:
            for position, token in (piece.edge_queries(), piece.suffix_queries()):
                positions.append(position.ravel() + offset)
                tokens.append(token.ravel())
            offset += len(piece)
        with torch.no_grad():
            logp_Q = self.log_probs(self.hidden(pieces, context), np.concatenate(positions), np.concatenate(tokens))
        values = np.split(logp_Q.double().cpu().numpy(), np.cumsum([len(token) for token in tokens])[:-1])
        scores = []
        for index, piece in enumerate(pieces):
            edge_N = np.concatenate([[0.0], values[2 * index]])
            suffix_N = np.full(len(piece.tree), np.nan)
            suffix_N[piece.branch_N] = values[2 * index + 1].reshape(piece.branch_N.sum(), len(piece.suffix)).sum(-1)
            scores.append((edge_N, suffix_N))
        return scores

    def _put(self, array: np.ndarray) -> torch.Tensor:
        # What came through Ray's object store is read-only, which torch does not take.
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.device, non_blocking=True)

    def _mask(self, end_L: np.ndarray, position_L: np.ndarray, context: int) -> Any:
        """What the decoder takes as its mask; models with windows in some layers take one of each kind."""

        def mask(window: int | None) -> Any:
            if self.attention == "block":
                return tree_attention.blocks(end_L, position_L, window, self.device)
            return tree_attention.dense(end_L, position_L, window, self._head.weight_CH.dtype, self.device, context)

        if self._window is not None and len(self._layer_types) > 1:
            return {"full_attention": mask(None), "sliding_attention": mask(self._window)}
        return mask(self._window)

    def _use_blocks(self, required: bool) -> None:
        """Block attention, if it works for this model on this device: it is compiled here, with its gradients.

        Raises:
            ConfigError: it does not, and is `required`.
        """
        dense = str(self.model.config._attn_implementation)
        self.model.set_attn_implementation(tree_attention.NAME)
        self.attention = "block"
        try:
            if torch._dynamo.config.disable and self.device.type == "cuda":
                raise RuntimeError("TORCH_COMPILE_DISABLE is set, and without the compiler it would build all pairs")
            self._check()
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            if trained:
                row = Packed.of(PrefixTree.of([]), range(8))
                torch.autograd.grad(self.hidden([row]).float().sum(), trained, allow_unused=True)
        # A border: a compiler without a tool, a kernel too large for this card, an option that it does not know.
        except Exception as error:
            if required:
                raise ConfigError(
                    f"learner.attention=block does not work here: {first_line(error)}; use auto or dense"
                ) from error
            logger.warning("attention takes dense masks, because block attention does not work here: %s", first_line(error))
            self.model.set_attn_implementation(dense)
            self.attention = "dense"

    def _check(self) -> None:
        """An architecture that is called wrongly is wrong on every prompt; bfloat16 may be nats off at some token of one, where
        a model's activations are far apart."""
        nearest = math.inf
        for tokens in np.random.default_rng(0).integers(0, self.vocab_size, (CHECKED, 20)).tolist():
            try:
                nearest = min(nearest, self._distance(tokens))
            except (TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise _refusal(self.model, f"does not take packed rows ({first_line(error)})") from error
            if nearest <= SELF_CHECK_TOLERANCE[self._head.weight_CH.dtype]:
                return
        raise _refusal(self.model, f"has other log-probs in packed rows than by itself, by {nearest:.3g} nats")

    def _distance(self, tokens: list[int]) -> float:
        """Nats, at worst, of two samples that part after a token, in one row and each by itself: layers that mix neighbours
        without asking the mask, as convolutions and recurrences do, show only where a row branches."""
        prompt, paths = tokens[:4], (tokens[4:12], tokens[4:5] + tokens[12:])
        tree = PrefixTree.of([sampled(path) for path in paths])
        [(edge_N, _)] = self.score([Packed.of(tree, prompt)])
        own = [self._own_log_probs([*prompt, *path])[len(prompt) - 1 :] for path in paths]
        return max(float(np.abs(edge_N[nodes_T[1:]] - own_T).max()) for nodes_T, own_T in zip(tree.nodes_K, own, strict=True))

    def _own_log_probs(self, tokens: list[int]) -> np.ndarray:
        """float64 [T - 1], nats, by the model's own forward."""
        ids_T = self._put(np.array(tokens, np.int64))
        with torch.no_grad():
            log_TV = self.model(input_ids=ids_T[None]).logits[0, :-1].float().log_softmax(-1)
        return log_TV.gather(1, ids_T[1:, None])[:, 0].double().cpu().numpy()

    def _check_context(self) -> bool:
        """Rows that go on from a context have the hidden states of rows that begin with it."""
        tokens = np.arange(1, 9) % self.vocab_size
        whole, rest = (Packed.of(PrefixTree.of([]), part.tolist()) for part in (tokens, tokens[4:]))
        try:
            with torch.no_grad():
                expected = self.hidden([whole])[4:]
                found = self.hidden([rest], self._read(tokens[:4].tolist()))
        # A border: what a model does with a cache is its own affair, and nothing depends on it but speed.
        except Exception as error:
            logger.info("contexts are read anew for each row: %s", first_line(error))
            return False
        return bool(((found - expected).abs().max() / expected.abs().max()) < CONTEXT_TOLERANCE[expected.dtype])


def _refusal(model: PreTrainedModel, why: str) -> ConfigError:
    # A model that was not loaded from anywhere has no name.
    name = f"model.path={model.name_or_path!r}" if model.name_or_path else "model.path"
    return ConfigError(f"{name}: {type(model).__name__} {why}; use a model of a tested architecture: {TESTED}")
