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
    from _pytest.terminal import TerminalReporter
    from transformers import PreTrainedTokenizerBase

# No deadline: a slow machine is no failure. `tmp_path` is shared by the examples of one test, which is meant.
settings.register_profile(
    "headwater", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("headwater")


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """What tests measured by the way (`record_property`), such as how long it takes until a fault is over."""
    passed = terminalreporter.stats.get("passed", [])
    if rows := [(report.nodeid, *row) for report in passed if report.when == "call" for row in report.user_properties]:
        terminalreporter.section("measured")
        for test, name, value in rows:
            terminalreporter.write_line(f"{value}  {name}  ({test})")


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    """The packaged model's tokenizer."""
    # Imported here: most tests do without transformers.
    from system.config_file import parse
    from system.models import locate
    from system.pretrained import load_tokenizer

    return load_tokenizer(locate(parse({"task": {"kind": "random_number"}}).model))
