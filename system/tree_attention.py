"""Which positions of a packed row see which, and attention that leaves out what nobody sees.

The rule is that of `system.prefix_tree`, key k is visible to query q iff k <= q < end[k], and with a sliding window iff
also position[q] < position[k] + window: a window reaches back a number of tokens on the path, not in the row. A dense
mask grows with the square of the row. There are 128² = 16,384 times fewer blocks than entries of the mask, and blocks without
a visible pair, between pieces or branches, are skipped. On a CPU each stretch of queries takes the keys that any of them sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK = 128
"""Positions of a block, in queries and in keys: what FlexAttention's kernels are tuned for."""
STRETCH = 64
"""Queries of a stretch on a CPU: fewer see fewer keys that are not theirs, more make larger products."""
VARIANTS = 64
"""Of the compiled attention in one process, at most: for each pattern of windows, dtypes and gradients one."""
NAME = "prefix_tree"
"""The attention implementation, in transformers, that takes a BlockMask or a TreeMask. With any other it is SDPA."""


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Neighbouring queries, and the keys that any of them sees."""

    queries: slice
    keys: slice | Tensor
    """A slice where they are neighbours too, else int64, ascending."""
    mask: Tensor
    """Additive float32 [queries, keys]."""


class TreeMask(Tensor):
    """A dense mask, as models hand one through, with the stretches that stand for the same."""

    stretches: tuple[Stretch, ...] = ()
    # What is computed from it is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def padded(length: int) -> int:
    """The length of a row for `blocks`: whole blocks, at least two.

    Kernels are compiled for any length at once; but a dimension of 1 (one block) and fewer than 128 queries each are
    cases of their own to the compiler. With rows like this neither arises, and no length compiles anything again.
    """
    return max(2, -(-length // BLOCK)) * BLOCK


def dense(
    end_L: np.ndarray,
    position_L: np.ndarray,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
    context: int = 0,
) -> Tensor:
    """Additive [1, 1, L, context + L]; all see the keys of the context. On a CPU a TreeMask."""
    end, position = (torch.from_numpy(array).to(device, non_blocking=True) for array in (end_L, position_L))
    at = torch.arange(len(end), device=device)
    seen = (at[None, :] <= at[:, None]) & (at[:, None] < end[None, :])
    if window is not None:
        seen &= position[:, None] < position[None, :] + window
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
    mask = torch.nn.functional.pad(mask, (context, 0))[None, None]
    if device.type != "cpu":
        return mask
    stretches = []
    for first in range(0, len(end_L), STRETCH):
        queries = slice(first, min(first + STRETCH, len(end_L)))
        # Without the window, which can only make them fewer.
        visible = np.concatenate([np.arange(context), np.flatnonzero(end_L[: queries.stop] > first) + context])
        together = visible[-1] - visible[0] < len(visible)
        keys = slice(int(visible[0]), int(visible[-1]) + 1) if together else torch.from_numpy(visible)
        stretches.append(Stretch(queries, keys, mask[0, 0, queries][:, keys].float()))
    result = mask.as_subclass(TreeMask)
    result.stretches = tuple(stretches)
    return result


def blocks(end_L: np.ndarray, position_L: np.ndarray, window: int | None, device: torch.device) -> BlockMask:
    """The same for `padded` rows, without ever building it: O((L / 128)²) on the host.

    Within a block the keys that see furthest and least far say whether any of it, or all of it, is visible to another
    block of queries. A window can make "any" too generous, which costs time and changes nothing.
    """
    length = len(end_L)
    first_B = np.arange(0, length, BLOCK)
    end_BT, position_BT = end_L.reshape(-1, BLOCK), position_L.reshape(-1, BLOCK)
    before = np.tri(len(first_B), k=-1, dtype=bool)
    some = (before | np.eye(len(first_B), dtype=bool)) & (end_BT.max(1) > first_B[:, None])
    whole = before & (end_BT.min(1) >= first_B[:, None] + BLOCK)
    if window is not None:
        some &= position_BT.min(1)[:, None] < position_BT.max(1) + window
        whole &= position_BT.max(1)[:, None] < position_BT.min(1) + window

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def listed(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """How many blocks of keys each block of queries has, and which, those first."""
        order = np.argsort(~chosen, axis=1, kind="stable")
        return put(chosen.sum(1).astype(np.int32)[None, None]), put(order.astype(np.int32)[None, None])

    # Tensors, also the window: the compiler would make a kernel for each value of a captured integer.
    end, position, reach = put(end_L), put(position_L), put(position_L + (window or 0))

    def tree(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k])

    def tree_in_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k]) & (position[q] < reach[k])

    mask: Any = BlockMask.from_kv_blocks(
        *listed(some & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, seq_lengths=(length, length),
        mask_mod=tree if window is None else tree_in_window,
    )  # fmt: skip
    # GPT-2 in transformers asks every mask for it.
    mask.ndim = 4
    return mask


# The whole of it or an error: what the compiler gives up runs as plain operations, which build the scores of all pairs.
_compiler: Any = torch.compile  # whose overloads do not have the limit
_compiled = _compiler(flex_attention, dynamic=True, fullgraph=True, recompile_limit=VARIANTS)


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, L, head size] -> [1, L, heads, head size].

    Raises:
        NotImplementedError: the model's attention has something that block attention leaves out.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if isinstance(attention_mask, TreeMask) and not unknown:
        return _by_stretches(query, key, value, attention_mask.stretches, options.get("scaling")), None
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if unknown:
        raise NotImplementedError(f"{type(module).__name__} has {unknown}, which block attention here does not do")
    call: Any = partial(_compiled, query, key, value, block_mask=attention_mask, scale=options.get("scaling"))
    # Without a GPU there is no kernel with gradients. The plain computation shows what the masks mean, and is slow.
    with nullcontext() if query.is_cuda else torch.compiler.set_stance("force_eager"):
        out = call(enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous(), None


def _by_stretches(query: Tensor, key: Tensor, value: Tensor, stretches: Sequence[Stretch], scaling: float | None) -> Tensor:
    """As `_attend`. In float32: on a CPU torch's fused kernel is slower in bfloat16, with gradients by a factor of three."""
    groups = key.shape[1]
    # Heads that share keys are a dimension of their own, along which keys and values are not copied.
    query_, key_, value_ = (each[0].float().unflatten(0, (groups, -1)) for each in (query, key, value))
    outs = []
    for stretch in stretches:
        shared = (key_[:, :, stretch.keys], value_[:, :, stretch.keys])
        seen, given = (each.expand(-1, query_.shape[1], -1, -1) for each in shared)
        outs.append(
            scaled_dot_product_attention(query_[:, :, stretch.queries], seen, given, attn_mask=stretch.mask, scale=scaling)
        )
    return torch.cat(outs, 2).flatten(0, 1).transpose(0, 1)[None].to(query.dtype)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
