"""Settings of every test: one thread (the machine is shared), no network, and the same generated examples each time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# Read when torch, transformers and the hub client are imported, which the test modules do after this file.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# No deadline: a slow machine is no failure. `tmp_path` is shared by the examples of one test, which is meant.
settings.register_profile(
    "headwater", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("headwater")


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    """The packaged model's tokenizer."""
    # Imported here: most tests do without transformers.
    from system.config_file import parse
    from system.models import locate
    from system.pretrained import load_tokenizer

    return load_tokenizer(locate(parse({"task": {"kind": "random_number"}}).model))
