"""The engine on a real vLLM, against plain transformers and PEFT. One engine at a time: a process has room for one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.behaviour import ROWS_AT_ONCE, Row, TokenDraw
from actors.engine import Engine
from actors.settings import EngineSettings
from system.adapters import Adapter, AdapterError, Canary
from system.constraints import Constraints
from system.tools import play
from system.trajectory import Behaviour, Prompt, Request, Trajectory
from tests import lora, tiny

CONSTRAINTS = Constraints.of(stop_token=5, min_tokens=2, max_tokens=6, vocab_size=tiny.VOCABULARY, allowed=range(2, 32))
BEHAVIOURS = (Behaviour(), Behaviour(0.5), Behaviour(2.0), Behaviour(1.0, 0.3), Behaviour(1.7, 0.2))
SHORT = Prompt("short", (1, 7, 9), (1,))
LONG = Prompt("long", tuple(3 + i % 50 for i in range(80)), (1,))
"""Two full blocks of the KV cache and a part of a third."""


@dataclass
class Case:
    folder: Path
    kind: str
    engine: Engine

    def draw(self, *requests: Request) -> list[tuple[Trajectory, ...]]:
        tickets = [self.engine.add(request) for request in requests]
        done: dict[int, tuple[Trajectory, ...]] = {}
        while self.engine.busy:
            done |= dict(self.engine.step())
        return [done[ticket] for ticket in tickets]

    def version(self, number: int, scale: float = 0.2) -> tuple[Adapter, torch.nn.Module]:
        model = lora.adapted(self.folder, lora.TARGETS[self.kind], seed=number, scale=scale)
        return lora.publish(number, model), model

    def largest_error(self, model: torch.nn.Module, seed: int = 1) -> float:
        """Nats, between the log-probs of fresh draws and those of `model` for the same tokens."""
        prompts = (SHORT, LONG)
        groups = self.draw(*(Request(i, prompt, BEHAVIOURS * 2, seed) for i, prompt in enumerate(prompts)))
        return max(
            float(np.abs(lora.drawn_log_probs(model, CONSTRAINTS, prompt, trajectory) - trajectory.logp_T).max())
            for prompt, group in zip(prompts, groups, strict=True)
            for trajectory in group
        )


@pytest.fixture(scope="module", params=[("llama", "merged"), ("gpt2", "merged"), ("llama", "adapter")], ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    kind, install = request.param
    folder = tiny.folder(tmp_path_factory.mktemp(install), kind)
    engine = Engine(
        folder, lora.NAME, CONSTRAINTS, EngineSettings(max_model_len=96, install=install, kv_cache_mb=16, max_lora_rank=4)
    )
    yield Case(folder, kind, engine)
    engine.close()


def test_nothing_is_drawn_before_an_adapter_is_installed(case: Case) -> None:
    with pytest.raises(RuntimeError, match="no adapter is installed"):
        case.engine.add(Request(0, SHORT, BEHAVIOURS, 0))
    assert not case.engine.busy


def test_log_probs_of_every_behaviour_are_those_of_the_definition(case: Case) -> None:
    adapter, model = case.version(0)
    case.engine.install(adapter)
    groups = case.draw(*(Request(i, prompt, BEHAVIOURS * 8, i) for i, prompt in enumerate((SHORT, LONG))))
    stops = {trajectory.stop for group in groups for trajectory in group}
    assert stops == {"sampled", "forced"}
    for prompt, group in zip((SHORT, LONG), groups, strict=True):
        assert [trajectory.behaviour for trajectory in group] == list(BEHAVIOURS * 8)
        for trajectory in group:
            expected = lora.drawn_log_probs(model, CONSTRAINTS, prompt, trajectory)
            np.testing.assert_allclose(trajectory.logp_T, expected, atol=1e-3)


def test_the_support_is_never_left_and_lengths_are_kept(case: Case) -> None:
    case.engine.install(case.version(0)[0])
    (group,) = case.draw(Request(0, SHORT, (Behaviour(3.0, 0.5),) * 150, 3))
    for trajectory in group:
        CONSTRAINTS.column_of(trajectory.tokens_T)
        assert CONSTRAINTS.stop_token not in trajectory.tokens_T
        assert CONSTRAINTS.min_tokens <= len(trajectory) <= CONSTRAINTS.max_tokens
        assert (trajectory.stop == "forced") == (len(trajectory) == CONSTRAINTS.max_tokens)
    # The model's own end of sequence, 2, is an ordinary token here, and ends nothing.
    assert any(2 in trajectory.tokens_T[:-1] for trajectory in group)


def test_planted_tokens_stand_where_they_were_wanted_and_the_rest_is_drawn(case: Case) -> None:
    adapter, model = case.version(0)
    case.engine.install(adapter)
    behaviours = (Behaviour(planted=((3, 7), (4, 9))), Behaviour(1.5, 0.2, ((0, 11),)), Behaviour(planted=((5, 3),)))
    (group,) = case.draw(Request(0, SHORT, behaviours * 40, 3))
    for trajectory in group:
        planted = dict(trajectory.behaviour.planted)
        assert [int(trajectory.tokens_T[depth]) for depth in planted] == list(planted.values())
        assert trajectory.is_action_T.all() and not trajectory.logp_T[list(planted)].any()
        expected = lora.drawn_log_probs(model, CONSTRAINTS, SHORT, trajectory)
        np.testing.assert_allclose(trajectory.logp_T, expected, atol=1e-3)
    assert len({len(t) for t in group if t.behaviour == behaviours[0]}) > 1
    assert len({t.key for t in group if t.behaviour == behaviours[2]}) > 30


def test_tokens_are_drawn_as_often_as_their_log_probs_say(case: Case) -> None:
    adapter, model = case.version(0)
    case.engine.install(adapter)
    for behaviour in (Behaviour(), Behaviour(2.0, 0.3)):
        (group,) = case.draw(Request(0, SHORT, (behaviour,) * 1500, 4))
        counts = np.bincount([trajectory.tokens_T[0] for trajectory in group], minlength=tiny.VOCABULARY)
        due = lora.next_log_probs(model, CONSTRAINTS, SHORT, np.zeros(0, np.int32), behaviour)[0].exp().numpy()
        # The expected total variation of 1500 exact draws over these 29 tokens is at most 0.055.
        assert 0.5 * np.abs(counts / len(group) - due).sum() < 0.08

        # The second token says nothing of how the first one fell: after the commonest first one too it is as due.
        first = int(counts.argmax())
        seconds = [trajectory.tokens_T[1] for trajectory in group if trajectory.tokens_T[0] == first and len(trajectory) > 1]
        counts = np.bincount(seconds, minlength=tiny.VOCABULARY)
        due = lora.next_log_probs(model, CONSTRAINTS, SHORT, np.array([first], np.int32), behaviour)[1].exp().numpy()
        due[CONSTRAINTS.stop_token] = 0.0
        # Twice the expected total variation of so many exact draws.
        assert 0.5 * np.abs(counts / len(seconds) - due / due.sum()).sum() < 0.8 * np.sqrt(30 / len(seconds))


def test_every_token_is_progress_long_before_a_sample_is_complete(case: Case) -> None:
    case.engine.install(case.version(0)[0])
    before = case.engine.progress
    case.engine.add(Request(0, SHORT, (Behaviour(planted=((5, 3),)),) * 4, 3))
    seen = [before]
    while case.engine.busy:
        if not case.engine.step():
            seen.append(case.engine.progress)
    assert len(seen) > 5 and all(later > earlier for earlier, later in itertools.pairwise(seen))


def test_a_seed_repeats_its_draws_and_another_does_not(case: Case) -> None:
    case.engine.install(case.version(0)[0])
    behaviours = (Behaviour(),) * 8
    first, again, other = (case.draw(Request(0, LONG, behaviours, seed))[0] for seed in (11, 11, 12))
    assert [t.key for t in first] == [t.key for t in again] != [t.key for t in other]
    assert len({t.key for t in first}) > 1
    assert not {t.key for t in first} & {t.key for t in other}


def test_more_prompt_tokens_than_a_step_holds_are_drawn_too(case: Case) -> None:
    adapter, model = case.version(0)
    case.engine.install(adapter)
    prompts = [Prompt(str(i), (*((i * 7 + j * 3) % 60 for j in range(89)), i), (1,)) for i in range(60)]
    groups = case.draw(*(Request(i, prompt, (Behaviour(),), i) for i, prompt in enumerate(prompts)))
    for prompt, (trajectory,) in zip(prompts, groups, strict=True):
        np.testing.assert_allclose(trajectory.logp_T, lora.drawn_log_probs(model, CONSTRAINTS, prompt, trajectory), atol=1e-3)


def test_a_prompt_is_computed_once_and_never_from_an_older_version(case: Case) -> None:
    case.engine.install(case.version(1)[0])
    before = case.engine.prompt_tokens
    case.draw(*(Request(i, prompt, BEHAVIOURS * 2, i) for i, prompt in enumerate((SHORT, LONG, SHORT))))
    # Each sample computes the last token of its prompt: what follows it is the sample's own.
    samples = 3 * len(BEHAVIOURS * 2)
    assert case.engine.prompt_tokens - before == len(SHORT.policy_tokens) + len(LONG.policy_tokens) + samples - 2
    adapter, model = case.version(2)
    case.engine.install(adapter)
    before = case.engine.prompt_tokens
    assert case.largest_error(model) < 1e-3
    assert case.engine.prompt_tokens - before >= len(SHORT.policy_tokens) + len(LONG.policy_tokens)


def test_prompts_of_any_length_are_shared_and_drawn_right(case: Case) -> None:
    adapter, model = case.version(1)
    case.engine.install(adapter)
    # Around the blocks' ends, and more prompts than are kept.
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 66, *range(3, 30), *range(34, 62), *range(67, 89)]
    assert len(lengths) > case.engine.settings.shared_prompts
    prompts = [Prompt(str(n), tuple((n * 5 + j * 3) % 60 for j in range(n)), (1,)) for n in lengths]
    for _ in range(2):
        groups = case.draw(*(Request(i, prompt, BEHAVIOURS[:3], i) for i, prompt in enumerate(prompts)))
        for prompt, group in zip(prompts, groups, strict=True):
            for trajectory in group:
                expected = lora.drawn_log_probs(model, CONSTRAINTS, prompt, trajectory)
                np.testing.assert_allclose(trajectory.logp_T, expected, atol=1e-3)


def test_each_installed_version_is_what_peft_computes(case: Case) -> None:
    (first, first_model), (second, second_model), (zero, _) = case.version(1), case.version(2), case.version(3, scale=0.0)
    base = lora.load(case.folder)
    for adapter, right, wrong in ((first, first_model, base), (second, second_model, first_model), (zero, base, second_model)):
        measured = case.engine.install(adapter)
        assert case.engine.installed is adapter
        assert measured.canary_error < 1e-4
        assert measured.seconds > 0
        merged = case.engine.settings.install == "merged" and adapter is not zero
        assert measured.effective_update == pytest.approx(1.0 if merged else math.nan, abs=1e-4, nan_ok=True)
        assert case.largest_error(right) < 1e-3
        assert case.largest_error(wrong) > 0.05
        assert measured.canary_signal == pytest.approx(0, abs=1e-6) if adapter is zero else measured.canary_signal > 0.05


def test_modules_that_a_version_leaves_alone_go_back_to_the_base(case: Case) -> None:
    case.engine.install(case.version(1)[0])
    model = lora.adapted(case.folder, lora.TARGETS[case.kind][:1], seed=5)
    case.engine.install(lora.publish(2, model))
    assert case.largest_error(model) < 1e-3


def test_an_adapter_that_cannot_be_trusted_changes_nothing(case: Case) -> None:
    good, model = case.version(1)
    case.engine.install(good)
    bad = case.version(2)[0]
    damaged = replace(bad, weights=bad.weights.copy())
    damaged.weights[-1] ^= 1
    dora = Adapter.of(2, 2, bad.tensors(), bad.peft_config | {"use_dora": True}, lora.NAME, bad.canary)
    stray = {name.replace("layers.1", "layers.9").replace("h.1", "h.9"): tensor for name, tensor in bad.tensors().items()}
    long = Canary((1,) * 500, (0.0,) * 499, (0.0,) * 499)
    refused = {
        r"canary of 500 tokens does not fit .* max_model_len=\d+, .*; raise task.max_tokens": replace(bad, canary=long),
        "damaged": damaged,
        "belongs to": replace(bad, base_model="another"),
        "use_dora": dora,
        "no weight of its own.*; set model.path to the adapter's model, or lora.targets to some of .*proj": Adapter.of(
            2, 2, stray, bad.peft_config, lora.NAME, bad.canary
        ),
    }
    for message, adapter in refused.items():
        with pytest.raises(AdapterError, match=message):
            case.engine.install(adapter)
        assert case.engine.installed is good
    assert case.largest_error(model) < 1e-3


def test_an_update_of_a_weight_that_cannot_be_merged_is_refused(case: Case) -> None:
    good, model = case.version(1)
    case.engine.install(good)
    message = r"cannot be merged into; set sampler\.install=adapter"
    if case.engine.settings.install == "adapter":
        # vLLM leaves out what it has no adapted layer for, so the canary has to tell.
        message = "canary is .* away from the learner's"
    name = "lm_head" if case.kind == "llama" else "transformer.wpe"
    out, in_ = case.engine._base.shapes[f"{name}.weight"]
    rows, columns = (in_, out) if case.kind == "gpt2" else (out, in_)
    tensors = {
        f"base_model.model.{name}.lora_A.weight": np.ones((4, columns), np.float32),
        f"base_model.model.{name}.lora_B.weight": np.ones((rows, 4), np.float32),
    }
    with pytest.raises(AdapterError, match=message):
        case.engine.install(Adapter.of(2, 2, tensors, good.peft_config, lora.NAME, good.canary))
    assert case.engine.installed is good
    assert case.largest_error(model) < 1e-3


def test_single_tokens_of_the_canary_may_be_nats_off_in_bfloat16_alone_and_half_of_them_never(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = case.version(1)
    canary = adapter.canary
    assert canary is not None
    told = np.array(canary.logp_T)

    def off_at(tokens: int) -> Adapter:
        logp_T = told - 5.0 * (np.arange(len(told)) < tokens)
        return replace(adapter, canary=replace(canary, logp_T=tuple(logp_T)))

    with pytest.raises(AdapterError, match=rf"canary is {10.0 / len(told):.3g}\S* nats a token .*published weights$"):
        case.engine.install(off_at(2))
    monkeypatch.setattr(case.engine, "settings", replace(case.engine.settings, canary_by_mean=False))
    assert case.engine.install(off_at(2)).canary_error == pytest.approx(10.0 / len(told), abs=1e-3)
    with pytest.raises(AdapterError, match=r"canary is (4\.99|5)\S* nats a token .*bfloat16 is too coarse"):
        case.engine.install(off_at(len(told) // 2 + 1))


def test_a_wrong_canary_is_refused_and_nothing_is_drawn_from_it(case: Case) -> None:
    good, model = case.version(1)
    case.engine.install(good)
    other, lying = case.version(2)[0], case.version(3)[0]
    lying = replace(lying, canary=other.canary)
    with pytest.raises(AdapterError, match=r"version 3: .*canary is \d\.\d+ nats a token"):
        case.engine.install(lying)
    if case.engine.settings.install == "adapter":
        assert case.engine.installed is good
    else:
        with pytest.raises(RuntimeError, match="no adapter is installed"):
            case.engine.add(Request(0, SHORT, BEHAVIOURS, 0))
        case.engine.install(good)
    assert case.largest_error(model) < 1e-3


def test_no_file_of_a_version_outlives_its_install(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler is killed, so that what it keeps on a disk stays there for good."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for number in (1, 2, 3):
        adapter, model = case.version(number)
        case.engine.install(adapter)
        assert list(tmp_path.iterdir()) == []
        assert case.largest_error(model) < 1e-3


def test_a_version_is_installed_between_two_tokens_of_what_is_drawn(case: Case) -> None:
    (first, first_model), (second, second_model), (third, third_model) = (case.version(number) for number in (1, 2, 3))
    case.engine.install(first)
    begun = case.engine.add(Request(0, LONG, BEHAVIOURS * 4, 1))
    # The prompt is computed for one sample, and then for the others.
    done = dict(case.engine.step() + case.engine.step())
    case.engine.install(second)
    fresh = case.engine.add(Request(1, LONG, BEHAVIOURS * 4, 2))
    beside = case.engine.settings.install == "adapter"
    assert case.engine.takes_version is not beside
    if beside:
        with pytest.raises(RuntimeError, match="no room for another version"):
            case.engine.install(third)
    while case.engine.busy:
        done |= dict(case.engine.step())

    def error(trajectory: Trajectory, due_T: np.ndarray) -> float:
        return float(np.abs(due_T - trajectory.logp_T).max())

    for trajectory in done[fresh]:
        assert error(trajectory, lora.drawn_log_probs(second_model, CONSTRAINTS, LONG, trajectory)) < 1e-3
    for trajectory in done[begun]:
        if beside:
            assert error(trajectory, lora.drawn_log_probs(first_model, CONSTRAINTS, LONG, trajectory)) < 1e-3
        else:
            # The first sample had two tokens by then, the others one.
            mixed = [lora.log_probs_across(first_model, second_model, CONSTRAINTS, LONG, trajectory, n) for n in (1, 2)]
            assert min(error(trajectory, due_T) for due_T in mixed) < 1e-3
    assert case.engine.takes_version
    case.engine.install(third)
    assert case.largest_error(third_model) < 1e-3


def test_an_install_waits_for_no_sample(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.engine.install(case.version(1)[0])
    case.engine.add(Request(0, SHORT, BEHAVIOURS * 20, 0))
    case.engine.step()
    steps: list[None] = []
    step = case.engine._engine.step
    monkeypatch.setattr(case.engine._engine, "step", lambda: steps.append(None) or step())
    case.engine.install(case.version(2)[0])
    assert len(steps) == 1
    while case.engine.busy:
        case.engine.step()


def test_with_drain_a_version_waits_for_what_is_drawn(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case.engine, "settings", replace(case.engine.settings, drain=True))
    adapter = case.version(1)[0]
    case.engine.install(adapter)
    case.engine.add(Request(0, SHORT, BEHAVIOURS, 0))
    assert not case.engine.takes_version
    with pytest.raises(RuntimeError, match="being drawn"):
        case.engine.install(adapter)
    while case.engine.busy:
        case.engine.step()
    assert case.engine.takes_version


def test_a_wrong_canary_costs_what_merged_weights_were_drawing_and_nothing_beside_the_base(case: Case) -> None:
    good, model = case.version(1)
    case.engine.install(good)
    # More than the engine draws at a time; some stop at the canary's step.
    ticket = case.engine.add(Request(0, SHORT, BEHAVIOURS * 20, 0))
    for _ in range(3):
        assert case.engine.step() == []
    with pytest.raises(AdapterError, match="version 3"):
        case.engine.install(replace(case.version(3)[0], canary=case.version(2)[0].canary))
    if case.engine.settings.install == "merged":
        assert not case.engine.busy
        case.engine.install(good)
    done: dict[int, tuple[Trajectory, ...]] = {}
    while case.engine.busy:
        done |= dict(case.engine.step())
    for trajectory in done.get(ticket, ()):
        due_T = lora.drawn_log_probs(model, CONSTRAINTS, SHORT, trajectory)
        np.testing.assert_allclose(trajectory.logp_T, due_T, atol=1e-3)
    assert len(done) == (case.engine.settings.install == "adapter")
    assert case.largest_error(model) < 1e-3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(0, Prompt("p", (1,) * 91, (1,)), BEHAVIOURS, 0), "max_model_len"),
        (Request(0, Prompt("p", (1, 64), (1,)), BEHAVIOURS, 0), "outside the vocabulary"),
        (Request(0, SHORT, (), 0), "no samples"),
        (Request(0, SHORT, (Behaviour(0.0),), 0), "temperature > 0"),
        (Request(0, SHORT, (Behaviour(planted=((6, 7),)),), 0), "plants what cannot be drawn there"),
        (Request(0, SHORT, (Behaviour(planted=((1, 5),)),), 0), "plants what cannot be drawn there"),
        (Request(0, SHORT, (Behaviour(planted=((2, 7), (1, 7))),), 0), "plants what cannot be drawn there"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(case: Case, request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.engine.check(request_)


def test_draws_fall_by_the_mixture_and_log_probs_are_of_it() -> None:
    constraints = Constraints.of(stop_token=3, min_tokens=1, max_tokens=4, vocab_size=6, allowed=[0, 1, 4])
    draw = TokenDraw(constraints, torch.device("cpu"))
    wide_V = torch.tensor([1.0, 2.0, 50.0, 9.0, 3.0, 50.0, 50.0])
    grid = [(index + 0.5) / 1000 for index in range(1000)]
    # Where it may not stop, the stop's share of either part goes to the others.
    for may_stop, support in ((False, [0, 1, 4]), (True, [0, 1, 3, 4])):
        p_V = torch.zeros(7, dtype=torch.float64)
        p_V[support] = 0.4 * (wide_V[support].double() / 2.0).softmax(0) + 0.6 / len(support)
        rows = [Row(2.0, 0.6, (where, which), may_stop=may_stop) for where in grid for which in (0.0, 0.3, 0.599, 0.6, 0.999)]
        token_B, logp_B = draw(wide_V.repeat(len(rows), 1), rows)
        shares_V = torch.bincount(token_B, minlength=7) / len(rows)
        torch.testing.assert_close(shares_V.double(), p_V, atol=1e-3, rtol=0)
        torch.testing.assert_close(logp_B, p_V[token_B].log(), atol=1e-6, rtol=0)


def test_rows_that_are_drawn_apart_are_drawn_as_alone() -> None:
    constraints = Constraints.of(stop_token=3, min_tokens=0, max_tokens=4, vocab_size=50)
    draw, rng = TokenDraw(constraints, torch.device("cpu")), np.random.default_rng(0)
    logits_BV = torch.from_numpy(rng.normal(0, 2, (3 * ROWS_AT_ONCE + 1, 50)).astype(np.float32))
    rows = [Row(1.0, 0.0, tuple(rng.random(2)), None if number % 7 else 3) for number in range(len(logits_BV))]
    token_B, logp_B = draw(logits_BV.clone(), rows)
    for number, row in enumerate(rows):
        token, logp = draw(logits_BV[number : number + 1].clone(), [row])
        assert (token.item(), logp.item()) == (token_B[number].item(), logp_B[number].item())
    assert (token_B[::7] == 3).all() and (logp_B[::7] == 0).all()
    free_B = [number for number in range(len(rows)) if number % 7]
    torch.testing.assert_close(logp_B[free_B].float(), logits_BV.log_softmax(1)[free_B, token_B[free_B]])


def test_logits_beyond_the_vocabulary_and_a_closed_stop_are_never_drawn() -> None:
    draw = TokenDraw(Constraints.of(stop_token=0, min_tokens=0, max_tokens=4, vocab_size=50), torch.device("cpu"))
    logits_BV = torch.zeros(3, 64)
    logits_BV[:, 50:] = 40.0
    ends = ((0.0, 0.9), (0.0, 0.0), (1 - 2**-53, 0.9))
    token_B, logp_B = draw(logits_BV, [Row(1.0, 0.5, uniforms, may_stop=False) for uniforms in ends])
    assert token_B.tolist() == [1, 1, 49]
    assert logp_B.tolist() == pytest.approx([-np.log(49)] * 3)


def test_what_is_rarer_than_rounding_has_its_share() -> None:
    """Of 100,000 tokens each has 1e-9 of the probability beside one that has nearly all."""
    constraints = Constraints.of(stop_token=3, min_tokens=0, max_tokens=4, vocab_size=100_000)
    logits_V = torch.zeros(100_000)
    logits_V[0] = float(np.log(1e9))
    share = 1e-9 / (1 + 99_999e-9)
    rows = [Row(1.0, 0.0, (1 - (before + 0.5) * share, 0.0)) for before in (0, 50_000)]
    token_B, logp_B = TokenDraw(constraints, torch.device("cpu"))(logits_V.repeat(2, 1), rows)
    assert token_B.tolist() == [99_999, 49_999]
    assert logp_B.tolist() == pytest.approx([-20.7234] * 2, abs=1e-3)


class Doubling:
    """Writes 6, 7 after every 9."""

    def output(self, tokens: Sequence[int]) -> Sequence[int]:
        return (6, 7) if tokens[-1] == 9 else ()


def test_a_tool_writes_into_samples_and_log_q_leaves_it_out(tmp_path: Path) -> None:
    # Few tokens, so that the tool's comes often.
    constraints = Constraints.of(
        stop_token=5, min_tokens=2, max_tokens=6, vocab_size=tiny.VOCABULARY, allowed=range(6, 11), tool_tokens=4
    )
    folder = tiny.folder(tmp_path)
    settings = EngineSettings(max_model_len=96, kv_cache_mb=16, max_lora_rank=4)
    engine = Engine(folder, lora.NAME, constraints, settings, Doubling())
    case = Case(folder, "llama", engine)
    try:
        adapter, model = case.version(0)
        engine.install(adapter)
        (drawn,) = case.draw(Request(0, SHORT, (Behaviour(2.0, 0.5),) * 96, 0))
    finally:
        engine.close()
    for trajectory in drawn:
        actions = trajectory.tokens_T[trajectory.is_action_T]
        tokens_T, is_action_T = play(Doubling(), 4, actions.tolist())
        assert trajectory.tokens_T.tolist() == tokens_T.tolist()
        assert trajectory.is_action_T.tolist() == is_action_T.tolist()
        assert constraints.admits(actions)
        assert trajectory.stop == ("forced" if len(actions) == constraints.max_tokens else "sampled")
        assert not trajectory.logp_T[:-1][~is_action_T].any()
        assert (trajectory.logp_T[:-1][is_action_T] < 0).all()
        assert (trajectory.logp_T[-1] == 0) == (trajectory.stop == "forced")
        expected = lora.drawn_log_probs(model, constraints, SHORT, trajectory)
        np.testing.assert_allclose(trajectory.logp_T, expected, atol=1e-4)
    written = [int((~trajectory.is_action_T).sum()) for trajectory in drawn]
    assert set(written) == {0, 2, 4}
    assert any((trajectory.tokens_T == 9).sum() > 2 for trajectory in drawn), "no sample went over the tool's budget"
    assert {trajectory.stop for trajectory in drawn} == {"sampled", "forced"}


def test_samples_that_the_engine_puts_off_are_as_they_would_have_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for a few, vLLM drops what it has of others and computes it again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    put_off, whole = [], Scheduler._preempt_request

    def noted(self: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        put_off.append(request.request_id)
        return whole(self, request, *arguments, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    constraints = Constraints.of(stop_token=5, min_tokens=60, max_tokens=64, vocab_size=tiny.VOCABULARY)
    prompt = Prompt("p", tuple(range(6, 31)), (1,))
    folder = tiny.folder(tmp_path)
    settings = EngineSettings(max_model_len=96, kv_cache_mb=1, max_lora_rank=4, max_num_seqs=256)
    engine = Engine(folder, lora.NAME, constraints, settings)
    try:
        case = Case(folder, "llama", engine)
        adapter, model = case.version(0)
        engine.install(adapter)
        requests = [Request(number, prompt, (Behaviour(),) * 8, number) for number in range(25)]
        groups = case.draw(*requests)
        late = {int(name.split("/")[0]) for name in put_off}
        assert late
        number = max(late) - 1  # the engine counts groups from 1
        put_off.clear()
        (alone,) = case.draw(requests[number])
        assert not put_off
    finally:
        engine.close()
    assert [trajectory.key for trajectory in alone] == [trajectory.key for trajectory in groups[number]]
    for trajectory in groups[number]:
        np.testing.assert_allclose(trajectory.logp_T, lora.drawn_log_probs(model, constraints, prompt, trajectory), atol=1e-3)
