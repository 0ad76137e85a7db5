"""The sampler: versions on a real vLLM, and what its threads do around an engine that the test controls."""

from __future__ import annotations

import json
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.behaviour import TokenDraw
from actors.build import SHORTEST_CONTEXT, build_sampler, engine_settings
from actors.engine import Engine, Installed
from actors.sampler import EngineDied, Sampler
from actors.settings import BLOCK
from deploy.prepare import prepare
from system.adapters import Adapter, AdapterError
from system.config import ConfigError
from system.config_file import parse
from system.constraints import Constraints
from system.scores import Scores
from system.tasks.problem import Problem
from system.trajectory import Behaviour, Prompt, Request, Trajectory
from tests import lora, tiny

CONSTRAINTS = Constraints.of(stop_token=5, min_tokens=1, max_tokens=8, vocab_size=tiny.VOCABULARY, allowed=range(3, 40))
PROMPT = Prompt("p", (1, 7, 9), (1,))
PROBLEM = Problem((PROMPT,), CONSTRAINTS, (5,))
BEHAVIOURS = (Behaviour(), Behaviour(1.5), Behaviour(1.0, 0.2))
SECONDS = 30
"""Longest wait in a test for a thread that should answer at once."""


class Lengths:
    """log R = -T, from a minimum of one token on."""

    tokens_forwarded = progress = 0

    def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
        return Scores([np.array([np.nan, *np.arange(-1.0, -len(t) - 1, -1)]) for t in trajectories_K])


def test_settings_that_vllm_refuses_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Engine:
        raise ValueError("no kernel for head size 12")

    monkeypatch.setattr("actors.build.Engine", refuse)
    tree = {"model": {"path": str(tiny.folder(tmp_path))}, "task": {"kind": "random_number", "high": 9}}
    cfg = parse(tree)
    problem = prepare(cfg).problem
    with pytest.raises(ConfigError, match="cannot be run by vLLM with the settings of sampler: no kernel for head size 12"):
        build_sampler(cfg, problem)


def request_of(group_id: int) -> Request:
    return Request(group_id, PROMPT, BEHAVIOURS, seed=group_id)


@pytest.mark.parametrize(
    ("engine", "learner", "by_mean", "tolerance"),
    [("float32", "float32", True, 0.005), ("bfloat16", "float32", False, 0.15), ("float32", "bfloat16", False, 0.15)],
)
def test_a_canary_is_judged_by_its_mean_where_both_compute_in_float32(
    engine: str, learner: str, by_mean: bool, tolerance: float
) -> None:
    config = parse({"task": {"kind": "random_number"}, "sampler": {"dtype": engine}, "learner": {"dtype": learner}})
    settings = engine_settings(config, PROBLEM, tiny.CONTEXT)
    assert (settings.canary_by_mean, settings.canary_tolerance) == (by_mean, tolerance)


def test_the_engine_has_the_tool_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []

    def build(*arguments: Any) -> None:
        built.append(arguments[4])
        raise MemoryError

    monkeypatch.setattr("actors.build.Engine", build)
    config = parse({"model": {"path": str(tiny.folder(tmp_path))}, "task": {"kind": "random_number", "high": 9}})
    tool: Any = object()
    problem = replace(prepare(config).problem, tool=tool)
    with pytest.raises(MemoryError):
        build_sampler(config, problem)
    assert built == [tool]


# ------------------------------------------------------------------------------------------------- on a real vLLM


def test_a_model_with_the_shortest_context_that_a_config_is_accepted_with_draws(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path)
    task = {"kind": "random_number", "high": 9}
    cfg = parse({"model": {"path": str(folder)}, "task": task, "sampler": {"kv_cache_mb": 16}, "lora": {"rank": 4}})
    shortest = prepare(cfg).problem.longest_prompt + cfg.task.max_tokens + 1
    assert shortest < SHORTEST_CONTEXT
    assert shortest % BLOCK
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": shortest}))
    problem = prepare(cfg).problem
    adapter = replace(lora.publish(0, lora.adapted(folder, lora.TARGETS["llama"], seed=0)), base_model=cfg.model.path)
    sampler = build_sampler(cfg, problem)
    try:
        group = sampler.sample(Request(0, problem.prompts[0], (Behaviour(),) * 8, 0), adapter)
    finally:
        sampler.close()
    assert len(group.trajectories_K) == 8
    assert all(problem.constraints.admits(trajectory.tokens_T.tolist()) for trajectory in group.trajectories_K)


class Real:
    def __init__(self, folder: Path) -> None:
        tree = {
            "model": {"path": lora.NAME},
            "lora": {"rank": 4},
            "task": {"kind": "random_number"},
            "sampler": {"kv_cache_mb": 16, "install": "merged", "drain": True},
        }
        self.models = [lora.adapted(folder, lora.TARGETS["llama"], seed=number) for number in range(4)]
        self.adapters = [lora.publish(number, model) for number, model in enumerate(self.models)]
        settings = engine_settings(parse(tree), PROBLEM, tiny.CONTEXT)
        self.sampler = Sampler(lambda: Engine(folder, lora.NAME, CONSTRAINTS, settings), Lengths())

    def drawn_by(self, trajectories_K: Sequence[Trajectory]) -> set[int]:
        """Versions whose log-probs are those of the trajectories."""
        errors = [
            max(float(np.abs(lora.drawn_log_probs(model, CONSTRAINTS, PROMPT, t) - t.logp_T).max()) for t in trajectories_K)
            for model in self.models
        ]
        return {version for version, error in enumerate(errors) if error < 1e-3}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    real = Real(tiny.folder(tmp_path_factory.mktemp("real")))
    yield real
    real.sampler.close()


def test_concurrent_groups_name_the_version_that_drew_them(real: Real) -> None:
    def client(number: int) -> list[Any]:
        versions = np.sort(np.random.default_rng(number).integers(0, 3, size=6))
        return [(v, real.sampler.sample(request_of(100 * number + i), real.adapters[v])) for i, v in enumerate(versions)]

    with ThreadPoolExecutor(4) as clients:
        answers = [answer for batch in clients.map(client, range(4)) for answer in batch]
    assert sorted(group.group_id for _, group in answers) == sorted(100 * n + i for n in range(4) for i in range(6))
    for wanted, group in answers:
        assert group.adapter_version >= wanted
        assert real.drawn_by(group.trajectories_K) == {group.adapter_version}
        assert [t.behaviour for t in group.trajectories_K] == list(BEHAVIOURS)
        for trajectory, log_reward_T in zip(group.trajectories_K, group.log_reward_K, strict=True):
            np.testing.assert_array_equal(log_reward_T[1:], -np.arange(1.0, len(trajectory) + 1))
    assert {group.adapter_version for _, group in answers} == {0, 1, 2}


def test_an_older_version_is_served_by_the_newer_and_says_so(real: Real) -> None:
    real.sampler.sample(request_of(0), real.adapters[2])
    group = real.sampler.sample(request_of(1), real.adapters[0])
    assert group.adapter_version == 2
    assert real.drawn_by(group.trajectories_K) == {2}


def test_a_refused_version_reaches_its_caller_and_the_known_ones_are_still_drawn(real: Real) -> None:
    real.sampler.sample(request_of(0), real.adapters[2])
    lying = replace(real.adapters[3], canary=real.adapters[1].canary)
    with pytest.raises(AdapterError, match="version 3"):
        real.sampler.sample(request_of(2), lying)
    assert real.sampler.stats()["version"] == -1
    # Its merged weights are in the engine now, and must not be drawn from under any name.
    group = real.sampler.sample(request_of(3), real.adapters[2])
    assert group.adapter_version == 2
    assert real.drawn_by(group.trajectories_K) == {2}
    damaged = replace(real.adapters[3], weights=real.adapters[3].weights[:-4])
    with pytest.raises(AdapterError, match="damaged"):
        real.sampler.sample(request_of(4), damaged)
    assert real.sampler.stats()["version"] == 2
    assert real.sampler.sample(request_of(4), real.adapters[3]).adapter_version == 3


def test_a_version_that_is_published_again_with_other_weights_is_installed(real: Real) -> None:
    real.sampler.sample(request_of(0), real.adapters[3])
    again = lora.publish(3, real.models[1])
    group = real.sampler.sample(request_of(5), again)
    assert group.adapter_version == 3
    assert real.drawn_by(group.trajectories_K) == {1}


def test_stats_count_what_was_done(real: Real) -> None:
    real.sampler.sample(request_of(5), lora.publish(10, real.models[0]))
    before, progress = real.sampler.stats(), real.sampler.progress
    group = real.sampler.sample(request_of(6), real.adapters[0])
    after = real.sampler.stats()
    assert before["version"] == after["version"] == 10
    assert real.sampler.progress >= progress + after["tokens"] - before["tokens"] > progress
    assert after["groups"] == before["groups"] + 1
    stops = sum(t.stop == "sampled" for t in group.trajectories_K)
    assert after["tokens"] == before["tokens"] + group.tokens + stops
    assert after["generate_seconds"] > before["generate_seconds"]
    assert after["canary_error"] == before["canary_error"] < 1e-3 < after["canary_signal"]
    assert 0 < after["busy"] < 1


# --------------------------------------------------------------------------------- around an engine of the test's own


class ScriptedEngine:
    """Finishes a group on each step; `before_step` may block or raise, and a version in `refuse` is refused, with which what
    runs is dropped. With `drain` no version is taken while something runs."""

    def __init__(self, before_step: Callable[[], None] = lambda: None, refuse: Sequence[int] = (), drain: bool = False) -> None:
        self.before_step, self.refuse, self.drain = before_step, refuse, drain
        self.installed: Adapter | None = None
        self.tokens, self.ticket = 0, 0
        self.running: list[tuple[int, Request]] = []
        self.log: list[str] = []
        self.closed = False

    @property
    def busy(self) -> bool:
        return bool(self.running)

    @property
    def takes_version(self) -> bool:
        return not (self.drain and self.running)

    @property
    def progress(self) -> int:
        return self.tokens

    def check(self, request: Request) -> None:
        if not request.behaviours_K:
            raise ValueError("no samples")

    def add(self, request: Request) -> int:
        assert self.installed is not None
        self.log.append(f"start {request.group_id} on {self.installed.version}")
        self.ticket += 1
        self.running.append((self.ticket, request))
        return self.ticket

    def step(self) -> list[tuple[int, tuple[Trajectory, ...]]]:
        self.before_step()
        ticket, request = self.running.pop(0)
        self.log.append(f"end {request.group_id}")
        one = Trajectory(np.array([3], np.int32), np.ones(1, bool), np.zeros(2, np.float32), "sampled")
        return [(ticket, (one,) * len(request.behaviours_K))]

    def install(self, adapter: Adapter) -> Installed:
        assert self.takes_version
        self.log.append(f"install {adapter.version}")
        if adapter.version in self.refuse:
            self.installed = None
            self.running.clear()
            raise AdapterError(f"version {adapter.version} is refused")
        self.installed = adapter
        return Installed()

    def close(self) -> None:
        self.closed = True


def adapter_of(version: int) -> Adapter:
    return Adapter.of(version, version, {}, {}, lora.NAME)


class Held:
    """A sampler whose engine stands still before each step until `release`."""

    def __init__(self, on_death: Callable[[], None] = lambda: None, refuse: Sequence[int] = (), drain: bool = False) -> None:
        self.gate = threading.Semaphore(0)
        self.error: BaseException | None = None
        self.reached = threading.Semaphore(0)
        self.engine = ScriptedEngine(self._before_step, refuse, drain)
        engine: Any = self.engine
        self.sampler = Sampler(lambda: engine, Lengths(), on_death)
        self._clients = ThreadPoolExecutor(16)

    def _before_step(self) -> None:
        self.reached.release()
        assert self.gate.acquire(timeout=SECONDS)
        if self.error:
            raise self.error

    def sample(self, group_id: int, version: int) -> Future[Any]:
        """In a thread of its own; returns once it is queued, so that the order of requests is that of the calls."""
        before = len(self.sampler._queue) + len(self.engine.log)
        future = self._clients.submit(self.sampler.sample, request_of(group_id), adapter_of(version))
        deadline = threading.Event()
        while len(self.sampler._queue) + len(self.engine.log) == before and not future.done():
            deadline.wait(0.001)
        return future

    def release(self, steps: int = 100) -> None:
        self.gate.release(steps)


def log_of_two_versions(held: Held) -> list[str]:
    """What the engine did while two groups of a version ran, one of the next came, and one of the first again."""
    futures = [held.sample(0, 1)]
    assert held.reached.acquire(timeout=SECONDS)
    futures += [held.sample(1, 1), held.sample(2, 2), held.sample(3, 1)]
    held.release()
    versions = [future.result(SECONDS).adapter_version for future in futures]
    held.sampler.close()
    assert versions == [1, 1, 2, 2]
    return held.engine.log


def test_a_newer_version_is_installed_while_groups_run_and_each_names_the_one_that_it_was_begun_with() -> None:
    log = log_of_two_versions(Held())
    assert log.index("start 1 on 1") < log.index("install 2") < log.index("end 1")


def test_what_is_dropped_with_a_refused_version_fails_by_its_error() -> None:
    held = Held(refuse=[2])
    futures = [held.sample(0, 1)]
    assert held.reached.acquire(timeout=SECONDS)
    futures += [held.sample(1, 1), held.sample(2, 2)]
    after = held.sample(3, 1)
    held.release()
    assert futures[0].result(SECONDS).adapter_version == 1
    for lost in futures[1:]:
        assert "version 2 is refused" in str(lost.exception(SECONDS))
    assert after.result(SECONDS).adapter_version == 1
    held.sampler.close()


def test_with_drain_running_groups_finish_before_a_newer_version_is_installed() -> None:
    held = Held(drain=True)
    log = log_of_two_versions(held)
    assert log.index("install 2") > max(log.index("end 0"), log.index("end 1"))
    assert log.index("start 2 on 2") > log.index("install 2")
    assert held.engine.closed


def test_the_engine_is_made_and_stepped_by_one_thread() -> None:
    """Each thread that computes has OpenMP threads of its own."""
    by: list[int] = []

    def make() -> Any:
        by.append(threading.get_ident())
        return ScriptedEngine(lambda: by.append(threading.get_ident()))

    sampler = Sampler(make, Lengths())
    sampler.sample(request_of(0), adapter_of(1))
    sampler.close()
    assert len(by) == 2 and len(set(by)) == 1 and by[0] != threading.get_ident()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Also where these tests run in the background of a shell, which ignores SIGINT there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_who_interrupts_the_making_of_an_engine_leaves_none() -> None:
    interrupted, engine = threading.Event(), ScriptedEngine()

    def make() -> Any:
        time.sleep(0.2)  # whoever waits does so by then
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert interrupted.wait(SECONDS)
        return engine

    threading.Timer(0.7, interrupted.set).start()
    with pytest.raises(KeyboardInterrupt):
        Sampler(make, Lengths())
    assert engine.closed


def test_an_engine_that_cannot_be_made_says_why() -> None:
    def make() -> Any:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        Sampler(make, Lengths())


def test_a_version_that_arrives_twice_is_installed_once_and_a_late_one_never() -> None:
    engine: Any = ScriptedEngine()
    sampler = Sampler(lambda: engine, Lengths())
    for version in (1, 1, 2, 1, 2):
        assert sampler.sample(request_of(0), adapter_of(version)).adapter_version >= version
    sampler.close()
    assert [line for line in engine.log if line.startswith("install")] == ["install 1", "install 2"]


def test_a_version_that_did_not_arrive_is_never_sampled_from_silently() -> None:
    """An engine that says it has installed a version and runs the old one, or none at all."""
    told = threading.Event()
    engine: Any = ScriptedEngine()
    sampler = Sampler(lambda: engine, Lengths(), told.set)
    assert sampler.sample(request_of(0), adapter_of(1)).adapter_version == 1
    engine.install = lambda adapter: {"seconds": 0.0}
    with pytest.raises(EngineDied, match="version 2 was installed, but the engine has 1"):
        sampler.sample(request_of(1), adapter_of(2))
    assert told.wait(SECONDS), "the process ends: what its engine runs is not known"
    assert "start 1 on 1" not in engine.log
    sampler.close()


def test_every_waiting_caller_learns_that_the_engine_died() -> None:
    told = threading.Event()
    held = Held(on_death=told.set)
    futures = [held.sample(0, 1)]
    assert held.reached.acquire(timeout=SECONDS)
    futures += [held.sample(number, version) for number, version in ((1, 1), (2, 2), (3, 1))]
    held.error = MemoryError("KV cache")
    held.release()
    for future in futures:
        error = future.exception(SECONDS)
        assert isinstance(error, EngineDied)
        assert "MemoryError: KV cache" in str(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert told.wait(SECONDS)
    with pytest.raises(EngineDied, match="KV cache"):
        held.sampler.sample(request_of(9), adapter_of(1))
    held.sampler.close()


def test_a_refused_version_fails_its_own_callers_alone() -> None:
    told = threading.Event()
    held = Held(on_death=told.set, refuse=[2], drain=True)
    first = held.sample(0, 1)
    assert held.reached.acquire(timeout=SECONDS)
    refused, after = held.sample(1, 2), held.sample(2, 1)
    held.release()
    assert first.result(SECONDS).adapter_version == 1
    assert isinstance(refused.exception(SECONDS), AdapterError)
    assert after.result(SECONDS).adapter_version == 1
    assert held.engine.log[-4:] == ["install 2", "install 1", "start 2 on 1", "end 2"]
    held.sampler.close()
    assert not told.is_set()


def test_the_engine_goes_on_while_a_reward_is_computed() -> None:
    computing, finish = threading.Event(), threading.Event()

    class Slow(Lengths):
        def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
            computing.set()
            assert finish.wait(SECONDS)
            return super().score(prompt, trajectories_K)

    engine: Any = ScriptedEngine()
    sampler = Sampler(lambda: engine, Slow())
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(sampler.sample, request_of(0), adapter_of(1))
        assert computing.wait(SECONDS)
        second = clients.submit(sampler.sample, request_of(1), adapter_of(1))
        while "end 1" not in engine.log:
            assert not first.done()
        finish.set()
        assert {first.result(SECONDS).group_id, second.result(SECONDS).group_id} == {0, 1}
    sampler.close()


def test_an_error_of_the_reward_is_its_callers_and_the_sampler_goes_on() -> None:
    class Picky(Lengths):
        def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
            if len(trajectories_K) == 1:
                raise ArithmeticError("log of zero")
            return super().score(prompt, trajectories_K)

    engine: Any = ScriptedEngine()
    sampler = Sampler(lambda: engine, Picky())
    with pytest.raises(ArithmeticError, match="log of zero"):
        sampler.sample(Request(0, PROMPT, (Behaviour(),), 0), adapter_of(1))
    assert sampler.sample(request_of(1), adapter_of(1)).group_id == 1
    with pytest.raises(ValueError, match="no samples"):
        sampler.sample(Request(2, PROMPT, (), 0), adapter_of(1))
    sampler.close()


def test_samples_without_a_reward_are_left_out_of_their_group_with_the_reason() -> None:
    class Picky(Lengths):
        def score(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Scores:
            faults = {0: "log of zero", 2: "no answer"}
            return replace(super().score(prompt, trajectories_K), faults=faults, factors_K={"rank": np.arange(3.0)})

    engine: Any = ScriptedEngine()
    sampler = Sampler(lambda: engine, Picky())
    group = sampler.sample(request_of(0), adapter_of(1))
    assert group.faults == ("log of zero", "no answer")
    assert len(group.trajectories_K) == len(group.log_reward_K) == 1
    assert {name: value_K.tolist() for name, value_K in group.factors_K.items()} == {"rank": [1.0]}
    assert sampler.score(PROMPT, group.trajectories_K).faults == {0: "log of zero", 2: "no answer"}
    sampler.close()


def test_closing_answers_those_who_wait() -> None:
    held = Held()
    waiting = held.sample(0, 1)
    assert held.reached.acquire(timeout=SECONDS)
    behind = held.sample(1, 2)
    closing = threading.Thread(target=held.sampler.close)
    closing.start()
    while held.sampler._ended is None:
        threading.Event().wait(0.001)
    held.release()
    closing.join(SECONDS)
    # The group that the last step completed is delivered; what had not begun is refused.
    assert waiting.result(SECONDS).group_id == 0
    assert isinstance(behind.exception(SECONDS), EngineDied)
    with pytest.raises(EngineDied, match="closed"):
        held.sampler.sample(request_of(2), adapter_of(3))


def test_the_engine_death_of_a_real_vllm_reaches_the_caller(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last in this file: it ends the real engine."""

    whole = TokenDraw.__call__
    monkeypatch.setattr(TokenDraw, "__call__", lambda self, logits, rows: whole(self, logits.fill_(torch.nan), rows))
    with pytest.raises(EngineDied, match="the engine died"):
        real.sampler.sample(request_of(7), lora.publish(20, real.models[0]))
