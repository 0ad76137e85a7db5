"""Continuations: their prompts, which of them are held out, what may be drawn after them, and how much of it is distinct."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from system import demonstrations
from system.config import ConfigError
from system.scores import Scores
from system.task_config import Continuation
from system.tasks.continuation import length, read_prompts, variety
from system.tasks.problem import Problem, single_token
from system.text import decode
from system.trajectory import Prompt, Trajectory
from tests.problems import TOKENIZER, asked, judged, problem, text_of


def continuation(text: str, folder: Path, **fields: Any) -> Problem:
    (folder / "prompts.txt").write_text(text, encoding="utf-8")
    return problem("continuation", prompts=str(folder / "prompts.txt"), **fields)


def test_prompts_are_the_lines_of_a_file_each_once(tmp_path: Path) -> None:
    task = continuation("one line \n\n  \ntwo.\none line\nthree\n", tmp_path)
    assert [prompt.id for prompt in task.prompts] == ["line-1", "line-4", "line-6"]
    assert [text_of(prompt) for prompt in task.prompts] == ["one line", "two.", "three"]
    assert all(prompt.reward_tokens == prompt.policy_tokens and prompt.evidence_tokens is None for prompt in task.prompts)


def test_offset_and_limit_choose_among_the_prompts(tmp_path: Path) -> None:
    def chosen(**fields: int) -> list[str]:
        return [prompt.meta["text"] for prompt in continuation("a\nb\nc\nd\n", tmp_path, **fields).prompts]

    assert chosen(offset=1, limit=2) == ["b", "c"]
    assert chosen(offset=3, limit=9) == ["d"]
    with pytest.raises(ConfigError, match=r"has 4 prompts, none of them after task\.offset=4; lower the offset"):
        chosen(offset=4)


def test_what_is_held_out_is_evaluated_and_nothing_else_is_trained_on(tmp_path: Path, smollm2: PreTrainedTokenizerBase) -> None:
    def texts(prompts: tuple[Prompt, ...]) -> list[str]:
        return [text_of(prompt) for prompt in prompts]

    task = continuation("a\nb\nc\nd\ne", tmp_path, limit=4, held_out=1)
    assert (texts(task.trained), texts(task.evaluated)) == (["a", "b", "c"], ["d"])
    everything = continuation("a\nb", tmp_path)
    assert texts(everything.trained) == texts(everything.evaluated) == ["a", "b"]
    with pytest.raises(ConfigError, match=r"task\.held_out=2 leaves nothing of 2 prompts to train on; lower it"):
        continuation("a\nb", tmp_path, held_out=2)
    stories = problem("infilling", smollm2, held_out=3)
    assert len(demonstrations.scored(stories, Unscored())) == len(stories.prompts) - 3


class Unscored:
    def log_reward(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Future[Scores]:
        future: Future[Scores] = Future()
        future.set_result(Scores([np.zeros(len(trajectory) + 1) for trajectory in trajectories_K]))
        return future


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffone\ntwo".encode())
    assert read_prompts(Continuation(prompts=str(tmp_path / "prompts.txt"))) == [
        (1, {"prompt": "one"}),
        (2, {"prompt": "two"}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"task\.prompts='.*' cannot be read: No such file or directory; name a file"),
        ("caf\xe9".encode("latin-1"), r"task\.prompts='.*' is not UTF-8 \(byte 3\); convert it"),
        (b"\n  \n", r"task\.prompts='.*' is empty; name a file"),
        (b'\n{"prompt": "a"}\n', r"task\.prompts='.*' begins with a record in JSON.*: call the file .jsonl"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        problem("continuation", prompts=str(path))


def test_the_packaged_prompts_are_distinct_and_enough_to_hold_some_out() -> None:
    prompts = problem("continuation").prompts
    assert len(prompts) >= 20
    assert len({prompt.policy_tokens for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize("tokenizer", ["tiny", "smollm2"])
def test_the_support_holds_no_special_token_and_no_illegal_text(tokenizer: str, smollm2: PreTrainedTokenizerBase) -> None:
    chosen = smollm2 if tokenizer == "smollm2" else TOKENIZER
    task = problem("continuation", chosen, illegal=["\n", "?", "a", "."])
    support = task.constraints
    drawn = [token for token in support.columns.tolist() if token != support.stop_token]
    texts = [str(chosen.decode([token])) for token in drawn]
    assert not set(drawn) & set(chosen.all_special_ids)
    assert not [text for text in texts if any(piece in text for piece in "\n?a.") or "�" in text or not text]
    assert single_token(chosen, "b", "b") in drawn
    assert single_token(chosen, "a", "a") not in drawn
    assert support.stop_token not in drawn
    assert task.reward_stop == (support.stop_token,) == (single_token(chosen, ".", "stop"),)
    assert (task.outcomes, task.log_target_O) == (None, None)


def test_lengths_are_those_of_the_config() -> None:
    support = problem("continuation", min_tokens=2, max_tokens=5).constraints
    assert (support.min_tokens, support.max_tokens) == (2, 5)


def test_continuations_are_judged_by_the_share_of_distinct_ones() -> None:
    assert judged(variety, asked(), ["a", "b", "a", "a"]) == {"distinct": 0.5}


def test_a_sentence_is_worth_its_tokens() -> None:
    assert length(asked(), "abc", [7, 8]) == 2.0


def test_completions_are_demonstrations_where_the_policy_can_draw_them(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "one", "completion": " two."}',
        '{"prompt": "three", "completions": [" four", " fi?ve.", " six."], "note": 1}',
        '{"prompt": "seven"}',
        '{"prompt": "one", "completion": " eight."}',
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    task = problem("continuation", prompts=str(path))
    known = {
        name: [decode(TOKENIZER, known.tokens_T.tolist()) for known in known_K] for name, known_K in task.demonstrations.items()
    }
    assert known == {"line-1": [" two", " eight"], "line-2": [" four", " six"]}
    assert len(task.prompts) == 3
    assert task.undrawable == 1
    why = "'line-2', ' fi?ve': the token '?' may not be drawn (task.illegal, or a special token)"
    assert task.why_undrawable == why
    short = problem("continuation", prompts=str(path), illegal=[], max_tokens=4)
    assert (short.undrawable, short.why_undrawable.partition(": ")[2]) == (
        3, "6 tokens are not between task.min_tokens=1 and task.max_tokens=4"
    )  # fmt: skip
    asks = problem("constrained", prompts=str(path), keywords=["six"], guided=True)
    assert [decode(TOKENIZER, known.tokens_T.tolist()) for known in asks.demonstrations["line-2"]] == [" six"]
    assert (set(asks.demonstrations), asks.undrawable, asks.why_undrawable) == ({"line-2"}, 4, why)
    stops = problem("continuation", prompts=str(path), illegal=["?", "."], stop="w")
    assert stops.why_undrawable == "'line-1', ' two.': the token 'w' is task.stop, which ends a sample"
    asks = problem("constrained", prompts=str(path), keywords=["six"], guided=True, illegal=[], stop="z")
    assert asks.why_undrawable.endswith("it is without what task.guided=true puts into every sample")
    path.write_text('{"prompt": "one", "completion": ["two"]}')
    with pytest.raises(ConfigError, match=r'line 1: "completion" is a text, and "completions" a list of texts'):
        problem("continuation", prompts=str(path))
