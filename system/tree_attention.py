"""Which positions of a packed row see which, for the attention kernels: as one dense mask, or as the blocks that hold any.

The rule is that of `system.prefix_tree`, key k is visible to query q iff k <= q < end[k], and with a sliding window iff
also position[q] < position[k] + window: a window reaches back a number of tokens on the path, not in the row. A dense
mask grows with the square of the row; of the blocks there are 128² = 16,384 times fewer, and those that nothing of
is visible in, between pieces or branches, cost nothing.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK = 128
"""Positions of a block, in queries and in keys: what FlexAttention's kernels are tuned for."""
NAME = "prefix_tree"
"""The attention implementation, in transformers, that takes a BlockMask, or a dense mask."""
WRITTEN_OUT = 512**2
"""Pairs of a query and a key up to which bfloat16 attention on a CPU is written out as products and a softmax, which is faster
there than torch's fused kernel (`tests/benchmarks/update_parts.py`), but keeps for the backward pass what grows with the square
of the row."""


def padded(length: int) -> int:
    """The length of a row for `blocks`: whole blocks, at least two.

    Kernels are compiled for any length at once; but a dimension of 1 (one block) and fewer than 128 queries each are
    cases of their own to the compiler. With rows like this neither arises, and no length compiles anything again.
    """
    return max(2, -(-length // BLOCK)) * BLOCK


def dense(end_L: Tensor, position_L: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive [1, 1, L, L]."""
    at = torch.arange(len(end_L), device=end_L.device)
    seen = (at[None, :] <= at[:, None]) & (at[:, None] < end_L[None, :])
    if window is not None:
        seen &= position_L[:, None] < position_L[None, :] + window
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[None, None]


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


_compiled = torch.compile(flex_attention, dynamic=True)


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, L, head size] -> [1, L, heads, head size].

    Raises:
        NotImplementedError: the model's attention has something that block attention leaves out.
    """
    if not isinstance(attention_mask, BlockMask):
        if _best_written_out(query, key, attention_mask):
            return _written_out(query, key, value, attention_mask, options.get("scaling")), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise NotImplementedError(f"{type(module).__name__} has {unknown}, which block attention here does not do")
    call: Any = partial(_compiled, query, key, value, block_mask=attention_mask, scale=options.get("scaling"))
    # Without a GPU there is no kernel with gradients. The plain computation shows what the masks mean, and is slow.
    with nullcontext() if query.is_cuda else torch.compiler.set_stance("force_eager"):
        out = call(enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous(), None


def _best_written_out(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Of rows with a `dense` mask alone."""
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    ours = mask is not None and mask.dtype == query.dtype and len(query) == 1
    return on_cpu and ours and query.shape[2] * key.shape[2] <= WRITTEN_OUT


def _written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """With the queries of all heads that share keys as the rows of one product."""
    _, heads, length, size = query.shape
    groups = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    score_GQK = (query * scale).reshape(groups, -1, size) @ key[0].transpose(1, 2)
    share_GQK = (score_GQK.view(heads, length, -1) + mask[0]).softmax(-1).view_as(score_GQK)
    return (share_GQK @ value[0]).view(1, heads, length, size).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
