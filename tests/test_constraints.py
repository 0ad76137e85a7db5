"""The policy's support: columns, stops, and values that contradict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.constraints import Constraints


def constraints(**over: Any) -> Constraints:
    values: dict[str, Any] = {"stop_token": 7, "min_tokens": 1, "max_tokens": 3, "vocab_size": 10, "allowed": [9, 2, 4, 2]}
    return Constraints.of(**values | over)


def test_columns_are_the_allowed_tokens_and_the_stop_each_once() -> None:
    support = constraints()
    assert support.columns.tolist() == [2, 4, 7, 9]
    assert support.columns.dtype == np.int64
    assert support.columns[support.stop_column] == 7
    assert constraints(allowed=[7, 2]).columns.tolist() == [2, 7]  # the stop is not there twice


def test_without_a_list_all_of_the_vocabulary_is_allowed() -> None:
    support = constraints(allowed=None)
    assert support.columns.tolist() == list(range(10))
    assert support.stop_column == 7


@given(st.sets(st.integers(0, 39), min_size=2), st.integers(0, 39), st.data())
def test_a_column_leads_back_to_its_token(allowed: set[int], stop: int, data: st.DataObject) -> None:
    support = constraints(allowed=sorted(allowed), stop_token=stop, vocab_size=40)
    tokens = np.array(data.draw(st.lists(st.sampled_from(sorted(allowed | {stop})))), np.int64)
    assert support.columns[support.column_of(tokens)].tolist() == tokens.tolist()
    assert support.columns[support.stop_column] == stop
    for outside in sorted(set(range(-1, 42)) - allowed - {stop}):
        with pytest.raises(ValueError, match=rf"tokens \[{outside}\] are outside the policy's support"):
            support.column_of(np.append(tokens, outside))


def test_columns_of_int32_tokens_and_of_none() -> None:
    assert constraints().column_of(np.array([9, 2], np.int32)).tolist() == [3, 0]
    assert constraints().column_of(np.zeros(0, np.int32)).tolist() == []


def test_stops_by_depth() -> None:
    depth = np.arange(5)
    assert constraints().may_stop(depth).tolist() == [False, True, True, True, True]
    assert constraints().must_stop(depth).tolist() == [False, False, False, True, True]
    assert constraints(min_tokens=0).may_stop(np.array(0))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"stop_token": 10}, "stop token 10 .* vocabulary of 10"),
        ({"stop_token": -1}, "stop token -1 .* vocabulary of 10"),
        ({"stop_token": -1, "allowed": None}, "stop token -1"),
        ({"allowed": [3, 10]}, "vocabulary of 10"),
        ({"allowed": [-1, 3]}, "vocabulary of 10"),
        ({"allowed": []}, "nothing is allowed but the stop"),
        ({"allowed": [7]}, "nothing is allowed but the stop"),
        ({"min_tokens": 4}, "min_tokens=4, max_tokens=3: 0 <= min <= max"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 0, "max_tokens": 0}, "max_tokens=0: .*max >= 1"),
    ],
)
def test_values_that_contradict_are_refused(over: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        constraints(**over)
