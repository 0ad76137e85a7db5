"""The tasks: prompts, support and target, with a tokenizer of one character a token and with the packaged model's."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from deploy.prepare import prepare
from system import demonstrations, tasks
from system.config import ConfigError
from system.config_file import parse
from system.evaluation import means
from system.function_process import FunctionFault
from system.language_model import load_tokenizer
from system.models import locate
from system.task_config import Continuation
from system.tasks.constrained import log_constraint, validity
from system.tasks.continuation import read_prompts, variety
from system.tasks.infilling import overlap
from system.tasks.problem import Problem, context_tokens, single_token
from system.tasks.random_number import log_reward, paper_log_reward
from system.tasks.verifiable import correctness, last_number
from system.text import decode
from system.trajectory import Prompt, Trajectory, sampled
from tests import tiny

TOKENIZER = tiny.tokenizer(64)


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    return load_tokenizer(locate(parse({"task": {"kind": "random_number"}}).model))


def problem(kind: str, tokenizer: PreTrainedTokenizerBase = TOKENIZER, **fields: Any) -> Problem:
    return tasks.build(parse({"task": {"kind": kind, **fields}}).task, tokenizer)


def text_of(prompt: Prompt) -> str:
    """What the policy sees, without the beginning-of-sequence token."""
    return decode(TOKENIZER, prompt.policy_tokens[1:])


def continuation(text: str, folder: Path, **fields: Any) -> Problem:
    (folder / "prompts.txt").write_text(text, encoding="utf-8")
    return problem("continuation", prompts=str(folder / "prompts.txt"), **fields)


# --------------------------------------------------------------------------------------------------- random_number


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("0", True), ("7", True), ("42", True), ("99", True), ("100", True),
        ("101", False), ("999", False), ("", False), ("00", False), ("007", False), ("042", False), ("0100", False),
        ("-1", False), ("+1", False), ("1.0", False), (" 1", False), ("1 ", False), ("1\n", False), ("1_0", False),
        ("x", False), ("1x", False), ("١٢", False), ("\uff14\uff12", False), ("²", False), ("½", False), ("9" * 30, False),
    ],
)  # fmt: skip
def test_a_number_of_the_interval_as_it_is_written_has_log_reward_0(text: str, valid: bool) -> None:
    prompt = Prompt("x", (1,), (1,), meta={"low": 0, "high": 100, "floor": -12.0})
    assert log_reward(prompt, text, []) == (0.0 if valid else -12.0)


def test_the_ends_of_the_interval_belong_to_it() -> None:
    prompt = Prompt("x", (1,), (1,), meta={"low": 5, "high": 12, "floor": -9.0})
    rewarded = [number for number in range(20) if log_reward(prompt, str(number), []) == 0.0]
    assert rewarded == list(range(5, 13))


@pytest.mark.parametrize("tokenizer", ["tiny", "smollm2"])
def test_the_listed_outcomes_are_what_the_reward_rewards(tokenizer: str, smollm2: PreTrainedTokenizerBase) -> None:
    """All strings of the support are few enough to try: those with log R = 0 are the outcomes, each once."""
    chosen = smollm2 if tokenizer == "smollm2" else TOKENIZER
    task = problem("random_number", chosen, low=3, high=25)
    [prompt], support = task.prompts, task.constraints
    digits = [token for token in support.columns.tolist() if token != support.stop_token]
    strings = [[]] + [[a] for a in digits] + [[a, b] for a in digits for b in digits]
    rewarded = {tuple(tokens) for tokens in strings if log_reward(prompt, str(chosen.decode(tokens)), tokens) == 0.0}
    assert task.outcomes is not None
    assert task.log_target_O is not None
    assert len(digits) == 10
    assert (support.min_tokens, support.max_tokens) == (0, 2)
    assert rewarded == {tuple(outcome.tokens_T.tolist()) for outcome in task.outcomes}
    assert len(task.outcomes) == len(rewarded) == 23
    assert np.exp(task.log_target_O) == pytest.approx(np.full(23, 1 / 23))
    assert chosen.decode([support.stop_token]) == "."


def test_a_number_that_is_several_tokens_or_one_is_an_outcome_in_each_of_its_ways(tmp_path: Path) -> None:
    """As in the vocabularies of GPT-2 and GPT-J: all strings over digits are tried, and those that are rewarded are listed."""
    chosen = tiny.tokenizer()
    pairs = [f"{a}{b}" for a in "12" for b in "0123456789"]
    chosen.add_tokens(pairs)
    own = {"kind": "function", "path": "system.tasks.random_number:log_reward", "every_prefix": True}
    task = problem("random_number", chosen, low=8, high=13, support="vocabulary", longest=2, reward=own, floor=-40)
    written = [token for token in task.constraints.columns.tolist() if decode(chosen, [token]).isdecimal()]
    assert len(written) == 30
    strings = [[a] for a in written] + [[a, b] for a in written for b in written]
    rewarded = {tuple(tokens) for tokens in strings if log_reward(task.prompts[0], decode(chosen, tokens), tokens) == 0.0}
    assert task.outcomes is not None
    assert rewarded == {tuple(outcome.tokens_T.tolist()) for outcome in task.outcomes}
    assert len(task.outcomes) == 2 + 4 * 2


def test_tokens_that_are_marked_as_special_cannot_be_drawn(smollm2: PreTrainedTokenizerBase) -> None:
    marked = {token for token, added in smollm2.added_tokens_decoder.items() if added.special}
    assert marked > set(smollm2.all_special_ids)
    for kind, fields in (("verifiable", {}), ("subjectivity", {}), ("random_number", {"support": "vocabulary", "longest": 4})):
        own = {"reward": {"kind": "lm_posterior"}} if kind == "random_number" else {}
        support = problem(kind, smollm2, **fields, **own).constraints
        assert not marked - {support.stop_token} & set(support.columns.tolist()), kind


def test_the_interval_stands_in_the_prompt() -> None:
    [prompt] = problem("random_number", low=3, high=25, prompt="from {low} to {high}: ").prompts
    assert text_of(prompt) == "from 3 to 25: "
    assert prompt.policy_tokens[0] == TOKENIZER.bos_token_id
    assert prompt.reward_tokens == prompt.policy_tokens
    assert prompt.meta == {"low": 3, "high": 25, "floor": -12.0}


def test_another_reward_has_another_target_so_nothing_is_listed() -> None:
    """Listed outcomes are compared with the uniform distribution, which only the task's own reward makes the target."""
    other = problem("random_number", reward={"kind": "lm_posterior"})
    assert (other.outcomes, other.log_target_O) == (None, None)
    assert other.reward_stop == (other.constraints.stop_token,)
    own = {"kind": "function", "path": "system.tasks.random_number:log_reward", "every_prefix": True}
    assert problem("random_number", reward=own).outcomes is not None


def test_over_the_whole_vocabulary_numbers_are_listed_and_everything_else_costs_by_its_length() -> None:
    own = {"kind": "function", "path": "system.tasks.random_number:paper_log_reward", "every_prefix": True}
    task = problem("random_number", support="vocabulary", longest=5, reward=own)
    [prompt], columns = task.prompts, set(task.constraints.columns.tolist())
    assert len(columns) > 11
    assert not columns & set(TOKENIZER.all_special_ids)
    assert task.constraints.max_tokens == 5
    assert task.outcomes is not None
    assert len(task.outcomes) == 101
    assert [paper_log_reward(prompt, text, [1] * len(text)) for text in ("", "7", "100", "101", "x")] == [-8, 8, 8, -24, -8]


@pytest.mark.parametrize(
    ("fields", "fix"),
    [({"longest": 6}, -19), ({"support": "vocabulary"}, None), ({"low": 900, "high": 1000}, -14), ({"reward.beta": 2}, -24)],
)
def test_a_floor_under_which_uniform_is_not_the_posterior_is_refused(fields: dict[str, Any], fix: int | None) -> None:
    """With the floor that the message names, everything but the numbers has next to no mass."""
    beta = fields.pop("reward.beta", 1)
    own = {"kind": "function", "path": "system.tasks.random_number:log_reward", "every_prefix": True, "beta": beta}
    with pytest.raises(ConfigError, match=r"task\.floor=-12: .*task\.support=.*task\.longest.*lower task\.floor") as caught:
        problem("random_number", reward=own, **fields)
    lower = int(str(caught.value).rpartition(" ")[2])
    assert fix in (None, lower)
    task = problem("random_number", reward=own, floor=lower, **fields)
    tokens, longest = len(task.constraints.columns) - 1, task.constraints.max_tokens
    assert task.outcomes is not None
    others = sum(tokens**length for length in range(longest + 1)) - len(task.outcomes)
    assert others * np.exp(lower / beta) < 1e-4 * len(task.outcomes) < others * np.exp((lower + 2) / beta)


def test_draws_too_short_for_the_largest_number_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"longest=2 is too short for high=100; raise longest to 3"):
        problem("random_number", longest=2)


def test_a_stop_of_several_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.stop='\.\.' is 2 tokens for this tokenizer, but must be exactly one"):
        problem("random_number", stop="..")
    with pytest.raises(ConfigError, match=r"task\.stop='ab' is 2 tokens"):
        problem("continuation", stop="ab")


# ---------------------------------------------------------------------------------------------------- continuation


def test_prompts_are_the_lines_of_a_file_each_once(tmp_path: Path) -> None:
    task = continuation("one line \n\n  \ntwo.\none line\nthree\n", tmp_path)
    assert [prompt.id for prompt in task.prompts] == ["line-1", "line-4", "line-6"]
    assert [text_of(prompt) for prompt in task.prompts] == ["one line", "two.", "three"]
    assert all(prompt.reward_tokens == prompt.policy_tokens and prompt.evidence_tokens is None for prompt in task.prompts)


@pytest.mark.parametrize(
    ("kind", "field", "line", "prompt"),
    [
        ("continuation", "prompts", "TEXT", "line-2"),
        ("infilling", "stories", '{"before": "TEXT", "after": "b"}', "line-2"),
        ("verifiable", "questions", '{"question": "TEXT", "answer": 3}', "question-2"),
        ("subjectivity", "records", '{"text": "TEXT", "label": "objective"}', "line-2"),
    ],
)
def test_a_line_that_is_too_long_for_the_model_is_named_with_its_file(
    tmp_path: Path, kind: str, field: str, line: str, prompt: str
) -> None:
    path = tmp_path / ("given.txt" if kind == "continuation" else "given.jsonl")
    path.write_text("\n".join(line.replace("TEXT", text) for text in ("a", "b" * 500, "c")), encoding="utf-8")
    templates = dict.fromkeys(("prompt", "label_prompt"), "{text}") if kind == "subjectivity" else {}
    task = {"kind": kind, field: str(path), "max_tokens": 7, **templates}
    with pytest.raises(ConfigError) as caught:
        prepare(parse({"task": task, "model": {"path": str(tiny.folder(tmp_path))}}))
    for piece in (f"task.{field}={str(path)!r}", f"prompt '{prompt}'", "longest of 1", "context of 128", "or the prompts"):
        assert piece in str(caught.value)


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
    def log_reward(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Future[list[np.ndarray]]:
        future: Future[list[np.ndarray]] = Future()
        future.set_result([np.zeros(len(trajectory) + 1) for trajectory in trajectories_K])
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


@pytest.mark.parametrize("kind", ["continuation", "infilling", "constrained", "subjectivity"])
def test_an_illegal_list_that_leaves_nothing_is_refused(kind: str) -> None:
    fields: dict[str, Any] = {"pattern": "a"} if kind == "constrained" else {}
    with pytest.raises(ConfigError, match=r"task\.illegal=\[''\] leaves no token"):
        problem(kind, illegal=[""], **fields)


# --------------------------------------------------------------------------------------------- what tasks share


def test_the_longest_prompt_counts_evidence_and_its_stop() -> None:
    support = problem("random_number").constraints
    prompts = (Prompt("a", (1,) * 5, (1,) * 2, evidence_tokens=(1,) * 4), Prompt("b", (1,) * 3, (1,) * 3))
    assert Problem(prompts, support, reward_stop=(2, 2)).longest_prompt == 8  # 2 + the stop + Y
    assert Problem(prompts, support, reward_stop=()).longest_prompt == 6
    assert Problem((Prompt("c", (1,) * 9, (1,)),), support, reward_stop=(2,)).longest_prompt == 9


def test_a_context_ends_in_no_end_of_sequence() -> None:
    class Closing:
        eos_token_id, bos_token = 2, None

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            assert add_special_tokens
            return [1, 5, 2, 6, 2]

    assert context_tokens(Closing(), "a b") == (1, 5, 2, 6)  # type: ignore[arg-type]


def test_a_context_begins_with_the_tokenizers_own_token_once() -> None:
    begun = context_tokens(TOKENIZER, "a")
    assert begun[0] == TOKENIZER.bos_token_id
    assert begun == context_tokens(TOKENIZER, f"{TOKENIZER.bos_token}a")


def test_a_stop_is_the_token_that_it_is_inside_a_text() -> None:
    """As for a SentencePiece model of Llama's: at the start of a text a full stop has a space of its own in front."""
    inner = {"a": 1, ".": 2, "\n": 3, "?": 4}

    class Spaced:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            first = {"a": [11], ".": [12], "\n": [13, 3], "?": [13, 4, 4]}[text[0]]
            return first + [inner[letter] for letter in text[1:]]

    assert [single_token(Spaced(), text, "task.stop") for text in (".", "\n")] == [2, 3]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"task\.stop='\.\.' is 2 tokens for this tokenizer, but must be exactly one"):
        single_token(Spaced(), "..", "task.stop")  # type: ignore[arg-type]


def written(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_a_prompt_of_a_jsonl_file_is_taken_as_it_is_and_a_reward_finds_what_else_its_line_has(tmp_path: Path) -> None:
    records = [{"prompt": "ab\n ", "reference": "cd", "tests": [1, 2]}, {"prompt": "ab"}, {"prompt": "ab"}]
    prompts = problem("continuation", prompts=written(tmp_path / "prompts.jsonl", *records)).prompts
    assert [text_of(prompt) for prompt in prompts] == ["ab\n ", "ab"]
    assert prompts[0].meta == records[0] | {"text": "ab\n "}
    asked = {"question": "ab?", "answer": 3, "unit": "cm"}
    [question] = problem("verifiable", questions=written(tmp_path / "questions.jsonl", asked)).prompts
    assert question.meta == {"question": "ab?", "answer": "3", "unit": "cm"}


def test_messages_are_written_by_the_models_chat_template(tmp_path: Path, smollm2: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who are you?"}]
    expected = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    path = written(tmp_path / "prompts.jsonl", {"prompt": None, "messages": messages})
    [prompt] = problem("continuation", smollm2, prompts=path, stop="<|im_end|>").prompts
    assert smollm2.decode(list(prompt.policy_tokens)) == expected == prompt.meta["text"]
    assert prompt.meta["messages"] == messages
    [asked] = problem("verifiable", smollm2, chat=True, prompt="{question} Be short.", limit=1, stop="<|im_end|>").prompts
    assert str(smollm2.decode(list(asked.policy_tokens))).endswith(
        "<|im_start|>user\nWhat is 0 + 0? Be short.<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ConfigError, match=r"line 1: the model's chat template does not take it: "):
        problem("continuation", TOKENIZER, prompts=path)


def test_a_sampled_trajectory_is_of_actions_alone() -> None:
    trajectory = sampled([3, 4])
    assert trajectory.tokens_T.tolist() == [3, 4]
    assert trajectory.is_action_T.all()
    assert len(sampled([])) == 0


def test_a_sampled_trajectory_of_the_most_actions_ends_as_a_draw_does() -> None:
    """The tool's tokens do not count; without a number nothing is known to be the most."""
    tool = np.array([True, False])
    stops = [sampled(tokens, max_tokens=2).stop for tokens in ([3], [3, 4])]
    assert stops == ["sampled", "forced"]
    assert sampled([3, 4], tool, max_tokens=2).stop == "sampled"
    assert sampled([3, 4, 5], np.append(tool, True), max_tokens=2).stop == "forced"
    assert sampled([3, 4]).stop == "sampled"


@pytest.mark.parametrize(("longest", "stop"), [(4, "sampled"), (3, "forced")])
def test_a_demonstration_as_long_as_may_be_has_a_forced_stop(tmp_path: Path, longest: int, stop: str) -> None:
    task = infilling('{"before": "one.", "after": "two.", "middle": "ab."}', tmp_path, max_tokens=longest)  # " ab"
    [demonstration] = task.demonstrations["line-1"]
    assert demonstration.stop == stop


def test_a_demonstration_that_is_too_long_to_draw_is_left_out_and_counted(tmp_path: Path) -> None:
    task = infilling('{"before": "one.", "after": "two.", "middle": "ab."}', tmp_path, max_tokens=2)
    assert (task.demonstrations, task.undrawable) == ({}, 1)


# ------------------------------------------------------------------------------------------------------ infilling

FIVE = '{"id": "a", "sentences": ["one. ", "two.", " three.", "four.", "five."]}'
TWO = '{"before": "one.", "after": "three.", "middle": "two."}'


def infilling(text: str, folder: Path, **fields: Any) -> Problem:
    (folder / "stories.jsonl").write_text(text, encoding="utf-8")
    return problem("infilling", stories=str(folder / "stories.jsonl"), **fields)


def test_the_policy_sees_both_sides_and_the_reward_scores_the_ending_as_evidence(tmp_path: Path) -> None:
    template = "b {before} e {after} m"
    given = infilling(f"{FIVE}\n\n{TWO}\n", tmp_path, prompt=template)
    five, two = given.prompts
    assert text_of(five) == "b one. two. three. e five. m"
    assert decode(TOKENIZER, five.reward_tokens[1:]) == "one. two. three."
    assert decode(TOKENIZER, five.evidence_tokens or ()) == " five."
    assert five.meta["middle"] == "four."
    assert (two.id, text_of(two)) == ("line-3", "b one. e three. m")
    assert given.reward_stop == (given.constraints.stop_token,)
    # The evidence opens a sentence, so it begins with a space and without a beginning-of-sequence token.
    assert five.evidence_tokens is not None
    assert five.evidence_tokens[0] == TOKENIZER.encode(" ", add_special_tokens=False)[0]


def test_the_gap_may_be_another_sentence(tmp_path: Path) -> None:
    (story,) = infilling(FIVE, tmp_path, gap=1, prompt="{before}|{after}".replace("|", "-")).prompts
    assert text_of(story) == "one.-three. four. five."
    assert story.meta["middle"] == "two."
    [unknown] = infilling('{"before": "one.", "after": "three.", "middle": null}', tmp_path).prompts
    assert unknown.meta["middle"] == ""


def test_tokens_that_a_model_drew_are_taken_as_they_are(tmp_path: Path) -> None:
    after, middle = TOKENIZER.encode("  xy", add_special_tokens=False), TOKENIZER.encode("ab", add_special_tokens=False)
    story = {"before": "one.", "after": "xy", "middle": "ab.", "tokens": {"middle": middle, "after": after}}
    task = infilling(json.dumps(story), tmp_path)
    (prompt,) = task.prompts
    assert list(prompt.evidence_tokens or ()) == after
    [demonstration] = task.demonstrations[prompt.id]
    assert demonstration.tokens_T.tolist() == middle
    with pytest.raises(ConfigError, match="are not its text"):
        infilling(json.dumps(story | {"after": "yx"}), tmp_path)


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("{", {}, "line 1: no JSON"),
        ("[1]", {}, "line 1: needs"),
        (f'{TWO}\n{{"before": "x"}}', {}, "line 2: needs"),
        ('{"before": " ", "after": "y"}', {}, "line 1: needs"),
        ('{"sentences": ["a", "", "c", "d", "e"]}', {}, "line 1: needs"),
        (FIVE, {"gap": 4}, "line 1: task.gap=4 needs sentences before and after it, but there are 5"),
        (f"{FIVE}\n{FIVE}", {}, "two stories have the same id"),
        (FIVE, {"offset": 1}, "none of them after task.offset=1"),
    ],
)
def test_lines_that_are_no_stories_are_refused(tmp_path: Path, text: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        infilling(text, tmp_path, **fields)
    with pytest.raises(ConfigError, match="cannot be read"):
        problem("infilling", stories=str(tmp_path / "none"))


def test_the_packaged_stories_are_whole_and_fit_the_packaged_model(smollm2: PreTrainedTokenizerBase) -> None:
    given = problem("infilling", smollm2)
    assert len(given.prompts) >= 10
    assert all(prompt.meta["middle"] for prompt in given.prompts)
    assert all(5 < len(prompt.evidence_tokens or ()) < 40 for prompt in given.prompts)
    # What was written could have been drawn.
    for prompt in given.prompts:
        tokens = smollm2.encode(" " + prompt.meta["middle"].removesuffix("."), add_special_tokens=False)
        given.constraints.column_of(np.array(tokens))


# ----------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; name a file with one entry a line"),
        (b" \r\n\t\n", "is empty"),
        ("caf\xe9\n".encode("latin-1"), "is not UTF-8 (byte 3); convert it"),
        ("\ufeffhi".encode("utf-16"), "is not UTF-8 (byte 0); convert it"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "field"), [("continuation", "prompts"), ("verifiable", "questions"), ("infilling", "stories")]
)
def test_a_file_without_anything_to_read_is_refused_by_name(
    tmp_path: Path, kind: str, field: str, content: bytes, message: str
) -> None:
    path = tmp_path / "given.txt"
    path.write_bytes(content)
    fields: dict[str, Any] = {field: str(path)}
    with pytest.raises(ConfigError) as caught:
        problem(kind, **fields)
    assert str(caught.value).startswith(f"task.{field}={str(path)!r} ")
    assert message in str(caught.value)


def test_repetitions_are_left_out_and_counted_and_numbers_are_those_of_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "given.txt"
    path.write_bytes("one\r\n\r\ntwo\n one \nx\u2028y\x0bz\ntwo\n".encode())
    given = problem("continuation", prompts=str(path))
    assert [prompt.id for prompt in given.prompts] == ["line-1", "line-3", "line-5"]
    assert given.prompts[2].meta["text"] == "x\u2028y\x0bz"
    assert "2 entries are left out that repeat an earlier one; the first is 4, which repeats 1" in caplog.text
    caplog.clear()
    question = {"question": "a\u2028b", "answer": 1}
    lines = [json.dumps(question, ensure_ascii=False), json.dumps(question | {"answer": 2}), json.dumps(question)]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert [prompt.id for prompt in problem("verifiable", questions=str(path)).prompts] == ["question-1", "question-2"]
    assert "1 entries are left out that repeat an earlier one; the first is 3, which repeats 1" in caplog.text


# ----------------------------------------------------------------------------------------------------- constrained


@pytest.mark.parametrize(
    ("asked", "text", "satisfied"),
    [
        ({"keywords": ["sea", "Sun"]}, "The SUN sank into the sea", True),
        ({"keywords": ["sea", "sun"]}, "the sea", False),
        ({"keywords": ["sea"]}, "a season by the seaside", False),
        ({"keywords": ["c++"]}, "we wrote c++ there", True),
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
        ({"predicate": "tests.faulty:none"}, "task.predicate='tests.faulty:none' cannot be imported"),
    ],
)
def test_a_constraint_that_cannot_be_met_or_read_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        problem("constrained", **fields)


def test_keywords_are_in_the_support_unless_they_cannot_be_drawn_or_are_not_to_be() -> None:
    required = problem("constrained", limit=1, keywords=["sea", "at"], guided=True).constraints.required
    assert required is not None and required.words == ("sea", "at")
    assert [decode(TOKENIZER, tokens) for tokens in required.written] == [" sea", " at"]
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


# ------------------------------------------------------------------------------------------------------ verifiable


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
    given = problem("verifiable", questions=str(tmp_path / "q.jsonl"), offset=1)
    assert [(p.id, p.meta["answer"]) for p in given.prompts] == [("question-2", "y")]


def test_every_kind_of_task_has_a_builder() -> None:
    for kind in ("random_number", "continuation"):
        assert kind in tasks.BUILDERS
        assert problem(kind).prompts


# ---------------------------------------------------------------------------------------------------------- verdicts


def asked(**meta: Any) -> Prompt:
    return Prompt("p", (1,), (1,), meta=meta)


def judged(judge: Any, prompt: Prompt, texts: list[str]) -> dict[str, float]:
    """By a judge that reads texts alone."""
    return judge(prompt, texts, [[]] * len(texts))


def test_an_infilled_sentence_is_compared_with_the_storys_own_without_its_stop() -> None:
    prompt = asked(middle="The cat sat on the mat.", stop=".")
    same, near, far = (
        judged(overlap, prompt, [text]) for text in (" The cat sat on the mat", " The dog sat on the mat", " No")
    )
    assert same == {"bleu_4": pytest.approx(1.0), "gleu_4": pytest.approx(1.0)}
    # 5/6, 3/5, 2/4 and 1/3 of the n-grams are right; GLEU counts them together.
    assert near["bleu_4"] == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert near["gleu_4"] == pytest.approx(11 / 18)
    assert far["bleu_4"] < 0.01
    assert far["gleu_4"] == 0.0
    both = judged(overlap, prompt, [" The cat sat on the mat", ""])
    assert both["gleu_4"] == pytest.approx(0.5)


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
    assert validity(prompt, texts, tokens_K) == {"validity": 0.5, "distinct": 0.75}


def test_a_story_without_its_own_sentence_has_no_overlap() -> None:
    assert judged(overlap, asked(middle="", stop="."), ["a", "b"]) == {}


def test_continuations_are_judged_by_the_share_of_distinct_ones() -> None:
    assert judged(variety, asked(), ["a", "b", "a", "a"]) == {"distinct": 0.5}


def test_constrained_texts_are_judged_by_whether_they_satisfy() -> None:
    constraint = {"keywords": ["cat"], "pattern": None, "predicate": None, "floor": -20.0, "seconds": 1.0}
    result = judged(validity, asked(constraint=constraint), ["a cat", "a catalogue", "a dog", "Cat!"])
    assert result == {"validity": 0.5, "distinct": 1.0}


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


def test_an_answer_that_is_no_number_gets_no_verdict() -> None:
    assert judged(correctness, asked(answer="Paris"), ["Paris"]) == {}


@pytest.mark.parametrize(("kind", "judge"), [("continuation", variety), ("infilling", overlap), ("verifiable", correctness)])
def test_each_task_brings_its_judge(kind: str, judge: Any, smollm2: PreTrainedTokenizerBase) -> None:
    assert problem(kind, smollm2).judge is judge


def test_a_verdict_that_some_prompts_lack_is_the_mean_over_the_others() -> None:
    rows = [{"prompt": "a", "length": 3.0}, {"task/bleu_4": 0.5, "task/x": np.nan}, {"task/bleu_4": 0.1, "task/x": np.nan}]
    assert means(rows) == {"task/bleu_4": pytest.approx(0.3)}
