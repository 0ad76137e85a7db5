"""Several ranks in real processes over gloo: what they learn is what one learns, and what fails on one fails on all."""

from __future__ import annotations

import multiprocessing
import queue
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from learner.learner import Learner
from learner.ranks import Ranks, open_store, reach_store
from system.config import Config
from system.config_file import parse
from system.trajectory import Group, Prompt, sampled
from tests import tiny
from tests.test_learner import ALLOWED, CONSTRAINTS, ON_POLICY, VOCAB

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])
SECONDS = 60.0
CPU = torch.device("cpu")

UNEVEN = tuple((4 + 5 * number, 2 + 3 * number) for number in range(5))
"""Five groups as (tokens of the prompt, samples)."""
SCENARIOS: dict[str, dict[str, Any]] = {
    "rows of several groups": {"sizes": UNEVEN},
    "a row for each group": {"sizes": UNEVEN, "learner": {"token_budget": 64, "clip": 0.1}},
    "fewer groups than ranks": {"sizes": UNEVEN[-1:]},
    "a KL to the base": {"sizes": UNEVEN, "loss": {"kind": "grpo", "kl": 0.5}, "learner": {"token_budget": 64}},
    "checkpointed activations": {"sizes": UNEVEN[:3], "learner": {"token_budget": 64, "gradient_checkpointing": True}},
    "the last layer alone": {"sizes": UNEVEN, "lora": {"layers": 0.5}},
}


def config(seed: int = 0, **scenario: Any) -> Config:
    learner = {"lr": 0.01, "steps": 20, "warmup_steps": 0, "groups_per_update": 8} | scenario.get("learner", {})
    sections = {"loss": scenario.get("loss", {"kind": "pooled"}), "learner": learner, "seed": seed}
    lora = {"rank": 4, "alpha": 8} | scenario.get("lora", {})
    return parse(ON_POLICY | sections | {"task": {"kind": "random_number"}, "lora": lora})


def groups(sizes: tuple[tuple[int, int], ...], seed: int) -> list[Group]:
    rng, result = np.random.default_rng(seed), []
    for number, (context, samples) in enumerate(sizes):
        trajectories = [sampled(rng.choice(ALLOWED[:6], rng.integers(1, 7)).tolist()) for _ in range(samples)]
        rewards = tuple(rng.normal(10.0 * number, 1.0, len(t) + 1) for t in trajectories)
        prompt = Prompt(f"prompt-{number}", tuple(range(20, 20 + context)), (20,))
        result.append(Group(prompt, tuple(trajectories), rewards, 0, number))
    return result


def build(folder: Path, ranks: Ranks, **scenario: Any) -> Learner:
    learner = Learner(config(**scenario), folder, CONSTRAINTS, "base", list(range(10, 40)), ranks)
    tiny.perturb(learner.policy.parameters.values())
    return learner


# ------------------------------------------------------------------------------------------- what each rank does


def train(ranks: Ranks, folder: Path, scenario: dict[str, Any]) -> dict[str, Any]:
    """Three updates; then what leaves the learner, which in lockstep all ranks compute."""
    learner = build(folder, ranks, **scenario)
    metrics = [learner.update(groups(scenario["sizes"], seed)) for seed in range(3)]
    alike = ranks.rank == 0 or ranks.in_lockstep
    return {
        "metrics": metrics,
        "weights": learner.policy.adapter_tensors(),
        "log_q": [score.log_q_K for score in learner.score(groups(scenario["sizes"], 0))] if alike else [],
        "canary": learner.adapter(1).canary if alike else None,
    }


def train_in_each_scenario(ranks: Ranks, folder: Path) -> dict[str, dict[str, Any]]:
    return {name: train(ranks, folder, scenario) for name, scenario in SCENARIOS.items()}


def meet_what_is_not_finite(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The longest group, which is one rank's alone, has rewards that overflow; then an update that is whole."""
    learner = build(folder, ranks)
    before = learner.policy.adapter_tensors()
    batch = groups(UNEVEN, 0)
    broken = batch[-1]
    batch[-1] = Group(broken.prompt, broken.trajectories_K, tuple(r * 1e30 for r in broken.log_reward_K), 0, 0)
    with pytest.raises(FloatingPointError, match=r"prompt-0.*lower learner.lr"):
        learner.update(batch)
    after = learner.policy.adapter_tensors()
    unchanged = learner.step == 0 and all(np.array_equal(before[name], after[name]) for name in before)
    return {"unchanged": unchanged, "loss": learner.update(groups(UNEVEN, 0))["loss"]}


def start_from_other_seeds(ranks: Ranks, folder: Path) -> dict[str, np.ndarray]:
    learner = Learner(config(seed=ranks.rank), folder, CONSTRAINTS, "base", [10, 11], ranks)
    return learner.policy.adapter_tensors()


def continue_from_a_checkpoint(ranks: Ranks, folder: Path) -> list[dict[str, np.ndarray]]:
    """Four updates in one go, and two, a restore from rank 0's file, and two."""
    whole, first, second = (build(folder, ranks) for _ in range(3))
    for seed in range(4):
        whole.update(groups(UNEVEN, seed))
    for seed in range(2):
        first.update(groups(UNEVEN, seed))
    saved = first.save()
    second.restore(saved, first.step)
    for seed in range(2, 4):
        second.update(groups(UNEVEN, seed))
    return [whole.policy.adapter_tensors(), second.policy.adapter_tensors()]


def count_weights(ranks: Ranks, folder: Path) -> dict[str, int]:
    """Numbers of base weights inside the layers: all, and those that this rank holds."""
    learner = build(folder, ranks)
    learner.update(groups(UNEVEN, 0))
    layers = [
        p for name, p in learner.policy.language_model.model.named_parameters() if ".layers." in name and "lora" not in name
    ]
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in layers)
    return {"all": sum(p.numel() for p in layers), "held": held}


def lose_a_rank(ranks: Ranks, folder: Path) -> str:
    learner = build(folder, ranks)
    if ranks.rank == 1:
        return "left"
    with pytest.raises(RuntimeError) as error:
        learner.update(groups(UNEVEN, 0))
    return str(error.value)


# ------------------------------------------------------------------------------------------------ running ranks


def _rank(work: Callable[..., Any], rank: int, size: int, lockstep: bool, port: Any, results: Any, arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        if rank == 0:
            store = open_store("127.0.0.1", size)
            for _ in range(1, size):
                port.put(store.port)
        else:
            store = reach_store("127.0.0.1", port.get(timeout=SECONDS), size)
        ranks = Ranks.join(rank, size, store, CPU, in_lockstep=lockstep)
        results.put((rank, work(ranks, *arguments)))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, RuntimeError(traceback.format_exc())))


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any, lockstep: bool = False) -> list[Any]:
    """What `work(ranks, *arguments)` gives on each rank, each in a process of its own."""
    port, results = PROCESSES.Queue(), PROCESSES.Queue()
    processes = [
        PROCESSES.Process(target=_rank, args=(work, rank, size, lockstep, port, results, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        answers = dict(results.get(timeout=SECONDS) for _ in processes)
    except queue.Empty:
        pytest.fail(f"a rank of {size} did not answer within {SECONDS:g} s")
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    for answer in answers.values():
        if isinstance(answer, Exception):
            raise answer
    return [answers[rank] for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"), vocab_size=VOCAB)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    return train_in_each_scenario(Ranks(), folder)


LAYOUTS = {"2 ranks": (2, False), "3 ranks": (3, False), "2 ranks, sharded base": (2, True), "3 ranks, sharded base": (3, True)}


@pytest.fixture(scope="module", params=LAYOUTS)
def together(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, dict[str, Any]]]:
    size, lockstep = LAYOUTS[request.param]
    return on_ranks(size, train_in_each_scenario, folder, lockstep=lockstep)


NOT_TIMES = {"loss", "grad_norm", "lr", "reward_temperature", "tokens/forwarded", "log_z", "spread", "ess", "log_q_stop"}


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_learn_what_one_learns(
    alone: dict[str, dict[str, Any]], together: list[dict[str, dict[str, Any]]], name: str
) -> None:
    expected = alone[name]
    for rank in together:
        for mine, own in zip(rank[name]["metrics"], expected["metrics"], strict=True):
            assert {key: mine[key] for key in NOT_TIMES} == pytest.approx({key: own[key] for key in NOT_TIMES}, rel=1e-5)
        for key, weights in expected["weights"].items():
            assert np.abs(rank[name]["weights"][key] - weights).max() < 1e-5, key
    assert together[0][name]["log_q"] == [pytest.approx(log_q_K, abs=1e-4) for log_q_K in expected["log_q"]]
    assert together[0][name]["canary"].logp_T == pytest.approx(expected["canary"].logp_T, abs=1e-4)


@pytest.mark.parametrize("name", SCENARIOS)
def test_all_ranks_hold_the_very_same_weights(together: list[dict[str, dict[str, Any]]], name: str) -> None:
    first, *others = (rank[name]["weights"] for rank in together)
    assert all(np.array_equal(other[key], first[key]) for other in others for key in first)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
def test_every_architecture_can_have_its_base_in_shards(tmp_path: Path, kind: str) -> None:
    """Tied embeddings, which stay whole, other layers, and windows of attention."""
    folder, scenario = tiny.folder(tmp_path, kind), {"sizes": UNEVEN[:3]}
    expected, first = train(Ranks(), folder, scenario), on_ranks(2, train, folder, scenario, lockstep=True)[0]
    assert [metrics["loss"] for metrics in first["metrics"]] == pytest.approx(
        [metrics["loss"] for metrics in expected["metrics"]], rel=1e-5
    )
    for name, weights in expected["weights"].items():
        assert np.abs(first["weights"][name] - weights).max() < 1e-5, name


@pytest.mark.parametrize("lockstep", [False, True])
def test_what_is_not_finite_on_one_rank_raises_on_all_and_changes_nothing(folder: Path, lockstep: bool) -> None:
    expected = meet_what_is_not_finite(Ranks(), folder)
    for answer in on_ranks(3, meet_what_is_not_finite, folder, lockstep=lockstep):
        assert answer["unchanged"]
        assert answer["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_ranks_start_from_the_weights_of_the_first(folder: Path) -> None:
    expected = start_from_other_seeds(Ranks(), folder)
    for weights in on_ranks(2, start_from_other_seeds, folder):
        assert all(np.array_equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("lockstep", [False, True])
def test_restored_ranks_continue_as_if_they_had_never_stopped(folder: Path, lockstep: bool) -> None:
    for whole, resumed in on_ranks(2, continue_from_a_checkpoint, folder, lockstep=lockstep):
        assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_a_sharded_base_leaves_each_rank_its_part_of_the_layers(folder: Path) -> None:
    whole, *_ = on_ranks(2, count_weights, folder)
    assert whole["held"] == whole["all"]
    shards = on_ranks(2, count_weights, folder, lockstep=True)
    assert [shard["held"] for shard in shards] == [whole["all"] // 2] * 2


def test_a_rank_that_is_gone_fails_the_others_instead_of_leaving_them_to_wait(folder: Path) -> None:
    said, left = on_ranks(2, lose_a_rank, folder)
    assert left == "left"
    assert "onnection" in said


# -------------------------------------------------------------------------------------------------- the shares


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 5), st.integers(50, 120))
def test_shares_have_each_group_once_and_end_together(lengths: list[int], size: int, budget: int) -> None:
    rows = [Ranks(rank, size).rows(lengths, budget) for rank in range(size)]
    assert sorted(index for own in rows for row in own for index in row) == list(range(len(lengths)))
    tokens = [sum(lengths[index] for row in own for index in row) for own in rows]
    assert max(tokens) - min(tokens) <= max(lengths)
    in_step = [Ranks(rank, size, in_lockstep=True).rows(lengths, budget) for rank in range(size)]
    assert [[row for row in own if row] for own in in_step] == rows
    assert {len(own) for own in in_step} == {max(map(len, rows))}


def test_the_meeting_listens_on_the_address_it_was_given_alone() -> None:
    store = open_store("127.0.0.1", 2)
    with socket.create_connection(("127.0.0.1", store.port)), pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", store.port), timeout=5)


def test_a_rank_takes_the_one_gpu_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(torch.cuda._utils._get_device_index(device)))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: taken.append(backend == "nccl"))
    store = open_store("127.0.0.1", 1)
    Ranks.join(0, 1, store, torch.device("cuda"))
    assert taken == [0, True]
