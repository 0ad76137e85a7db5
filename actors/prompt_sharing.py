"""Each prompt is computed once: vLLM shares full blocks of the KV cache between requests, and this shares the last one.

On CPU a block has 32 tokens, so without this a group of K samples computes up to 32 tokens of its prompt K times, which for
short prompts is most of the work. vLLM's interface for caches outside the engine (a KV connector) lets us keep a copy of
each prompt's last block and put it into the blocks of later requests, which then compute the last prompt token alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

Key = tuple[str, tuple[int, ...]]
"""The salt that says by which weights, and the prompt."""


@dataclass
class _Step(KVConnectorMetadata):
    """What the worker does around one forward pass: blocks by number."""

    loads: list[tuple[Key, int]] = field(default_factory=list)
    saves: list[tuple[Key, int]] = field(default_factory=list)
    drops: list[Key] = field(default_factory=list)


class PromptSharing(KVConnectorBase_V1):
    """Built twice by vLLM: one object in its scheduler decides, one beside the model copies."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block = int(vllm_config.cache_config.block_size)
        self._capacity = int(self._kv_transfer_config.kv_connector_extra_config["prompts"])
        self._blocks = int(kv_cache_config.num_blocks)
        # The scheduler's: prompts whose last block the worker holds, oldest first, and what the next step does.
        self._held: OrderedDict[Key, None] = OrderedDict()
        self._step = _Step()
        # The worker's: for each layer the cache with its blocks in front, and the copies.
        self._caches: list[torch.Tensor] = []
        self._copies: dict[Key, list[torch.Tensor]] = {}

    # ------------------------------------------------------------------------------------------- in the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        key = _key(request)
        if any(key == saved for saved, _ in self._step.saves):
            # Computed in the step that is being put together: its block is there for the next.
            return None, False
        # The last token is always computed: its output starts the sample.
        last = len(key[1]) - 1
        if key not in self._held or num_computed_tokens != last // self._block * self._block:
            return 0, False
        self._held.move_to_end(key)
        return last - num_computed_tokens, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        key = _key(request)
        index = (len(key[1]) - 1) // self._block
        number = blocks.get_block_ids()[0][index]
        if num_external_tokens:
            self._step.loads.append((key, number))
        elif key not in self._held and (len(key[1]) - 1) % self._block:
            self._step.saves.append((key, number))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        step, self._step = self._step, _Step()
        self._held |= dict.fromkeys(key for key, _ in step.saves)
        while len(self._held) > self._capacity:
            step.drops.append(self._held.popitem(last=False)[0])
        return step

    # ------------------------------------------------------------------------------------------- beside the model

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        for cache in kv_caches.values():
            self._caches.append(cache.movedim(cache.shape.index(self._blocks), 0))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        loads: dict[Key, list[int]] = {}
        for key, number in self._work.loads:
            loads.setdefault(key, []).append(number)
        for key, numbers in loads.items():
            for cache, copy in zip(self._caches, self._copies[key], strict=True):
                cache[numbers] = copy

    def wait_for_save(self) -> None:
        for key, number in self._work.saves:
            self._copies[key] = [cache[number].clone() for cache in self._caches]
        for key in self._work.drops:
            del self._copies[key]

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads are complete when `start_load_kv` returns."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save by layers: `wait_for_save` copies all of them."""

    @property
    def _work(self) -> _Step:
        return cast("_Step", self._get_connector_metadata())


def _key(request: Any) -> Key:
    return request.cache_salt, tuple(request.prompt_token_ids)
