"""The learner on tiny models: its log q, its update, and what it saves."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from learner.learner import Learner, lr_at
from system.checkpoint import CheckpointError
from system.config import Config, ConfigError
from system.config_file import parse
from system.constraints import Constraints
from system.posterior import Bounds
from system.trajectory import Group, Prompt, sampled
from tests import tiny

VOCAB, STOP = 64, 9
ALLOWED = list(range(10, 30))
CONSTRAINTS = Constraints.of(stop_token=STOP, min_tokens=1, max_tokens=6, vocab_size=VOCAB, allowed=ALLOWED)
ON_POLICY: dict[str, object] = {"sampler": {"exploration": {"on_policy": 1}}, "replay": {"fresh": 1}}
PROMPTS = [Prompt("long", tuple(range(30, 50)), (30,)), Prompt("short", (33, 34), (33,))]


def config(**learner: object) -> Config:
    settings = {"lr": 0.02, "steps": 20, "warmup_steps": 0} | learner
    return parse({"task": {"kind": "random_number"}, "lora": {"rank": 4, "alpha": 8}, "learner": settings})


def groups(seed: int = 0, samples: int = 8) -> list[Group]:
    rng, result = np.random.default_rng(seed), []
    for number, prompt in enumerate(PROMPTS):
        trajectories = [sampled(rng.choice(ALLOWED[:4], rng.integers(1, 7)).tolist()) for _ in range(samples)]
        rewards = tuple(rng.normal(10.0 * number, 1.0, len(t) + 1) for t in trajectories)
        result.append(Group(prompt, tuple(trajectories), rewards, 0, number))
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"), vocab_size=VOCAB)


def learner(folder: Path, **settings: object) -> Learner:
    return Learner(config(**settings), folder, CONSTRAINTS, "base", list(range(10, 40)))


def own_log_q(model: torch.nn.Module, prompt: Prompt, tokens: list[int]) -> float:
    """log q of one whole trajectory by one ordinary forward and the definition of the support."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt.policy_tokens, *tokens]])).logits[0].double()
    total, at = 0.0, len(prompt.policy_tokens) - 1
    for depth, token in enumerate([*tokens, STOP]):
        if depth == CONSTRAINTS.max_tokens:
            break
        support = ALLOWED + ([STOP] if depth >= CONSTRAINTS.min_tokens else [])
        total += float(logits[at + depth, token] - logits[at + depth, support].logsumexp(-1))
    return total


def test_log_q_equals_the_masked_policy_one_sequence_at_a_time(folder: Path) -> None:
    subject = learner(folder)
    tiny.perturb(subject.policy.parameters.values())
    model = subject.policy.language_model.model
    for group, score in zip(groups(), subject.score(groups()), strict=True):
        expected = [own_log_q(model, group.prompt, t.tokens_T.tolist()) for t in group.trajectories_K]
        assert score.log_q_K == pytest.approx(expected, abs=1e-4)


def test_a_tools_output_is_context_and_no_part_of_log_q(folder: Path) -> None:
    subject = learner(folder)
    tiny.perturb(subject.policy.parameters.values())
    written = sampled([10, 11, 45, 46, 12], [True, True, False, False, True])
    group = Group(PROMPTS[1], (written,), (np.zeros(6),), 0, 0)
    with torch.no_grad():
        tokens = torch.tensor([[*PROMPTS[1].policy_tokens, *written.tokens_T.tolist()]])
        logits = subject.policy.language_model.model(input_ids=tokens).logits[0].double()
    at, expected = len(PROMPTS[1].policy_tokens) - 1, 0.0
    for position, token, depth in ((0, 10, 0), (1, 11, 1), (4, 12, 2), (5, STOP, 3)):
        support = ALLOWED + ([STOP] if depth >= CONSTRAINTS.min_tokens else [])
        expected += float(logits[at + position, token] - logits[at + position, support].logsumexp(-1))
    assert subject.score([group])[0].log_q_K == pytest.approx([expected], abs=1e-4)
    # Nor do they count towards the greatest length, where the stop is certain.
    longer = sampled([10, 11, 45, 46, 12, 13], [True, True, False, False, True, True])
    [score] = subject.score([Group(PROMPTS[1], (longer,), (np.zeros(7),), 0, 0)])
    assert score.log_q_stop_K[0] < -0.01


KINDS = ("pooled", "vargrad", "tb", "db", "subtb", "grpo", "ppo", "rloo", "mle")
LOSSES: list[dict[str, object]] = [{"kind": kind} for kind in KINDS]
WITH_KL: list[dict[str, object]] = [{"kind": kind, "kl": 0.5} for kind in ("grpo", "ppo", "rloo")]


@pytest.mark.parametrize("section", [*LOSSES, *WITH_KL], ids=str)
def test_micro_batches_do_not_change_the_update(folder: Path, section: dict[str, object]) -> None:
    results = []
    for budget in (4096, 64):
        loss = parse(ON_POLICY | {"task": {"kind": "random_number"}, "loss": section}).loss
        cfg = config(token_budget=budget).model_copy(update={"loss": loss})
        subject = Learner(cfg, folder, CONSTRAINTS, "base", list(range(10, 40)))
        tiny.perturb(subject.policy.parameters.values())
        metrics = subject.update([*groups(0), *groups(1)])
        gradient = torch.cat([parameter.grad.flatten() for parameter in subject.policy.parameters.values()])  # type: ignore[union-attr]
        results.append((metrics["loss"], metrics["grad_norm"], gradient))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("section", [{"kind": "pooled"}, {"kind": "subtb"}, {"kind": "vargrad"}, *WITH_KL[:1]], ids=str)
def test_a_group_longer_than_a_row_is_cut_and_its_update_is_that_of_the_whole(
    folder: Path, section: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = parse(ON_POLICY | {"task": {"kind": "random_number"}, "loss": section}).loss
    results, rows = [], []
    for budget in (4096, 64):
        subject = Learner(config(token_budget=budget).model_copy(update={"loss": loss}), folder, CONSTRAINTS, "base", range(40))
        tiny.perturb(subject.policy.parameters.values())
        whole = subject.policy.log_q
        monkeypatch.setattr(
            subject.policy, "log_q", lambda pieces, whole=whole: rows.append(sum(map(len, pieces))) or whole(pieces)
        )
        rows.clear()
        # The second has two samples with a tool's output, in parts that are not the same.
        batch = groups(3, samples=40)
        tools = [sampled([first, 11, 45, 46, 12], [True, True, False, False, True]) for first in (10, 29)]
        batch[1] = Group(
            PROMPTS[1],
            (*tools, *batch[1].trajectories_K),
            (*[np.array([0, 1, np.nan, 2, 3, 4.0])] * 2, *batch[1].log_reward_K),
            0,
            1,
        )
        metrics = subject.update(batch)
        assert (max(rows) > 64) == (budget > 64)
        assert metrics["tokens/forwarded"] == sum(rows)
        gradient = torch.cat([parameter.grad.flatten() for parameter in subject.policy.parameters.values()])  # type: ignore[union-attr]
        results.append((metrics, gradient, [score.log_q_K for score in subject.score(batch)]))
    (one, gradient, log_q), (cut, of_parts, log_q_of_parts) = results
    for name in ("loss", "log_z", "spread", "ess", "log_q_stop"):
        assert cut[name] == pytest.approx(one[name], rel=1e-4), name
    torch.testing.assert_close(of_parts, gradient, rtol=1e-3, atol=1e-5)
    assert np.concatenate(log_q_of_parts) == pytest.approx(np.concatenate(log_q), abs=1e-3)


def test_copies_of_a_sample_that_is_longer_than_a_row_are_computed_once(folder: Path) -> None:
    constraints = Constraints.of(stop_token=STOP, min_tokens=1, max_tokens=90, vocab_size=VOCAB, allowed=ALLOWED)
    rng, (prompt, _) = np.random.default_rng(0), PROMPTS
    batch = [Group(prompt, (sampled(rng.choice(ALLOWED, 80).tolist()),) * 16, (np.arange(81.0),) * 16, 0, 0)]
    results = []
    for budget in (4096, 64):
        subject = Learner(config(token_budget=budget), folder, constraints, "base", range(40))
        tiny.perturb(subject.policy.parameters.values())
        results.append((subject.score(batch)[0].log_q_K, subject.update(batch)))
    (log_q_K, whole), (same_K, long) = results
    assert same_K == pytest.approx(log_q_K, abs=1e-3)
    for name in ("loss", "grad_norm", "log_z", "spread", "ess"):
        assert long[name] == pytest.approx(whole[name], rel=1e-3), name
    assert long["tokens/forwarded"] == len(prompt.policy_tokens) + 80


class Kept:
    """A tensor that a backward pass waits for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_an_update_keeps_for_its_gradient_grows_with_the_budget_and_not_with_the_samples(
    folder: Path, checkpointing: bool
) -> None:
    def most(samples: int, budget: int) -> int:
        """Numbers at one time."""
        subject = learner(folder, token_budget=budget, gradient_checkpointing=checkpointing)
        kept, peak = weakref.WeakSet[Kept](), 0

        def keep(tensor: torch.Tensor) -> Kept:
            nonlocal peak
            kept.add(one := Kept(tensor))
            peak = max(peak, sum(each.tensor.numel() for each in kept))
            return one

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
            subject.update(groups(samples=samples)[:1])
        return peak

    few, many = most(40, 64), most(160, 64)
    assert many < 1.2 * few
    assert most(160, 4096) > 2 * many


def test_scores_are_the_same_in_one_row_and_in_many(folder: Path) -> None:
    batch = [*groups(0), *groups(1)]
    one, many = ([s.log_q_K for s in learner(folder, token_budget=budget).score(batch)] for budget in (4096, 64))
    alone = [learner(folder).score([group])[0].log_q_K for group in batch]
    for whole, parts, expected in zip(one, many, alone, strict=True):
        assert whole == pytest.approx(expected, abs=1e-4)
        assert parts == pytest.approx(expected, abs=1e-4)
    assert len({float(log_q_K[0]) for log_q_K in one}) > 1


def test_gradient_checkpointing_changes_nothing(folder: Path) -> None:
    metrics = [learner(folder, gradient_checkpointing=on).update(groups()) for on in (False, True)]
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=1e-4)


def test_updates_bring_u_together_for_each_prompt_on_its_own(folder: Path) -> None:
    subject = learner(folder, steps=60, lr=0.01)
    batch = groups()
    history = [subject.update(batch) for _ in range(60)]
    assert history[-1]["loss"] < 0.05 * history[0]["loss"]
    scores = subject.score(batch)
    log_z = [float((g.end_log_reward_K - s.log_q_K).mean()) for g, s in zip(batch, scores, strict=True)]
    assert log_z[1] - log_z[0] > 5.0


def test_the_reward_temperature_divides_the_reward(folder: Path) -> None:
    at_half = learner(folder, reward_temperature={"start": 0.5, "end": 0.5})
    doubled = [Group(g.prompt, g.trajectories_K, tuple(2 * r for r in g.log_reward_K), 0, 0) for g in groups()]
    assert at_half.update(groups())["loss"] == pytest.approx(learner(folder).update(doubled)["loss"], rel=1e-5)


def test_the_reward_temperature_of_an_update_is_that_of_its_step(folder: Path) -> None:
    subject = learner(folder, reward_temperature={"start": 1.0, "end": 0.5, "horizon": 2})
    assert [subject.update(groups())["reward_temperature"] for _ in range(4)] == [1.0, 0.75, 0.5, 0.5]


def test_each_update_has_the_reward_temperature_and_the_learning_rate_of_its_step(folder: Path) -> None:
    annealed = learner(folder, reward_temperature={"start": 1.0, "end": 0.5, "horizon": 1})
    annealed.step = 1
    at_half = learner(folder, reward_temperature={"start": 0.5, "end": 0.5})
    assert annealed.update(groups())["loss"] == at_half.update(groups())["loss"]
    subject, rates = learner(folder, steps=4, warmup_steps=1, decay="linear"), []
    for _ in range(4):
        subject.update(groups())
        rates += [section["lr"] for section in subject.optimizer.param_groups]
    assert rates == [lr_at(subject.config, step) for step in range(4)]
    assert len(set(rates)) == 4


def test_a_kl_is_to_the_base_beside_the_tempered_reward(folder: Path) -> None:
    """RLOO's loss by its definition, with log-probs of one sequence at a time."""
    loss = parse(ON_POLICY | {"task": {"kind": "random_number"}, "loss": {"kind": "rloo", "kl": 0.5}}).loss
    settings = config(reward_temperature={"start": 0.5, "end": 0.5}).model_copy(update={"loss": loss})
    subject = Learner(settings, folder, CONSTRAINTS, "base", list(range(10, 40)))
    tiny.perturb(subject.policy.parameters.values())
    model, expected = subject.policy.language_model.model, []
    for group in groups():
        tokens = [trajectory.tokens_T.tolist() for trajectory in group.trajectories_K]
        log_q = np.array([own_log_q(model, group.prompt, z) for z in tokens])
        with subject.policy.base():
            log_base = np.array([own_log_q(model, group.prompt, z) for z in tokens])
        reward = group.end_log_reward_K / 0.5 - 0.5 * (log_q - log_base)
        others = (reward.sum() - reward) / (len(reward) - 1)
        # They count as drawn with certainty, so that the weight of a sample is its q.
        expected.append(-(np.exp(log_q) * (reward - others) * log_q).mean())
    assert subject.update(groups())["loss"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_gradient_is_that_of_the_mean_over_groups(folder: Path) -> None:
    once, twice = (learner(folder).update(groups() * times)["grad_norm"] for times in (1, 2))
    assert twice == pytest.approx(once, rel=1e-4)


def test_a_reward_where_the_policy_cannot_stop_is_no_state(folder: Path) -> None:
    found = []
    for root in (np.nan, 500.0):
        rewards = [tuple(np.append(root, values[1:]) for values in group.log_reward_K) for group in groups()]
        batch = [Group(g.prompt, g.trajectories_K, values, 0, 0) for g, values in zip(groups(), rewards, strict=True)]
        found.append(learner(folder).update(batch)["loss"])
    assert found[0] == found[1]


def test_the_decay_of_the_config_reaches_the_loss(folder: Path) -> None:
    found = []
    for decay in (0.5, 1.0):
        loss = parse({"task": {"kind": "random_number"}, "loss": {"kind": "subtb", "decay": decay}}).loss
        settings = config().model_copy(update={"loss": loss})
        found.append(Learner(settings, folder, CONSTRAINTS, "base", list(range(10, 40))).update(groups())["loss"])
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_the_optimizer_has_the_settings_of_the_config(folder: Path) -> None:
    subject = learner(folder, warmup_steps=4, weight_decay=0.25, betas=[0.5, 0.75], clip=0.01)
    metrics = subject.update(groups())
    [used] = subject.optimizer.param_groups
    assert (used["lr"], used["weight_decay"], tuple(used["betas"])) == (lr_at(subject.config, 0), 0.25, (0.5, 0.75))
    gradients = [parameter.grad.flatten() for parameter in subject.policy.parameters.values() if parameter.grad is not None]
    assert float(torch.cat(gradients).norm()) == pytest.approx(0.01, rel=1e-3)
    assert metrics["grad_norm"] > 0.01


def test_the_facts_of_an_update_are_those_of_its_samples(folder: Path) -> None:
    subject = learner(folder)
    tiny.perturb(subject.policy.parameters.values())
    # Equal prefixes have equal rewards.
    rewards = [[np.sin(np.append(0, t.tokens_T.cumsum())) for t in group.trajectories_K] for group in groups()]
    batch = [Group(g.prompt, g.trajectories_K, tuple(values), 0, 0) for g, values in zip(groups(), rewards, strict=True)]
    scores = subject.score(batch)
    bounds = [Bounds.of(g.end_log_reward_K - score.log_q_K) for g, score in zip(batch, scores, strict=True)]
    metrics = subject.update(batch)
    for name, field in (("log_z", "log_z_lower"), ("spread", "spread"), ("ess", "ess")):
        assert metrics[name] == pytest.approx(np.mean([getattr(bound, field) for bound in bounds]), rel=1e-3)
    assert metrics["log_q_stop"] == pytest.approx(np.mean([score.log_q_stop_K.mean() for score in scores]), abs=1e-4)


def test_a_restored_learner_continues_as_if_it_had_never_stopped(folder: Path) -> None:
    whole = learner(folder)
    for seed in range(4):
        whole.update(groups(seed))
    first = learner(folder)
    for seed in range(2):
        first.update(groups(seed))
    second = learner(folder)
    second.restore(first.save(), first.step)
    for seed in range(2, 4):
        second.update(groups(seed))
    expected = whole.policy.adapter_tensors()
    for name, tensor in second.policy.adapter_tensors().items():
        assert np.array_equal(tensor, expected[name]), name


def test_weights_of_another_rank_are_refused(folder: Path) -> None:
    other = config().model_copy(update={"lora": parse({"task": {"kind": "random_number"}, "lora": {"rank": 2}}).lora})
    saved = Learner(other, folder, CONSTRAINTS, "base", list(range(10, 40))).save()
    with pytest.raises(CheckpointError, match=r"another lora section.*does not fit the policy"):
        learner(folder).restore(saved, 0)


def test_weights_of_another_scale_are_refused(folder: Path) -> None:
    other = config().model_copy(update={"lora": config().lora.model_copy(update={"alpha": 16.0})})
    saved = Learner(other, folder, CONSTRAINTS, "base", list(range(10, 40))).save()
    with pytest.raises(CheckpointError, match=r"has lora\.alpha / lora\.rank = 4, this run 2: .* set lora\.alpha"):
        learner(folder).restore(saved, 0)


def test_weights_of_another_step_are_refused(folder: Path) -> None:
    saved = learner(folder).save()
    with pytest.raises(CheckpointError, match="the checkpoint of step 1 has the weights of step 0"):
        learner(folder).restore(saved, 1)


def test_weights_of_another_model_are_refused_and_a_model_that_moved_is_not(folder: Path, tmp_path: Path) -> None:
    subject = learner(folder)
    subject.update(groups())
    saved = subject.save()
    moved = Learner(config(), folder, CONSTRAINTS, "elsewhere", list(range(5, 30)))
    moved.restore(saved, 1)
    assert moved.step == 1
    other = tiny.save(tiny.llama(VOCAB, seed=1), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"another model than model\.path='base'.* nats a token; set model\.path"):
        Learner(config(), other, CONSTRAINTS, "base", list(range(10, 40))).restore(saved, 1)


def test_the_adapter_loads_in_plain_peft_and_gives_the_same_log_q(folder: Path, tmp_path: Path) -> None:
    subject = learner(folder)
    tiny.perturb(subject.policy.parameters.values())
    published = subject.adapter(3)
    published.verify("base")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(published.materialise(tmp_path / "adapter"))).eval()
    for group, score in zip(groups(), subject.score(groups()), strict=True):
        expected = [own_log_q(plain, group.prompt, t.tokens_T.tolist()) for t in group.trajectories_K]
        assert score.log_q_K == pytest.approx(expected, abs=1e-4)


def test_the_canary_tells_the_adapter_from_the_base(folder: Path) -> None:
    subject = learner(folder)
    before = subject.adapter(0).canary
    tiny.perturb(subject.policy.parameters.values())
    after = subject.adapter(1).canary
    assert before is not None and after is not None
    assert before.logp_T == pytest.approx(before.base_logp_T, abs=1e-6)
    assert np.abs(np.subtract(after.logp_T, after.base_logp_T)).mean() > 0.01


def test_a_loss_that_is_not_finite_leaves_the_weights_alone(folder: Path) -> None:
    subject = learner(folder)
    before = subject.policy.adapter_tensors()
    broken = [Group(g.prompt, g.trajectories_K, tuple(r * 1e30 for r in g.log_reward_K), 0, 0) for g in groups()]
    with pytest.raises(FloatingPointError, match=r"long.*lower learner.lr"):
        subject.update(broken)
    assert all(np.array_equal(before[name], tensor) for name, tensor in subject.policy.adapter_tensors().items())
    assert subject.step == 0


def test_lora_targets_that_name_no_module_are_refused(folder: Path) -> None:
    cfg = parse({"task": {"kind": "random_number"}, "lora": {"targets": ["no_such_layer"]}})
    with pytest.raises(ConfigError, match=r"lora.targets.*no_such_layer"):
        Learner(cfg, folder, CONSTRAINTS, "base", [1, 2])


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_learning_rate_warms_up_from_above_zero_and_decays(decay: str) -> None:
    settings = config(steps=50, warmup_steps=5, decay=decay, final_lr=0.1, lr=1.0).learner
    rates = [lr_at(settings, step) for step in range(50)]
    assert rates[0] == pytest.approx(1 / 6)
    assert max(rates) == pytest.approx(1.0)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(1.0 if decay == "constant" else 0.1)
    quarter = {"constant": 1.0, "linear": 0.775, "cosine": 0.1 + 0.45 * (1 + np.cos(np.pi / 4))}
    assert rates[16] == pytest.approx(quarter[decay], abs=0.01)
