"""What a job shows while it runs: a live display on a terminal, and plain lines elsewhere, as in the log of a Ray job."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 5.0
"""Between two plain lines."""


@dataclass
class Standing:
    """Where a run stands."""

    name: str
    steps: int
    """Of the whole run."""
    step: int = 0
    seconds_left: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the last update, as the orchestrator logs them."""
    sampler_idle: dict[str, float] = field(default_factory=dict)
    """Sampler -> share of the time since its start in which it neither drew nor installed."""


class Progress(Protocol):
    def update(self, standing: Standing) -> None:
        """After each step."""
        ...

    def say(self, text: str) -> None:
        """A message that stays."""
        ...

    def close(self) -> None: ...


def show(out: IO[str] | None = None) -> Progress:
    """On `out`, by default stdout: live if it is a terminal that can be drawn on."""
    stream: IO[str] = sys.stdout if out is None else out
    console = Console(file=stream, highlight=False)
    return Screen(console) if console.is_terminal and not console.is_dumb_terminal else Lines(stream)


class Lines:
    """A line every few seconds and after the last step."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._last = -float("inf")

    def update(self, standing: Standing) -> None:
        now = time.monotonic()
        if now - self._last > LINE_SECONDS or standing.step == standing.steps:
            self._last = now
            self.say("  ".join([f"step {standing.step}/{standing.steps}", *_figures(standing), _left(standing)]))

    def say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def close(self) -> None:
        pass


class Screen:
    """Redrawn in place. What is printed or logged meanwhile appears above it."""

    def __init__(self, console: Console) -> None:
        # stderr that goes to a file stays there.
        self._live = Live(console=console, refresh_per_second=4, redirect_stderr=sys.stderr.isatty())
        before = sys.stderr
        self._live.start()
        # Log handlers have kept the stderr of before, and would write across the display.
        handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]
        self._moved = [(handler, before) for handler in handlers if handler.stream is before]
        for handler, _ in self._moved:
            handler.setStream(sys.stderr)

    def update(self, standing: Standing) -> None:
        self._live.update(render(standing))

    def say(self, text: str) -> None:
        self._live.console.print(Text(text))

    def close(self) -> None:
        """Leaves the last state on the terminal. May be called twice."""
        for handler, before in self._moved:
            handler.setStream(before)
        self._moved = []
        self._live.stop()


def render(standing: Standing) -> RenderableType:
    head = Table.grid(padding=(0, 2), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    bar = ProgressBar(total=standing.steps, completed=standing.step)
    head.add_row(Text(standing.name, "bold"), bar, f"{standing.step}/{standing.steps}  {_left(standing)}")
    figures = _figures(standing)
    return Group(head, Text("   ".join(figures[:5])), Text("   ".join(figures[5:]), "dim"))


def _figures(standing: Standing) -> list[str]:
    """Five of the policy, then those of the system."""
    metrics = standing.metrics
    idle = standing.sampler_idle.values()
    return [
        f"loss {metrics['loss']:.4g}",
        f"log_z {metrics['log_z']:.3f}",
        f"spread {metrics['spread']:.3g}",
        f"ess {metrics['ess']:.2f}",
        f"length {metrics['length/mean']:.1f}",
        f"{metrics['rate/trajectories_per_second']:.1f} traj/s",
        f"staleness {metrics['staleness']:.1f}",
        f"learner idle {metrics['idle/learner']:.0%}",
        *([f"samplers idle {sum(idle) / len(idle):.0%}"] if idle else []),
        *([f"deaths {metrics['samplers/deaths']:.0f}"] if metrics["samplers/deaths"] else []),
    ]


def _left(standing: Standing) -> str:
    minutes, seconds = divmod(round(standing.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min left"
    return f"{minutes} min {seconds:02} s left" if minutes else f"{seconds} s left"
