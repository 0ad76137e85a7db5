from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from system.config_file import parse
from system.models import locate
from system.pretrained import load_tokenizer
from system.tools import Calculator, Player, play


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(locate(parse({"task": {"kind": "arithmetic"}}).model))


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (" 9 - 3 =", " 6"), (" 5 + 9 = 14, 14 - 3 =", " 11"), (" 2 - 8 =", " -6"), (" -6 - 7 =", " -13"), (" 3 + -4 =", " -1"),
        (" 0 - 0 =", " 0"), ("9-3=", " 6"),
        (" 9 - 3", ""), (" 9 - 3 = 6", ""), (" 9 =", ""), (" =", ""), ("", ""), (" 1 + 2 + 3 =", ""), (" 9 * 3 =", ""),
        (" 9 ** 9 =", ""), (" 1234567 + 1 =", ""), (" ٣ + ٤ =", ""), (" __import__('os') + 1 =", ""), (" 9 - - 3 =", ""),
    ],
)  # fmt: skip
def test_the_calculator_answers_two_operands_and_leaves_everything_else_alone(
    text: str, written: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(list(Calculator(tokenizer).output(tokens))) == written


PIECES = st.sampled_from(["=", ",", " ", "-", "+", "**", "9", "7" * 6, "1" * 7, "0", "٣", "__import__('os')", "e", "("])
SUM = re.compile(r"(?:.*[,=])?\s*(-?[0-9]{1,6})\s*([+-])\s*(-?[0-9]{1,6})\s*=", re.DOTALL)


@given(st.lists(PIECES, max_size=30))
def test_no_text_makes_the_calculator_do_anything_but_a_short_sum(
    tokenizer: PreTrainedTokenizerBase, pieces: list[str]
) -> None:
    """It answers with the sum, of seven digits at most, of what `SUM` reads; and with nothing else."""
    text = "".join(pieces)
    written = tokenizer.decode(list(Calculator(tokenizer).output(tokenizer.encode(text, add_special_tokens=False))))
    if match := SUM.fullmatch(text):
        left, sign, right = match.groups()
        assert written == f" {int(left) + int(right) * (1 if sign == '+' else -1)}"
        assert len(written) <= 9
    else:
        assert written == ""


LONG = ["9" * 200_000 + "=", " " * 200_000 + "=", "1 + " * 50_000 + "=", "=" * 100_000, "-" * 200_000 + "1="]


@pytest.mark.parametrize("text", LONG, ids=range(5))
def test_a_long_text_does_not_hold_the_calculator_up(text: str) -> None:
    class Letters:
        """A token for each character."""

        def decode(self, tokens: list[int], **_: object) -> str:
            return "".join(map(chr, tokens))

    letters: Any = Letters()
    started = time.process_time()
    assert Calculator(letters).output([ord(letter) for letter in text]) == ()
    assert time.process_time() - started < 5


class Doubling:
    """Writes a token twice after every 9."""

    def output(self, tokens: Sequence[int]) -> Sequence[int]:
        return (5, 5) if tokens[-1] == 9 else ()


def test_what_the_tool_writes_is_no_action_and_has_to_come_next() -> None:
    player = Player(Doubling(), 10)
    for token in (1, 9):
        assert player.forced is None
        player.push(token)
    assert (player.forced, player.depth) == (5, 2)
    with pytest.raises(ValueError, match="token 4 stands where the tool writes another one"):
        player.push(4)
    assert [array.tolist() for array in play(Doubling(), 10, [1, 9, 9])] == [
        [1, 9, 5, 5, 9, 5, 5],
        [True, True, False, False, True, False, False],
    ]


def test_an_output_beyond_the_budget_is_left_out_whole() -> None:
    tokens, is_action = play(Doubling(), 3, [9, 9])
    assert tokens.tolist() == [9, 5, 5, 9]
    assert is_action.tolist() == [True, False, False, True]
