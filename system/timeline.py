"""Who did what when: spans of work in every process of a run, for the usual trace viewers.

The result opens in ui.perfetto.dev or chrome://tracing (the Chrome trace event format). Times are those of each machine's
clock; between machines they are as good as the clocks agree.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

KEPT = 5_000
"""Spans that wait in a process to be drained; the oldest are lost first."""
JOINED_SECONDS = 0.005
"""Spans of one name and track that are no further apart become one: a sampler's steps of one token, for example."""


@dataclass(slots=True)
class Span:
    name: str
    track: str
    """A row of the viewer: work that does not overlap."""
    start: float
    """Seconds since 1970."""
    end: float
    facts: dict[str, Any] = field(default_factory=dict)
    cpu: float = 0.0
    """Seconds of the thread's own processor time in it."""


class Timeline:
    """The spans of one process. Thread-safe."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=KEPT)
        self._lock = threading.Lock()

    @contextmanager
    def span(self, name: str, track: str, **facts: Any) -> Iterator[None]:
        """The time inside, also when it ends by an error."""
        started, cpu = time.time(), time.thread_time()
        try:
            yield
        finally:
            self.add(Span(name, track, started, time.time(), facts, time.thread_time() - cpu))

    def add(self, span: Span) -> None:
        with self._lock:
            last = self._spans[-1] if self._spans else None
            same = last is not None and (last.name, last.track, last.facts) == (span.name, span.track, span.facts)
            if last is not None and same and 0 <= span.start - last.end < JOINED_SECONDS:
                last.end, last.cpu = span.end, last.cpu + span.cpu
            else:
                self._spans.append(span)

    def drain(self) -> list[Span]:
        """The spans since the last time."""
        with self._lock:
            spans = list(self._spans)
            self._spans.clear()
        return spans


def busy_fraction(spans: Iterable[Span], start: float, end: float) -> float:
    """Share of [start, end] that is covered by at least one span."""
    covered, reached = 0.0, start
    for span in sorted(spans, key=lambda span: span.start):
        low, high = max(span.start, reached), min(span.end, end)
        if high > low:
            covered += high - low
            reached = high
    return covered / (end - start) if end > start else 0.0


def chrome_trace(processes: Mapping[str, Iterable[Span]]) -> dict[str, Any]:
    """Process name -> spans, as a JSON object in the Chrome trace event format; microseconds."""
    events: list[dict[str, Any]] = []
    for pid, (process, spans) in enumerate(processes.items(), 1):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}})
        tracks: dict[str, int] = {}
        for span in spans:
            if span.track not in tracks:
                tracks[span.track] = len(tracks) + 1
                row = {"pid": pid, "tid": tracks[span.track], "args": {"name": span.track}}
                events.append({"ph": "M", "name": "thread_name", **row})
            events.append({
                "ph": "X", "name": span.name, "cat": span.track, "pid": pid, "tid": tracks[span.track],
                "ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6, "tdur": span.cpu * 1e6, "args": span.facts,
            })  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}
