"""Labels by latent reasons: what the stages ask for, and the vote against probabilities worked out one sequence at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.build import build_reward
from actors.posterior_reward import Posterior
from deploy import baselines
from learner.learner import Learner
from system import demonstrations, evaluation, tasks
from system.config import Config, ConfigError
from system.config_file import load, parse
from system.handles import GroupLogQ
from system.language_model import LanguageModel
from system.models import locate
from system.pretrained import load_pretrained, load_tokenizer
from system.scores import Scores
from system.tasks.problem import Problem
from system.tasks.subjectivity import PACKAGED_REVIEWS
from system.text import decode
from system.trajectory import Group, Prompt, Request, Trajectory, sampled
from system.voting import preferred, tally
from tests import tiny

TOKENIZER = tiny.tokenizer(64)
RECORDS = '{"text": "ab", "label": "y"}\n\n{"text": "cd", "label": 0, "label_text": "x", "id": "mine"}\n'
LETTERS = {"labels": ["x", "y"], "prompt": "q {text} is", "label_prompt": "q {text} it-", "evidence": " so-{label}."}
ROOT = Path(__file__).resolve().parents[1]


def section(folder: Path, text: str = RECORDS, **fields: Any) -> dict[str, Any]:
    (folder / "records.jsonl").write_text(text, encoding="utf-8")
    return {"kind": "subjectivity", "records": str(folder / "records.jsonl")} | LETTERS | fields


def config(task: dict[str, Any], **others: Any) -> Config:
    """With the loss that the task's stage asks for."""
    loss = "pooled" if task.get("stage", "reason") == "reason" else "mle"
    return parse({"task": task, "loss": {"kind": loss}} | others)


def labelled(folder: Path, text: str = RECORDS, **fields: Any) -> Problem:
    return tasks.build(config(section(folder, text, **fields)).task, TOKENIZER)


def text_of(tokens: Sequence[int] | None) -> str:
    """Without the beginning-of-sequence token."""
    return decode(TOKENIZER, tokens or ()).removeprefix("<s>")


def rationales(folder: Path, *rows: tuple[str, str, str]) -> str:
    """A file as deploy/evaluate.py writes it, of (prompt id, Z, context)."""
    path = folder / "rationales.jsonl"
    lines = [json.dumps({"prompt": name, "text": z, "context": context, "log_q": -1.0}) for name, z, context in rows]
    path.write_text("\n".join(lines))
    return str(path)


# -------------------------------------------------------------------------------------------------------- reasons


def test_a_reason_is_scored_with_the_label_as_evidence_and_drawn_without_it(tmp_path: Path) -> None:
    task = labelled(tmp_path, RECORDS)
    assert [prompt.id for prompt in task.prompts] == ["line-1", "mine"]
    assert [text_of(prompt.policy_tokens) for prompt in task.prompts] == ["q ab is", "q cd is"]
    assert [prompt.reward_tokens for prompt in task.prompts] == [prompt.policy_tokens for prompt in task.prompts]
    assert [text_of(prompt.evidence_tokens) for prompt in task.prompts] == [" so-y.", " so-x."]
    others = [[text_of(tokens) for tokens in task.alternatives[prompt.id]] for prompt in task.prompts]
    assert others == [[" so-x."], [" so-y."]]
    assert task.prompts[1].meta == {"text": "cd", "label": "x"}
    assert text_of(task.reward_stop) == text_of([task.constraints.stop_token]) == ","
    assert (task.constraints.min_tokens, task.constraints.max_tokens) == (1, 5)
    assert not task.demonstrations


def test_a_reason_may_hold_what_the_config_does_not_forbid(tmp_path: Path) -> None:
    def letters(illegal: Sequence[str] | None = None) -> str:
        fields: dict[str, Any] = {} if illegal is None else {"illegal": illegal}
        task = labelled(tmp_path, **fields)
        return text_of([token for token in task.constraints.columns if token != task.constraints.stop_token])

    assert "x" in letters()
    assert not set("\n,.?") & set(letters())
    assert "." in letters(illegal=["x"])
    assert "x" not in letters(illegal=["x"])


def test_the_longest_prompt_counts_the_longest_evidence_of_any_label(tmp_path: Path) -> None:
    task = labelled(tmp_path, labels=["x", "y", "zzz"], limit=1)
    assert task.longest_prompt == len("<q ab is") + len(",") + len(" so-zzz.")


def test_examples_stand_in_front_and_a_record_is_not_among_its_own(tmp_path: Path) -> None:
    (tmp_path / "shown.jsonl").write_text(
        '{"text": "ab", "label": 1}\n{"text": "ef", "label": "x"}\n{"text": "gh", "label": 1}'
    )
    fields: dict[str, Any] = {"examples": 2, "examples_from": str(tmp_path / "shown.jsonl")}
    for stage, end in (("reason", "is"), ("label", "it-")):
        first, second = labelled(tmp_path, stage=stage, **fields).prompts
        assert text_of(first.policy_tokens) == f"q ef it-x.\n\nq gh it-y.\n\nq ab {end}"
        assert text_of(second.reward_tokens) == f"q ab it-y.\n\nq ef it-x.\n\nq cd {end}"
    with pytest.raises(ConfigError, match=r"task\.examples=3: .* has 2 records besides 'line-1' itself"):
        labelled(tmp_path, examples=3, examples_from=fields["examples_from"])


# -------------------------------------------------------------------------------------------------------- answers


def test_an_answer_is_one_of_the_labels_and_imitates_the_right_one(tmp_path: Path) -> None:
    task = labelled(tmp_path, stage="label")
    assert [text_of(prompt.policy_tokens) for prompt in task.prompts] == ["q ab it-", "q cd it-"]
    assert [prompt.evidence_tokens for prompt in task.prompts] == [None, None]
    assert [text_of(choice.tokens_T.tolist()) for choice in task.choices] == ["x", "y"]
    shown = [[text_of(one.tokens_T.tolist()) for one in task.demonstrations[prompt.id]] for prompt in task.prompts]
    assert shown == [["y"], ["x"]]
    assert sorted(text_of([token]) for token in task.constraints.columns) == [".", "x", "y"]
    assert all(task.constraints.admits(one.tokens_T) for shown in task.demonstrations.values() for one in shown)
    assert (task.constraints.min_tokens, task.constraints.max_tokens) == (1, 1)
    assert not task.alternatives


def test_a_label_of_several_tokens_can_be_evidence_and_no_answer(tmp_path: Path) -> None:
    assert labelled(tmp_path, labels=["x", "y", "zz"]).prompts
    with pytest.raises(ConfigError, match=r"task\.labels='zz' is 2 tokens for this tokenizer"):
        labelled(tmp_path, labels=["x", "y", "zz"], stage="label")
    with pytest.raises(ConfigError, match=r"task\.evidence after \{label\}='' is 0 tokens"):
        labelled(tmp_path, evidence=" so-{label}", stage="label")


def test_each_rationale_of_a_record_becomes_a_prompt_of_the_last_stage(tmp_path: Path) -> None:
    file = rationales(
        tmp_path, ("mine", " m", "q cd is"), ("line-1", " n", "q ab is"), ("mine", " o", "q cd is"), ("z", "", "")
    )
    task = labelled(tmp_path, stage="predict", rationales=file)
    assert [prompt.id for prompt in task.prompts] == ["line-1/0", "mine/0", "mine/1"]
    assert [text_of(prompt.policy_tokens) for prompt in task.prompts] == ["q ab is n, so-", "q cd is m, so-", "q cd is o, so-"]
    assert [prompt.meta["record"] for prompt in task.prompts] == ["line-1", "mine", "mine"]
    assert text_of(task.demonstrations["mine/1"][0].tokens_T.tolist()) == "x"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("line-1", "n", "q ab is")], "has none for 1 of 2 records, such as 'mine'; draw them with the same task.offset"),
        ([("line-1", "n", "q other is"), ("mine", "m", "q cd is")], "line 1: 'line-1' is another text than in task.records"),
    ],
)
def test_rationales_of_other_records_are_refused(tmp_path: Path, rows: list[tuple[str, str, str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        labelled(tmp_path, stage="predict", rationales=rationales(tmp_path, *rows))
    (tmp_path / "rationales.jsonl").write_text('{"prompt": "line-1"}')
    with pytest.raises(ConfigError, match=r"line 1: needs .*as deploy/evaluate.py writes them"):
        labelled(tmp_path, stage="predict", rationales=str(tmp_path / "rationales.jsonl"))


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: no JSON"),
        ('{"text": "a", "label": 0}\n[]', "line 2: needs"),
        ('{"text": " ", "label": 0}', "line 1: needs"),
        ('{"text": "a"}', "line 1: needs"),
        ('{"text": "a", "label": 2}', "line 1: label=2 is none of task.labels=['x', 'y'] nor the number of one, from 0"),
        ('{"text": "a", "label": -1}', "line 1: label=-1 is none of"),
        ('{"text": "a", "label": true}', "line 1: label=True is none of"),
        ('{"text": "a", "label": "X"}', "line 1: label='X' is none of"),
        (
            '{"text": "a", "label": 0, "label_text": "y"}',
            "line 1: label=0 is 'x' by task.labels=['x', 'y'], but label_text='y'",
        ),
        ('{"text": "a", "label": 0, "id": 1}\n{"text": "b", "label": 0, "id": 1}', "two records have the same id"),
    ],
)
def test_lines_that_are_no_records_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        labelled(tmp_path, text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ["x"]}, "labels=['x'] must be two or more that differ"),
        ({"labels": ["x", "x"]}, "must be two or more that differ"),
        ({"evidence": " so."}, "evidence=' so.' is the same for every label; write {label}"),
        ({"prompt": "{review}"}, "only {text} can be filled in"),
        ({"stage": "predict"}, "stage=predict with rationales=None"),
        ({"rationales": "a.jsonl"}, "stage=reason with rationales='a.jsonl'"),
        ({"examples": 2}, "examples=2 with examples_from=None: set how many and the file, or neither"),
        ({"examples_from": "a.jsonl"}, "examples=0 with examples_from='a.jsonl'"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        labelled(tmp_path, **fields)


def test_the_packaged_records_are_balanced_and_every_stage_fits_the_packaged_model(tmp_path: Path) -> None:
    packaged = load(ROOT / "deploy/configs/subjectivity.yaml")
    tokenizer = load_tokenizer(locate(packaged.model))
    task = tasks.build(packaged.task, tokenizer)
    labels = [prompt.meta["label"] for prompt in task.prompts]
    assert labels.count("objective") == labels.count("subjective") == 10
    assert [decode(tokenizer, task.prompts[0].evidence_tokens or ())] == [" so it is objective."]

    lines = [json.loads(line) for line in PACKAGED_REVIEWS.read_text(encoding="utf-8").splitlines()]
    assert len({line["text"] for line in lines}) == 20
    fields = {"kind": "subjectivity", "stage": "label", "examples": 4, "examples_from": "packaged"}
    answer = tasks.build(config(fields).task, tokenizer)
    file = rationales(tmp_path, *[(prompt.id, " long", prompt.meta["text"]) for prompt in task.prompts])
    last = tasks.build(config({"kind": "subjectivity", "stage": "predict", "rationales": file}).task, tokenizer)
    # The space before a label is part of its token, so no prompt ends with it.
    assert decode(tokenizer, last.prompts[0].policy_tokens).endswith('" This review is long, so it is')
    assert [decode(tokenizer, choice.tokens_T.tolist()) for choice in answer.choices] == [" objective", " subjective"]
    assert decode(tokenizer, answer.prompts[0].policy_tokens).endswith(f'"{lines[0]["text"]}" It is')


# ------------------------------------------------------------------------------------------------------ the vote


@pytest.mark.parametrize(
    ("votes", "vote", "share", "agree"),
    [
        ([1, 1, 0], 1, 2 / 3, 2 / 3),
        ([1, 0], 0, 1 / 2, 1 / 2),  # a tie is wrong
        ([0, 0, 1], 0, 1 / 3, 2 / 3),
        ([2, 0, 1, 1], 1, 1 / 2, 1 / 2),  # more than any other is enough
        ([0, 0], 0, 0, 1),
        ([1], 1, 1, 1),
    ],
)
def test_the_answer_with_the_most_votes_is_the_prediction(votes: list[int], vote: float, share: float, agree: float) -> None:
    assert tally(np.array(votes), truth=1) == {"vote": vote, "accuracy": share, "votes_agree": agree}


def test_a_sample_prefers_the_likeliest_evidence_and_of_equals_the_first() -> None:
    assert preferred(np.array([[-3.0, -1.0, -2.0], [-2.0, -4.0, -2.0]])).tolist() == [1, 0, 0]


def log_prob(model: PreTrainedModel, context: Sequence[int], continuation: Sequence[int]) -> float:
    """log p(continuation | context) by a plain forward pass."""
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([[*context, *continuation]]), use_cache=False).logits[0, :-1].log_softmax(-1)
    return sum(float(logp[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


class Frozen:
    """Samplers that answer every request with the same texts, scored by a real reward."""

    def __init__(self, model: PreTrainedModel, stop: Sequence[int], texts: Sequence[str]) -> None:
        self.reward = Posterior(LanguageModel(model), stop)
        self.samples = tuple(sampled(TOKENIZER.encode(text, add_special_tokens=False)) for text in texts)

    def log_reward(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Future[Scores]:
        future: Future[Scores] = Future()
        future.set_result(self.reward.score(prompt, trajectories_K))
        return future

    def publish(self, adapter: Any) -> None: ...

    def sample(self, request: Request) -> Future[Group]:
        future: Future[Group] = Future()
        log_reward_K = tuple(self.reward.log_rewards(request.prompt, self.samples))
        future.set_result(Group(request.prompt, self.samples, log_reward_K, 0, request.group_id))
        return future


class Learned:
    """A learner of this process behind the handle of a remote one."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def score(self, groups: Sequence[Group]) -> Future[list[GroupLogQ]]:
        future: Future[list[GroupLogQ]] = Future()
        future.set_result(self.learner.score(groups))
        return future


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("subjectivity"))


def tuned(cfg: Config, problem: Problem) -> Learner:
    """A policy that differs from the base model."""
    learner = Learner(cfg, locate(cfg.model), problem.constraints, cfg.model.path, list(range(10, 30)))
    tiny.perturb(learner.policy.parameters.values())
    return learner


def built(folder: Path, task: dict[str, Any]) -> tuple[Config, PreTrainedTokenizerBase, Problem]:
    cfg = config(task, model={"path": str(folder)}, lora={"rank": 4})
    return cfg, TOKENIZER, tasks.build(cfg.task, TOKENIZER)


SAMPLES = ["m", "nn", "o p", "r", "s", "tu", "v"]


def test_an_evaluation_lets_each_sample_vote_for_the_label_that_the_frozen_model_finds_likeliest(
    folder: Path, tmp_path: Path
) -> None:
    """Three labels of different lengths, against log p(label | X Z stop) from one sequence at a time."""
    records = "".join(json.dumps({"text": text, "label": n % 3}) + "\n" for n, text in enumerate("abcdefghi"))
    cfg, _, problem = built(folder, section(tmp_path, records, labels=["x", "y", "zz"]))
    model = load_pretrained(folder, torch.float32, torch.device("cpu"))
    samplers = Frozen(model, problem.reward_stop, SAMPLES)
    result = evaluation.sampled(
        problem.prompts, samplers, Learned(tuned(cfg, problem)), samples=len(SAMPLES), temperature=1.0, seed=0, round_=0,
        decode=text_of, judge=evaluation.judge(problem, text_of, samplers),
    )  # fmt: skip

    right, shares, agreement = [], [], []
    for prompt in problem.prompts:
        votes = []
        for z in samplers.samples:
            context = [*prompt.reward_tokens, *z.tokens_T.tolist(), *problem.reward_stop]
            evidence = {
                label: TOKENIZER.encode(f" so-{label}.", add_special_tokens=False)
                for label in cfg.task.labels  # type: ignore[union-attr]
            }
            votes.append(max(evidence, key=lambda label: log_prob(model, context, evidence[label])))
        counts = {label: votes.count(label) for label in votes}
        own = counts.pop(prompt.meta["label"], 0)
        right.append(own > max(counts.values(), default=0))
        shares.append(own / len(SAMPLES))
        agreement.append(max([own, *counts.values()]) / len(SAMPLES))
    assert 0 < np.mean(right) < 1
    assert 0 < np.mean(shares) < 1
    assert [row["task/vote"] for row in result.per_prompt] == right
    assert result.metrics["task/vote"] == pytest.approx(np.mean(right))
    assert result.metrics["task/accuracy"] == pytest.approx(np.mean(shares))
    assert result.metrics["task/votes_agree"] == pytest.approx(np.mean(agreement))


def test_a_contrast_sharpens_the_likelihood_among_the_labels_of_the_task(folder: Path, tmp_path: Path) -> None:
    factors = [{"kind": "lm_posterior"}, {"kind": "contrast", "power": 2.0}]
    cfg, tokenizer, problem = built(folder, section(tmp_path, reward={"kind": "product", "of": factors}))
    model = load_pretrained(folder, torch.float32, torch.device("cpu"))
    reward = build_reward(cfg, problem, tokenizer, LanguageModel(model))
    for prompt in problem.prompts:
        [log_reward_T] = reward.score(prompt, [sampled([7, 8])]).complete()
        context = [*prompt.reward_tokens, 7, 8]
        own, other = (log_prob(model, context, [*problem.reward_stop, *y]) for y in problem.evidences[prompt.id])
        path = log_prob(model, prompt.reward_tokens, [7, 8])
        assert log_reward_T[-1] == pytest.approx(path + own + 2.0 * (own - np.logaddexp(own, other)), abs=1e-3)


def test_a_verdict_of_texts_and_a_vote_come_together(tmp_path: Path, folder: Path) -> None:
    _, _, problem = built(folder, section(tmp_path))
    model = load_pretrained(folder, torch.float32, torch.device("cpu"))
    samplers = Frozen(model, problem.reward_stop, SAMPLES[:3])
    group = samplers.sample(Request(-1, problem.prompts[0], (), 0)).result()
    both = evaluation.judge(replace(problem, judge=first_letters), text_of, samplers)(group)
    assert set(both) == {"letters", "vote", "accuracy", "votes_agree"}
    assert both["letters"] == 3
    assert evaluation.judge(replace(problem, alternatives={}), text_of, samplers)(group) == {}
    with_faults = evaluation.judge(problem, text_of, samplers)(replace(group, faults=("log of zero",)))
    assert with_faults["accuracy"] == pytest.approx(both["accuracy"] * 3 / 4)
    none = evaluation.judge(problem, text_of, samplers)(Group(group.prompt, (), (), 0, 0, ("log of zero",) * 4))
    assert none == {"vote": 0.0, "accuracy": 0.0, "votes_agree": 0.0}


def test_a_vote_whose_reward_cannot_be_had_is_left_out_and_named(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(Frozen):
        def log_reward(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Future[Scores]:
            answer: Future[Scores] = Future()
            answer.set_result(Scores([], {0: "log of zero"}))
            return answer

    _, _, problem = built(folder, section(tmp_path))
    model = load_pretrained(folder, torch.float32, torch.device("cpu"))
    samplers = Faulty(model, problem.reward_stop, SAMPLES[:3])
    prompt = problem.prompts[0]
    group = samplers.sample(Request(-1, prompt, (), 0)).result()
    judge = evaluation.judge(replace(problem, judge=first_letters), text_of, samplers)
    assert judge(group) == {"letters": 3}
    assert f"{prompt.id} has no vote, as its samples have no reward: log of zero" in caplog.text


def test_reasons_that_are_sampled_without_training_vote_too(tmp_path: Path, folder: Path) -> None:
    cfg, _, problem = built(folder, section(tmp_path))
    metrics, rows = baselines.Baselines(cfg, {}, None).measure("ancestral", 4)
    assert {"task/vote", "task/accuracy", "task/votes_agree"} <= set(metrics)
    model = load_pretrained(folder, torch.float32, torch.device("cpu"))
    prompts = {prompt.id: prompt for prompt in problem.prompts}
    right = []
    for row in rows:
        prompt = prompts[row["prompt"]]
        context = [*prompt.reward_tokens, *row["tokens"], *problem.reward_stop]
        own, other = (log_prob(model, context, y) for y in problem.evidences[prompt.id])
        right.append(own > other)
    assert metrics["task/accuracy"] == pytest.approx(np.mean(right))


def first_letters(prompt: Prompt, texts: Sequence[str], tokens_K: Sequence[Sequence[int]], unscored: int) -> dict[str, float]:
    return {"letters": float(len({text[0] for text in texts}))}


def test_an_answer_is_judged_by_the_policys_exact_probabilities_and_rationales_of_a_record_vote(
    folder: Path, tmp_path: Path
) -> None:
    records = [(f"line-{n + 1}", text, n % 2) for n, text in enumerate("abcdefgh")]
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for _, text, label in records)
    file = rationales(tmp_path, *[(name, z, text) for z in SAMPLES[:5] for name, text, _ in records])
    cfg, _, problem = built(folder, section(tmp_path, lines, stage="predict", rationales=file))
    learner = tuned(cfg, problem)
    result = evaluation.without_samples(problem, Learned(learner))
    assert result is not None

    adapted: Any = learner.policy.language_model.model
    x, y = (TOKENIZER.encode(label, add_special_tokens=False)[0] for label in "xy")
    right, agreement, likelihood, shares = [], [], [], []
    for _, text, label in records:
        votes = []
        for z in SAMPLES[:5]:
            context = TOKENIZER.encode(f"q {text} is{z}, so-")
            with torch.no_grad():
                logits = adapted(input_ids=torch.tensor([context]), use_cache=False).logits[0, -1].double()
            logp = logits[[x, y]].log_softmax(-1)
            votes.append(int(logp.argmax()) == label)
            likelihood.append(float(logp[label]))
        right.append(sum(votes) > 2.5)
        shares.append(np.mean(votes))
        agreement.append(max(np.mean(votes), 1 - np.mean(votes)))
    assert 0 < np.mean(right) < 1
    assert result.metrics == pytest.approx(
        {
            "task/vote": np.mean(right),
            "task/accuracy": np.mean(shares),
            "task/votes_agree": np.mean(agreement),
            "task/log_likelihood": np.mean(likelihood),
        },
        abs=1e-4,
    )
    assert len(result.per_prompt) == 40
    assert not result.samples

    class Sliced(Learned):
        asked: ClassVar[list[int]] = []

        def score(self, groups: Any) -> Any:
            self.asked.append(len(groups))
            return super().score(groups)

    few = evaluation.without_samples(problem, Sliced(learner), most=2)
    assert few is not None
    assert {row["prompt"].split("/")[0] for row in few.per_prompt} == {"line-1", "line-5"}
    assert few.metrics["task/vote"] == pytest.approx(np.mean([right[0], right[4]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "AT_ONCE", 16)
        sliced = evaluation.without_samples(problem, Sliced(learner))
    assert Sliced.asked == [10, 16, 16, 8]
    assert sliced is not None
    assert sliced.metrics == pytest.approx(result.metrics)


def test_imitating_the_labels_makes_the_policy_answer_them(folder: Path, tmp_path: Path) -> None:
    # The base model is right about neither of these.
    task = section(tmp_path, '{"text": "ab", "label": "x"}\n{"text": "cd", "label": "y"}', stage="label")
    cfg = parse(
        {
            "model": {"path": str(folder)}, "lora": {"rank": 4}, "task": task, "loss": {"kind": "mle"},
            "learner": {"steps": 12, "lr": 0.02, "warmup_steps": 0},
        }
    )  # fmt: skip
    problem = tasks.build(cfg.task, TOKENIZER)
    model = load_pretrained(folder, torch.float32, torch.device("cpu"))
    groups = demonstrations.scored(problem, Frozen(model, problem.reward_stop, []))
    learner = Learner.build(cfg, problem)
    before = evaluation.chosen(problem, Learned(learner)).metrics
    losses = [learner.update(groups)["loss"] for _ in range(12)]
    # After a label the stop is certain: it is no action that halves the loss.
    assert losses[0] == pytest.approx(-before["task/log_likelihood"], rel=1e-4)
    after = evaluation.chosen(problem, Learned(learner)).metrics
    assert before["task/vote"] == 0
    assert after["task/vote"] == 1
    assert after["task/log_likelihood"] > max(before["task/log_likelihood"], np.log(0.9))


def test_an_offset_skips_records(tmp_path: Path) -> None:
    assert [prompt.id for prompt in labelled(tmp_path, offset=1).prompts] == ["mine"]


def test_a_record_that_is_held_out_takes_all_its_rationales_along(tmp_path: Path) -> None:
    rows = [("mine", " m", "q cd is"), ("line-1", " n", "q ab is"), ("mine", " o", "q cd is")]
    task = labelled(tmp_path, stage="predict", rationales=rationales(tmp_path, *rows), held_out=1)
    assert [prompt.id for prompt in task.trained] == ["line-1/0"]
    assert [prompt.id for prompt in task.evaluated] == ["mine/0", "mine/1"]
