"""Questions that have an answer: how it is read from a text, where the questions come from, and the vote of several texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from system.config import ConfigError
from system.tasks.verifiable import correctness, last_number
from system.text import decode
from system.trajectory import Prompt
from tests.problems import TOKENIZER, asked, judged, problem


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" 7", 1),
        (" 3 + 4 = 7", 1),
        (" 7.0", 1),
        (" 7 or 8", 0),
        ("", 0),
        (" seven", 0),
        (" -7", 0),
        (" 17", 0),
        ("14-7", 1),
        ("14 - 7", 1),
        ("x7", 1),
        ("7,000", 0),
    ],
)
def test_the_last_number_of_an_answer_is_what_counts(text: str, score: float) -> None:
    assert last_number(Prompt("q", (1,), (1,), meta={"answer": "7"}), text, []) == score


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [("0", " 1,000", 0), ("1000", " 1,000", 1), ("1,000", " $1000.", 1), ("1,234.5", " 1234.50", 1), ("-3", " is -3", 1)],
)
def test_thousands_may_be_parted_by_commas_on_both_sides(answer: str, text: str, score: float) -> None:
    assert last_number(Prompt("q", (1,), (1,), meta={"answer": answer}), text, []) == score


def test_an_answer_that_is_no_number_needs_another_verifier() -> None:
    with pytest.raises(ValueError, match="'Paris' is no number; name a verifier"):
        last_number(Prompt("q", (1,), (1,), meta={"answer": "Paris"}), "none", [])


def test_the_packaged_questions_are_the_sums_of_two_digits(smollm2: PreTrainedTokenizerBase) -> None:
    given = problem("verifiable", smollm2)
    assert len(given.prompts) == 100
    assert (given.prompts[34].meta["question"], given.prompts[34].meta["answer"]) == ("What is 3 + 4?", "7")
    assert given.prompts[35].meta["answer"] == "8"
    assert decode(smollm2, given.prompts[34].policy_tokens) == "Question: What is 3 + 4?\nAnswer:"
    assert given.outcomes is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "line 1: no JSON"), ('{"question": "a?"}', "line 1: needs"), ('\n{"question": " ", "answer": 1}', "line 2: needs")],
)
def test_lines_that_are_no_questions_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        problem("verifiable", questions=str(tmp_path / "q.jsonl"))


def test_questions_come_from_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "1+1?", "answer": 2}\n{"question": "x?", "answer": "y"}')
    file = str(tmp_path / "q.jsonl")
    own = {"kind": "function", "path": "tests.test_rewards:last_letter"}
    given = problem("verifiable", questions=file, offset=1, reward=own)
    assert [(p.id, p.meta["answer"]) for p in given.prompts] == [("question-2", "y")]
    with pytest.raises(ConfigError, match=r"task.questions='.*q.jsonl': prompt 'question-2': the answer 'y' is no number"):
        problem("verifiable", questions=file)


@pytest.mark.parametrize(
    ("texts", "accuracy", "vote", "distinct"),
    [
        (["7", "so 7", "3", "7"], 0.75, 1.0, 2 / 3),
        (["7", "3"], 0.5, 0.0, 1.0),  # a tie
        (["7", "7", "3", "3", "3"], 0.4, 0.0, 0.5),
        (["7", "what", "who"], 1 / 3, 0.0, 1.0),  # most gave no number
        (["2", "none"], 0.0, 0.0, np.nan),
        (["7.0"], 1.0, 1.0, 1.0),
    ],
)
def test_answers_are_judged_alone_and_by_their_majority(
    texts: list[str], accuracy: float, vote: float, distinct: float
) -> None:
    result = judged(correctness, asked(answer="7"), texts)
    expected = {"accuracy": accuracy, "vote": vote, "distinct_answers": distinct}
    assert result == pytest.approx(expected, nan_ok=True)


def test_what_a_verifier_failed_for_is_wrong_and_votes_for_nothing() -> None:
    found = judged(correctness, asked(answer="7"), [" 7", " 7"], 2)
    assert found == {"accuracy": 0.5, "vote": 0.0, "distinct_answers": 0.5}
    assert judged(correctness, asked(answer="7"), [" 7", " 7"], 1)["vote"] == 1.0
    assert judged(correctness, asked(answer="7"), [], 4) == pytest.approx(
        {"accuracy": 0.0, "vote": 0.0, "distinct_answers": np.nan}, nan_ok=True
    )


def test_an_answer_that_is_no_number_gets_no_verdict() -> None:
    assert judged(correctness, asked(answer="Paris"), ["Paris"]) == {}


def test_completions_are_demonstrations(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "1 + 1", "answer": 2, "completion": " two\\n"}\n{"question": "1 + 2", "answer": 3}')
    given = problem("verifiable", questions=str(path))
    [known] = given.demonstrations["question-1"]
    assert decode(TOKENIZER, known.tokens_T.tolist()) == " two"
    assert set(given.demonstrations) == {"question-1"}
