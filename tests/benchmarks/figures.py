"""What every benchmark measures with and reports in: work in turns within one process, ratios, and their spread."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    name: str
    unit: str
    """`x` for a ratio that is better when larger."""
    values: Sequence[float]
    """One for each repeat."""
    at_least: float | None = None
    at_most: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def reached(self) -> bool:
        over = self.at_least is None or self.median >= self.at_least
        return over and (self.at_most is None or self.median <= self.at_most)

    @property
    def wanted(self) -> str:
        bounds = (("≥", self.at_least), ("≤", self.at_most))
        return " and ".join(f"{sign} {value:g} {self.unit}" for sign, value in bounds if value is not None) or "-"


def seconds(work: Callable[[], Any]) -> Callable[[], float]:
    """`work` as something that returns how long it took."""

    def timed() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return timed


def in_turns(runs: dict[str, Callable[[], float]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Each run's result by repeat. In turns, so that what else the machine does meets all of them alike."""
    results: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(warm_up + repeats):
        for name, run in runs.items():
            value = run()
            if repeat >= warm_up:
                results[name].append(value)
    return results


def ratio(name: str, slow: Sequence[float], fast: Sequence[float], at_least: float | None, **detail: Any) -> Figure:
    """Figure of slow / fast, repeat by repeat: seconds of a baseline over ours, or our rate over a baseline's."""
    medians = {"slow": round(statistics.median(slow), 4), "fast": round(statistics.median(fast), 4)}
    return Figure(name, "x", [a / b for a, b in zip(slow, fast, strict=True)], at_least, None, medians | detail)


def report(*figures: Figure) -> None:
    """One line of JSON for each, which `python -m tests.benchmarks` gathers."""
    for figure in figures:
        print(json.dumps(asdict(figure)), flush=True)


def table(figures: Sequence[Figure]) -> str:
    """Markdown."""
    lines = ["| figure | wanted | median | smallest to largest | repeats | |", "|---|---|---|---|---|---|"]
    for f in figures:
        spread = f"{min(f.values):.3g} to {max(f.values):.3g}"
        mark = "" if f.wanted == "-" else "reached" if f.reached else "missed"
        lines.append(f"| {f.name} | {f.wanted} | {f.median:.3g} {f.unit} | {spread} | {len(f.values)} | {mark} |")
    return "\n".join(lines)
