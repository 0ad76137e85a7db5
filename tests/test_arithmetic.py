from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from system import tasks
from system.config import ConfigError
from system.config_file import parse
from system.evaluation import evenly
from system.models import locate
from system.pretrained import load_tokenizer
from system.task_config import Arithmetic
from system.tasks.arithmetic import evaluate, generate, judge, log_correct, read_questions, result, steps_of
from system.tasks.problem import Problem
from system.text import decode
from system.tools import play
from system.trajectory import Prompt


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(locate(parse({"task": {"kind": "arithmetic"}}).model))


def build(tokenizer: PreTrainedTokenizerBase, **fields: Any) -> Problem:
    return tasks.build(Arithmetic(**fields), tokenizer)


def test_demonstrations_are_right_rationales_that_the_policy_and_the_calculator_write(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    problem = build(tokenizer, count=200)
    assert len(problem.prompts) == 197
    assert len(problem.demonstrations) == 47
    assert problem.tool is not None
    for prompt in problem.prompts[:47]:
        (shown,) = problem.demonstrations[prompt.id]
        assert result(decode(tokenizer, shown.tokens_T.tolist())) == prompt.meta["answer"]
        actions = shown.tokens_T[shown.is_action_T]
        assert problem.constraints.admits(actions)
        assert play(problem.tool, problem.constraints.tool_tokens, actions.tolist())[0].tolist() == shown.tokens_T.tolist()
        assert 0 < (~shown.is_action_T).sum() <= problem.constraints.tool_tokens


def test_a_demonstration_with_the_most_actions_has_a_forced_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    def shown(**fields: Any) -> dict[int, str]:
        """How demonstrations stop, by their actions."""
        demonstrations = build(tokenizer, count=200, **fields).demonstrations.values()
        return {int(one.is_action_T.sum()): one.stop for (one,) in demonstrations}

    longest = max(shown())
    assert set(shown().values()) == {"sampled"}
    assert shown(max_tokens=longest).pop(longest) == "forced"


def test_the_examples_stand_in_front_and_are_not_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    problem = build(tokenizer, count=60, examples=2)
    texts = [decode(tokenizer, prompt.policy_tokens) for prompt in problem.prompts]
    front = texts[0].rpartition("Question:")[0]
    assert front.count("The answer is") == 2
    questions = [text.removeprefix(front) for text in texts]
    assert all(text.startswith(front) for text in texts)
    assert not any(question in front for question in questions)
    prompt = problem.prompts[0]
    assert prompt.reward_tokens == prompt.policy_tokens
    assert decode(tokenizer, prompt.evidence_tokens or ()) == f" The answer is {prompt.meta['answer']}."


@pytest.mark.parametrize("operands", [(3,), (3, 4), (5, 6)])
def test_no_generated_question_is_in_both_halves(operands: tuple[int, ...]) -> None:
    training, test = (generate(operands, 400, test=half) for half in (False, True))
    assert len({question.text for question in training}) == len({question.text for question in test}) == 400
    assert not {question.text for question in training} & {question.text for question in test}


def test_test_questions_may_have_other_operands_than_the_examples() -> None:
    questions, shown = read_questions(Arithmetic(split="test", test_operands=(6,), count=30))
    assert {question.text.count(" + ") + question.text.count(" - ") for _, question in questions} == {5}
    assert {len(question.steps or ()) for question in shown} == {2, 3}


@pytest.mark.parametrize(
    ("expression", "value", "steps"),
    [
        ("6 - 0 - 4 - 8", -6, ("6 - 0", "6 - 4", "2 - 8")),
        ("0 + 3 - 8 - 5", -10, ("0 + 3", "3 - 8", "-5 - 5")),
        ("9 - 9", 0, ("9 - 9",)),
    ],
)
def test_an_expression_is_worked_out_from_left_to_right(expression: str, value: int, steps: tuple[str, ...]) -> None:
    assert evaluate(expression) == value
    assert steps_of(expression) == steps


def test_files_of_the_papers_format_are_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    worked = {"str_query": "Question: 6 - 0 - 4 = ? Answer:", "num_sol": 2, "str_rationale": "6 - 0 =, 6 - 4 ="}
    plain = {"question": "Question: 1 + 2 = ? Answer:", "answer": 3}
    (tmp_path / "worked.json").write_text(json.dumps([worked]))
    (tmp_path / "asked.jsonl").write_text(json.dumps(plain))
    files = {"questions": str(tmp_path / "asked.jsonl"), "rationales": str(tmp_path / "worked.json")}
    problem = build(tokenizer, examples=0, **files)
    assert [prompt.meta["answer"] for prompt in problem.prompts] == [2, 3]
    (shown,) = problem.demonstrations["question-1"]
    assert decode(tokenizer, shown.tokens_T.tolist()) == " 6 - 0 = 6, 6 - 4 = 2"
    assert [p.meta["answer"] for p in build(tokenizer, examples=1, split="test", **files).prompts] == [3]
    with pytest.raises(ConfigError, match=r"task.examples=2, but only 1 questions have a rationale"):
        build(tokenizer, examples=2, **files)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "1 + 2", "answer": 3}, "record 1: needs"),
        ({"question": "Question: 1 * 2 = ? Answer:", "answer": 2}, "record 1: needs"),
        ({"question": "Question: 1 + 2 = ? Answer:", "answer": "3"}, "record 1: needs"),
        ({"question": "Question: 1 + 2 = ? Answer:", "answer": 4}, "is 3, not 4; mend the file"),
    ],
)
def test_a_question_that_is_none_is_refused_by_its_number(
    record: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "asked.json").write_text(json.dumps([record]))
    with pytest.raises(ConfigError, match=message):
        build(tokenizer, examples=0, questions=str(tmp_path / "asked.json"))


@pytest.mark.parametrize(
    ("rationale", "message"),
    [
        (None, 'has no "rationale"; give it one'),
        ("", "'' is no step"),
        ("foo", "'foo' is no step"),
        ("6 - 0 =, foo =", "'foo =' is no step"),
        ("6 - 0 =, 6-4 =", "'6-4 =' is no step"),
        ("6 - 0", "'6 - 0' is no step"),
        ("6 - 0 - 4 =", "'6 - 0 - 4 =' is no step"),
        ("1000000 - 999998 =", "is no step"),
        ("6 - 0 = 5, 6 - 4 = 2", "'6 - 0 = 5' is no step"),
        ("6 - 0 =, 6 - 5 =", "ends at 1, not at 2; mend the file"),
    ],
)
def test_a_rationale_that_is_not_what_the_calculator_computes_is_refused(
    rationale: str | None, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    plain = {"question": "Question: 6 - 0 - 4 = ? Answer:", "answer": 2}
    good = plain | {"rationale": "6 - 0 = 6, 6 - 4 ="}
    (tmp_path / "asked.json").write_text(json.dumps([plain]))
    (tmp_path / "worked.json").write_text(json.dumps([good, plain if rationale is None else plain | {"rationale": rationale}]))
    files = {"questions": str(tmp_path / "asked.json"), "rationales": str(tmp_path / "worked.json")}
    with pytest.raises(ConfigError, match=rf"task\.rationales='.*worked\.json', record 2: .*{message}"):
        build(tokenizer, examples=1, **files)


def test_votes_decide_and_what_cannot_be_read_is_wrong() -> None:
    prompt = Prompt("p", (1,), (1,), meta={"answer": 6, "expression": "9 - 3"})
    right, wrong, none = " 9 - 3 = 6", " 9 - 2 = 7", " 9 - 3 = 6, 6"

    def verdict(*texts: str, unscored: int = 0) -> dict[str, float]:
        return judge(prompt, texts, [()] * len(texts), unscored)

    two_thirds = pytest.approx(2 / 3)
    assert verdict(right, right, wrong) == {"vote": 1.0, "accuracy": two_thirds, "worked_out": two_thirds}
    assert verdict(right, wrong)["vote"] == 0.0
    assert verdict(wrong, wrong, right)["vote"] == 0.0
    assert verdict(none, "6", "") == {"vote": 0.0, "accuracy": 0.0, "worked_out": 0.0}
    assert verdict(right, none, none)["vote"] == 0.0
    assert verdict(right, right, none)["vote"] == 1.0
    assert verdict(right, unscored=1) == {"vote": 0.0, "accuracy": 0.5, "worked_out": 0.5}
    assert verdict(" 2 + 2 + 2 = 6") == {"vote": 1.0, "accuracy": 1.0, "worked_out": 0.0}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 9 - 3 = 6, 6 + 6 = 12, 12 - 1 = 11", True),
        (" 9 - 3 + 6 - 1 = 11", False),  # the calculator leaves it alone: 11 is a guess
        (" 9 + 2 = 11", False),
        (" 9 - 3 = 6, 6 + 5 = 11", False),
        (" 9 - 3 = 6, 6 + 6 = 11, 11 + 0 = 11", False),  # not what the calculator writes
        (" 9 - 3 = 6, 6 + 6 = 12, 10 + 1 = 11", False),
        (" 9 - 3 = 6, 6 + 6 = 12, 12 - 2 = 10", False),
        (" 9 + 6 = 15, 15 - 3 = 12, 12 - 1 = 11", True),
        (" 9 - 3 = 6, 6 + 4 = 10, 10 + 1 = 11", False),  # other operands, and the answer all the same
        (" 1 + 1 = 2, 2 + 1 = 3, 3 + 8 = 11", False),
        (" 9 - 3 = 6, 6 + 5 = 11, 11 + 0 = 11", False),
        (" 9 - 3 = 6, 6 + 6 = 12, 12 - 1 = 11, 11 + 0 = 11", False),
        (" 9 - 3 = 6, 6 + 6 = 12, 12 - 1 =", False),
        (" 11", False),
        ("", False),
    ],
)
def test_only_a_rationale_that_works_the_question_out_is_rewarded(text: str, right: bool) -> None:
    prompt = Prompt("p", (1,), (1,), meta={"answer": 11, "expression": "9 - 3 + 6 - 1"})
    assert log_correct(prompt, text, []) == (0.0 if right else -20.0)


def test_what_demonstrations_show_is_rewarded(tokenizer: PreTrainedTokenizerBase) -> None:
    problem = build(tokenizer, count=200)
    for prompt in problem.prompts:
        for shown in problem.demonstrations.get(prompt.id, ()):
            assert log_correct(prompt, decode(tokenizer, shown.tokens_T.tolist()), []) == 0.0


def test_a_question_that_no_sample_has_room_for_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    for field in ("max_tokens", "tool_tokens"):
        with pytest.raises(ConfigError, match=rf"task\.{field}=12: to work out .* takes \d+ of them; raise it"):
            build(tokenizer, operands=(8,), count=60, **({"max_tokens": 100, "tool_tokens": 100} | {field: 12}))


def test_an_evaluation_takes_prompts_evenly_from_all_of_them() -> None:
    prompts = [Prompt(str(number), (1,), (1,)) for number in range(10)]
    assert [prompt.id for prompt in evenly(prompts, 4)] == ["0", "2", "5", "7"]
    assert evenly(prompts, 10) is prompts


def test_the_test_split_asks_nothing_that_was_trained_on_or_shown() -> None:
    asked, shown = read_questions(Arithmetic(split="test", count=200))
    trained, _ = read_questions(Arithmetic(count=200))
    known = {question.expression for question in (*(question for _, question in trained), *shown)}
    assert len(asked) == 200
    assert not known & {question.expression for _, question in asked}


def test_offset_and_limit_choose_among_the_questions() -> None:
    assert read_questions(Arithmetic(count=60, offset=3, limit=2))[0] == read_questions(Arithmetic(count=60))[0][3:5]
