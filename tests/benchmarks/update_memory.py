"""Peak memory of an update above what the process held before it: chunked output layer against materialised logits.

    python -m tests.benchmarks.update_memory [--repeats 5]

Each measurement is a process of its own. 4,096 packed tokens, all of the 49,152 columns, gradient checkpointing in both.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import torch

from tests.benchmarks.figures import ratio, report
from tests.benchmarks.runs import ALL_LAYERS

TOKENS, PROMPT, LENGTH = 4096, 64, 63


class _Mallinfo(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def allocated() -> int:
    """Bytes that the process has allocated and not freed. Resident memory would count what glibc keeps for later, too."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


class PeakMemory:
    """Largest allocation while it is open, less that at the start; bytes."""

    def __enter__(self) -> PeakMemory:
        self._before = self.bytes = allocated()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, allocated())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes -= self._before


def materialised(model: Any, hidden_LH: torch.Tensor, position_Q: np.ndarray, token_Q: np.ndarray, *_: Any) -> torch.Tensor:
    """`LanguageModel.log_probs` as it is usually written."""
    log_LV = model.model.get_output_embeddings()(hidden_LH).float().log_softmax(-1)
    return log_LV[torch.from_numpy(position_Q), torch.from_numpy(token_Q)]


def measure(variant: str) -> int:
    from learner.learner import Learner
    from system import config_file
    from system.constraints import Constraints
    from system.language_model import LanguageModel
    from system.models import locate
    from system.trajectory import Prompt
    from tests.benchmarks.update_rate import group_of

    cfg = config_file.load(
        "deploy/configs/continuation.yaml",
        ["learner.threads=2", "learner.gradient_checkpointing=true", f"learner.token_budget={2 * TOKENS}", *ALL_LAYERS],
    )
    constraints = Constraints.of(stop_token=30, min_tokens=1, max_tokens=LENGTH + 1, vocab_size=49152)
    rng = np.random.default_rng(0)
    prompt = Prompt("p", tuple(rng.integers(100, 40000, PROMPT).tolist()), (1,))
    samples = [rng.integers(100, 40000, LENGTH).tolist() for _ in range((TOKENS - PROMPT) // LENGTH)]
    learner = Learner(cfg, locate(cfg.model), constraints, cfg.model.path, prompt.policy_tokens)
    # The first update allocates the optimizer's moments, which stay.
    learner.update([group_of(prompt, [sample[:2] for sample in samples[:4]], rng)])
    if variant == "materialised":
        LanguageModel.log_probs = materialised  # type: ignore[method-assign,assignment]
    with PeakMemory() as peak:
        metrics = learner.update([group_of(prompt, samples, rng)])
    assert metrics["tokens/forwarded"] >= TOKENS - LENGTH
    return peak.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variant", choices=("chunked", "materialised"), help="measure once, in this process")
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments.variant)))
        return
    peaks: dict[str, list[float]] = {"chunked": [], "materialised": []}
    for _ in range(arguments.repeats):
        for variant, values in peaks.items():
            command = [sys.executable, "-m", "tests.benchmarks.update_memory", "--variant", variant]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            values.append(json.loads(line) / 2**20)
    name = f"peak memory of an update above the weights, {TOKENS} tokens: materialised logits over chunked"
    report(ratio(name, peaks["materialised"], peaks["chunked"], 4.0, unit="MiB"))


if __name__ == "__main__":
    main()
