"""Constrained texts: what satisfies, what cannot be asked for, and patterns and functions of the user's that do not end."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from system.config import ConfigError
from system.function_process import FunctionFault
from system.tasks.constrained import log_constraint, validity
from system.text import decode
from tests.problems import TOKENIZER, asked, judged, problem


@pytest.mark.parametrize(
    ("asked", "text", "satisfied"),
    [
        ({"keywords": ["sea", "Sun"]}, "The SUN sank into the sea", True),
        ({"keywords": ["sea", "sun"]}, "the sea", False),
        ({"keywords": ["sea"]}, "a season by the seaside", False),
        ({"keywords": ["a-b"]}, "we wrote a-b there", True),
        ({"pattern": r"\bA\w+ B\w+"}, "then Anna Bell left", True),
        ({"pattern": r"^ ?A"}, "then Anna left", False),
        ({"predicate": "tests.faulty:shouting"}, "A WONDERFUL DAY", True),
        ({"predicate": "tests.faulty:shouting", "keywords": ["day"]}, "a day", False),
    ],
)
def test_a_constraint_costs_its_floor_where_it_is_not_satisfied(asked: dict[str, Any], text: str, satisfied: bool) -> None:
    (prompt,) = problem("constrained", limit=1, floor=-15, **asked).prompts
    assert log_constraint(prompt, text, []) == (0.0 if satisfied else -15.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "keywords, pattern and predicate are all empty"),
        ({"pattern": "("}, "is no regular expression"),
        ({"pattern": "a{99999999999999999999}"}, "is no regular expression that can be used"),
        ({"keywords": ["a.b"]}, "'a.b' has '.', which is in task.illegal"),
        ({"keywords": ["sea", "maňana"]}, "task.keywords: 'maňana' has ['ň'], which is in no token that may be drawn"),
        ({"keywords": [" sea"]}, "task.keywords.0=' sea'"),
        ({"predicate": "tests.faulty:none"}, "task.predicate='tests.faulty:none' cannot be imported"),
    ],
)
def test_a_constraint_that_cannot_be_met_or_read_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        problem("constrained", **fields)


def test_keywords_are_in_the_support_unless_they_cannot_be_drawn_or_are_not_to_be(caplog: pytest.LogCaptureFixture) -> None:
    required = problem("constrained", limit=1, keywords=["sea", "at"], guided=True).constraints.required
    assert required is not None and required.words == ("sea", "at")
    assert [decode(TOKENIZER, tokens) for tokens in required.written] == [" sea", " at"]
    some = problem("constrained", limit=1, keywords=["sEa", "at"], guided=True).constraints.required
    assert some is not None and some.words == ("at",)
    assert "task.keywords: ['sEa'] cannot be drawn as written here" in caplog.text
    for fields in ({"keywords": ["sea"]}, {"keywords": ["sEa"], "guided": True}, {"pattern": "sea", "guided": True}):
        asked: dict[str, Any] = fields
        assert problem("constrained", limit=1, **asked).constraints.required is None, fields
    with pytest.raises(
        ConfigError, match=r"task.keywords: \['seaside'\] are 8 tokens, more than max_tokens=7; raise task.max_tok"
    ):
        problem("constrained", limit=1, keywords=["seaside"], max_tokens=7, guided=True)


def test_hints_are_keywords_as_a_sentence_has_them() -> None:
    made = problem("constrained", limit=1, keywords=["sea"])
    (hint,) = made.prompts[0].hints
    assert decode(TOKENIZER, list(hint)) == " sea" and made.constraints.admits(list(hint))


def test_a_pattern_that_backtracks_without_end_is_given_up_after_its_time() -> None:
    """`re` would take years for this text, and could not be stopped."""
    (prompt,) = problem("constrained", limit=1, pattern=r"^(a|aa)+$", seconds=0.2).prompts
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        log_constraint(prompt, "a" * 60 + "?", [])
    assert time.monotonic() - started < 10
    assert log_constraint(prompt, "aaa", []) == 0.0
    assert judged(validity, prompt, ["aaa", "a" * 60 + "?"])["validity"] == 0.5


def test_a_predicate_that_hangs_is_given_up_after_its_time() -> None:
    (prompt,) = problem("constrained", limit=1, predicate="tests.faulty:score", seconds=2).prompts
    with pytest.raises(FunctionFault, match="no answer after 2 s"):
        log_constraint(prompt, "spin", [])
    assert log_constraint(prompt, "fine", []) == 0.0


def test_a_predicate_reads_the_tokens_of_what_is_judged_and_what_it_fails_for_is_not_valid() -> None:
    (prompt,) = problem("constrained", limit=1, predicate="tests.faulty:short").prompts
    texts, tokens_K = ["ab", "abc", "", "ab"], [[7, 8], [7, 8, 9], [], [7, 8]]
    assert validity(prompt, texts, tokens_K, 0) == {"validity": 0.5, "distinct": 0.75}


def test_a_sample_that_the_predicate_failed_for_is_drawn_and_not_valid() -> None:
    (prompt,) = problem("constrained", limit=1, predicate="tests.faulty:short").prompts
    assert validity(prompt, ["ab", "ab"], [[7, 8], [7, 8]], 2) == {"validity": 0.5, "distinct": 0.5}
    assert validity(prompt, [], [], 4) == {"validity": 0.0}


def test_constrained_texts_are_judged_by_whether_they_satisfy() -> None:
    constraint = {"keywords": ["cat"], "pattern": None, "predicate": None, "floor": -20.0, "seconds": 1.0}
    result = judged(validity, asked(constraint=constraint), ["a cat", "a catalogue", "a dog", "Cat!"])
    assert result == {"validity": 0.5, "distinct": 1.0}
