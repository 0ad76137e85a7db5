from __future__ import annotations

from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerBase

from system.config_file import parse
from system.language_model import load_tokenizer
from system.models import locate
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
