"""The processes that make an update together: data parallel over groups, and a frozen base in shards.

Each rank works on a share of the groups; gradients and the groups' facts are summed over all, so every rank takes the same
step and holds the same weights. The one home of torch.distributed: gloo between CPUs, NCCL between GPUs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, though not in its __all__
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from system.config import ConfigError
from system.prefix_tree import rows_by_budget

TIMEOUT = timedelta(minutes=30)
"""Longest wait for the slowest rank, in the meeting or in an update."""


class Ranks:
    """This process among those that update together. Alone (the default) it needs nobody, and nothing is sent."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None, *, in_lockstep: bool = False) -> None:
        """`in_lockstep`: every forward pass is one of all ranks, since the base is in shards."""
        self.rank, self.size, self.in_lockstep = rank, size, in_lockstep
        self._device = device

    @classmethod
    def join(cls, rank: int, size: int, store: TCPStore, device: torch.device, *, in_lockstep: bool = False) -> Ranks:
        """Waits until all `size` ranks have met at `store`, which is `open_store`'s or `reach_store`'s."""
        for interface in _interfaces_to(store.host, store.port):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        if device.type == "cuda":
            # The device has no number here: Ray shows each rank the one GPU that is its own.
            torch.cuda.set_device(device.index or 0)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        return cls(rank, size, device, in_lockstep=in_lockstep)

    # ------------------------------------------------------------------------------------------------- the work

    def rows(self, lengths_G: Sequence[int], budget: int) -> list[list[int]]:
        """The rows of this rank: indices of groups, packed by `budget` tokens. Together the ranks have each group once.

        Longest first to the rank with the least, so that all finish together; with fewer groups than ranks some have no
        row. In lockstep all have as many rows as the one with the most, and those with no group in them come last.
        """
        shares: list[list[int]] = [[] for _ in range(self.size)]
        tokens = [0] * self.size
        for index in sorted(range(len(lengths_G)), key=lambda index: -lengths_G[index]):
            least = tokens.index(min(tokens))
            shares[least].append(index)
            tokens[least] += lengths_G[index]
        rows = [
            [[share[at] for at in row] for row in rows_by_budget([lengths_G[index] for index in share], budget)]
            for share in map(sorted, shares)
        ]
        own = rows[self.rank]
        return own + [[]] * (max(map(len, rows)) - len(own)) if self.in_lockstep else own

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Elementwise over the ranks; float64, and what is not finite stays so."""
        if self.size == 1:
            return values
        total = torch.from_numpy(values.astype(np.float64)).to(self._device)
        dist.all_reduce(total)
        return total.cpu().numpy()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """In place, in one message. A rank that had no work adds zeros."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        _unflatten(flat, gradients)

    def equalise(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gives every rank the values of rank 0, in one message."""
        if self.size == 1:
            return
        values = [parameter.detach() for parameter in parameters]
        flat = torch.cat([value.flatten() for value in values])
        dist.broadcast(flat, src=0)
        _unflatten(flat, values)

    def shard(self, decoder: nn.Module, whole: set[nn.Parameter]) -> None:
        """Splits the decoder's layers over the ranks; each is gathered while it computes, forward and backward.

        What is in `whole` stays whole on every rank, and so does what is outside the layers (embeddings, last norm).

        Raises:
            ConfigError: the decoder has no list of layers.
        """
        assert self._device is not None
        layers = [layer for child in decoder.children() if isinstance(child, nn.ModuleList) for layer in child]
        if not layers:
            raise ConfigError(f"learner.shard_base=true: {type(decoder).__name__} has no list of layers; set it to false")
        mesh = init_device_mesh(self._device.type, (self.size,))
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        # The root has nothing of its own; it is there so that the layers are gathered ahead of their turn.
        fully_shard(decoder, mesh=mesh, ignored_params=whole | (set(decoder.parameters()) - inside))


def open_store(host: str, size: int) -> TCPStore:
    """Rank 0's side of the meeting: listens at `host` alone, at a port that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, size, is_master=True, timeout=TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def reach_store(host: str, port: int, size: int) -> TCPStore:
    """The other ranks' side of the meeting."""
    return TCPStore(host, port, size, is_master=False, timeout=TIMEOUT, wait_for_workers=False)


def _interfaces_to(host: str, port: int) -> list[str]:
    """The network interface by which this machine reaches the meeting, where it can be told: ranks talk over that one."""
    with socket.create_connection((host, port)) as connection:
        own = connection.getsockname()[0]
    return [name for name, has in psutil.net_if_addrs().items() if own in {address.address for address in has}]


def _unflatten(flat: Tensor, into: Sequence[Tensor]) -> None:
    for part, tensor in zip(flat.split([tensor.numel() for tensor in into]), into, strict=True):
        tensor.copy_(part.view_as(tensor))
