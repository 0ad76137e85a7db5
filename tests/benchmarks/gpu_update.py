"""The packed update on a GPU, with block attention and with dense masks: tokens a second, share of the peak, memory.

    python -m tests.benchmarks.gpu_update [--models 135M 1B] [--dtype bfloat16] [--repeats 5]
    python -m tests.benchmarks.gpu_update --device cpu --tiny     # shows that this file runs; its figures say nothing

135M is the packaged model, 1B a Llama of that size with random weights. An update is a row of trees: GROUPS prompts with K
random samples each, which share the prompt alone. The peak is what this device reaches in a large matrix product; the work
counted is that of `tests/benchmarks/work.py`: a forward pass and the gradients, of attention the visible pairs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from learner.learner import Learner
from system import config_file
from system.config import Model
from system.constraints import Constraints
from system.models import locate
from system.trajectory import Group, Prompt
from tests import tiny
from tests.benchmarks.figures import Figure, in_turns, ratio, report, seconds
from tests.benchmarks.runs import ALL_LAYERS
from tests.benchmarks.update_memory import PeakMemory
from tests.benchmarks.update_rate import group_of
from tests.benchmarks.work import operations, peak, wait

WAYS = ("dense", "block")


@dataclass(frozen=True)
class Size:
    """Of the work. A group is prompt + samples * length tokens."""

    prompt: int
    samples: int
    length: int
    groups: int
    """Of an update that is timed: one row."""
    groups_in_memory: int
    """Of the row whose memory is measured."""
    matrix: int
    """Side of the product that gives the peak."""


LARGE = Size(prompt=512, samples=32, length=112, groups=2, groups_in_memory=8, matrix=8192)
SMALL = Size(prompt=20, samples=6, length=40, groups=2, groups_in_memory=3, matrix=512)


def one_billion(folder: Path, dtype: torch.dtype) -> Path:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def groups_of(size: Size, count: int, vocab_size: int) -> list[Group]:
    rng = np.random.default_rng(0)
    groups = []
    for index in range(count):
        prompt = Prompt(str(index), tuple(rng.integers(5, vocab_size, size.prompt).tolist()), (1,))
        groups.append(group_of(prompt, rng.integers(5, vocab_size, (size.samples, size.length)).tolist(), rng))
    return groups


@contextmanager
def peak_mib(device: torch.device, into: list[float]) -> Any:
    """Appends the largest allocation inside, less that at the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        into.append((torch.cuda.max_memory_allocated(device) - before) / 2**20)
    else:
        with PeakMemory() as memory:
            yield
        into.append(memory.bytes / 2**20)


def learner_of(folder: Path, way: str, dtype: str, device: torch.device, size: Size, checkpointing: bool) -> Learner:
    tokens = max(size.groups, size.groups_in_memory) * (size.prompt + size.samples * size.length)
    overrides = [
        f"learner.attention={way}", f"learner.dtype={dtype}", f"learner.device={device}", "learner.threads=2",
        f"learner.token_budget={tokens}", "learner.logits_chunk=2048", f"learner.gradient_checkpointing={checkpointing}",
        *ALL_LAYERS,
    ]  # fmt: skip
    cfg = config_file.load("deploy/configs/continuation.yaml", overrides)
    vocab_size = AutoConfig.from_pretrained(folder).vocab_size
    constraints = Constraints.of(stop_token=4, min_tokens=1, max_tokens=size.length + 1, vocab_size=vocab_size)
    return Learner(cfg, folder, constraints, "base", list(range(5, 29)))


def measure(name: str, folder: Path, dtype: str, device: torch.device, size: Size, repeats: int) -> None:
    def updating(learner: Learner, groups: Sequence[Group]) -> Callable[[], None]:
        return lambda: (learner.update(groups), wait(device))[1]

    learners = {way: learner_of(folder, way, dtype, device, size, checkpointing=False) for way in WAYS}
    groups = groups_of(size, size.groups, learners["dense"].constraints.vocab_size)
    tokens = learners["dense"].update(groups)["tokens/forwarded"]
    times = in_turns({way: seconds(updating(learner, groups)) for way, learner in learners.items()}, repeats, warm_up=2)
    top, work = peak(device, getattr(torch, dtype), size.matrix), operations(learners["dense"], groups)
    what = {"tokens": int(tokens), "dtype": dtype, "operations_per_second_of_a_product": top}
    for way, spent in times.items():
        report(
            Figure(f"packed update, {name}, {way} attention", "tokens/s", [tokens / each for each in spent], detail=what),
            Figure(f"packed update, {name}, {way} attention, share of the peak", "", [work / each / top for each in spent]),
        )
    report(ratio(f"packed update, {name}, dense masks over block attention", times["dense"], times["block"], 1.0, **what))
    del learners
    memory: dict[str, list[float]] = {way: [] for way in WAYS}
    for way, values in memory.items():
        learner = learner_of(folder, way, dtype, device, size, checkpointing=True)
        groups = groups_of(size, size.groups_in_memory, learner.constraints.vocab_size)
        # The first update allocates the optimizer's moments, which stay.
        learner.update(groups[:1])
        try:
            with peak_mib(device, values):
                tokens = learner.update(groups)["tokens/forwarded"]
        except torch.OutOfMemoryError as error:
            print(f"{name}, {way} attention: {error}", file=sys.stderr)
            continue
        report(Figure(f"memory of an update above the weights, {name}, {way} attention, {tokens:.0f} tokens", "MiB", values))
        del learner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=("135M", "1B"), nargs="+", default=["135M", "1B"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short rows")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_update needs a CUDA device, and torch sees none; --device cpu --tiny shows that its code runs")
    if device.type == "cpu":
        # torch has the plain gradient of block attention, but offers it on a GPU alone.
        flex_attention._validate_device = lambda *_: None  # type: ignore[attr-defined,assignment]
    with tempfile.TemporaryDirectory(prefix="headwater-gpu-update-") as temporary:
        for name in ["tiny"] if arguments.tiny else arguments.models:
            match name:
                case "tiny":
                    folder = tiny.folder(Path(temporary))
                case "1B":
                    folder = one_billion(Path(temporary) / "1B", getattr(torch, arguments.dtype))
                case _:
                    folder = locate(Model())
            measure(name, folder, arguments.dtype, device, SMALL if arguments.tiny else LARGE, arguments.repeats)


if __name__ == "__main__":
    main()
