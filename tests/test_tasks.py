"""What tasks share: contexts and stops, what may be drawn, conversations, files of prompts, and the judge that each brings."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from deploy.prepare import prepare
from system import tasks
from system.config import ConfigError
from system.config_file import parse
from system.evaluation import means
from system.task_config import Continuation, Task
from system.tasks.continuation import read_prompts, variety
from system.tasks.infilling import overlap
from system.tasks.problem import Problem, context_tokens, single_token
from system.tasks.verifiable import correctness
from system.trajectory import Prompt, sampled
from tests import tiny
from tests.problems import TOKENIZER, problem, text_of


def test_every_kind_of_task_has_a_builder() -> None:
    sections = get_args(get_args(Task)[0])
    assert {section.model_fields["kind"].default for section in sections} == tasks.BUILDERS.keys()


def test_the_longest_prompt_counts_evidence_and_its_stop() -> None:
    support = problem("random_number").constraints
    prompts = (Prompt("a", (1,) * 5, (1,) * 2, evidence_tokens=(1,) * 4), Prompt("b", (1,) * 3, (1,) * 3))
    assert Problem(prompts, support, reward_stop=(2, 2)).longest_prompt == 8  # 2 + the stop + Y
    assert Problem(prompts, support, reward_stop=()).longest_prompt == 6
    assert Problem((Prompt("c", (1,) * 9, (1,)),), support, reward_stop=(2,)).longest_prompt == 9


def test_what_actors_are_sent_of_a_problem_has_no_prompts() -> None:
    support = problem("random_number").constraints
    prompts = tuple(Prompt(f"line-{at}", (at,) * 500, (1,) * 500, evidence_tokens=(at,) * 500) for at in range(1, 300))
    demonstrations = {prompt.id: (sampled(prompt.policy_tokens, max_tokens=500),) for prompt in prompts}
    whole = Problem(prompts, support, (2,), demonstrations=demonstrations, alternatives={"line-7": ((8,),)})
    assert len(pickle.dumps(whole.outline)) < len(pickle.dumps(support)) + 20_000
    assert whole.outline.evidences == {"line-7": ((7,) * 500, (8,))}
    assert (whole.outline.longest_prompt, whole.outline.canary) == (1001, (1,) * 1000)


@pytest.mark.parametrize("closes", [False, True])
def test_a_context_ends_in_no_end_of_sequence_but_one_that_is_in_the_text(closes: bool) -> None:
    class Tokenizer:
        """Letters and `|`, its end of sequence, which may be put behind a text too."""

        eos_token_id, bos_token = 2, None

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [2 if letter == "|" else ord(letter) for letter in text + "|" * (closes and add_special_tokens)]

    tokenizer: Any = Tokenizer()
    assert context_tokens(tokenizer, "a|b") == (97, 2, 98)
    assert context_tokens(tokenizer, "ab|") == (97, 98, 2)
    assert closes or context_tokens(tokenizer, "|") == (2,)
    with pytest.raises(ConfigError, match="prompt '' is no token for this tokenizer"):
        context_tokens(tokenizer, "")


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

        def decode(self, tokens: list[int]) -> str:
            return f"<{tokens[0]}>"

    assert [single_token(Spaced(), text, "task.stop") for text in (".", "\n")] == [2, 3]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"task\.stop='\.\.' is 2 tokens for this tokenizer, \['<2>', '<2>'\]: it must be"):
        single_token(Spaced(), "..", "task.stop")  # type: ignore[arg-type]


def test_a_stop_of_several_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.stop='\.\.' is 2 tokens for this tokenizer, \['\.', '\.'\]: it must be"):
        problem("random_number", stop="..")
    with pytest.raises(ConfigError, match=r"task\.stop='ab' is 2 tokens"):
        problem("continuation", stop="ab")


def test_tokens_that_are_marked_as_special_cannot_be_drawn(smollm2: PreTrainedTokenizerBase) -> None:
    marked = {token for token, added in smollm2.added_tokens_decoder.items() if added.special}
    assert marked > set(smollm2.all_special_ids)
    for kind, fields in (("verifiable", {}), ("subjectivity", {}), ("random_number", {"support": "vocabulary", "longest": 4})):
        own = {"reward": {"kind": "lm_posterior"}} if kind == "random_number" else {}
        support = problem(kind, smollm2, **fields, **own).constraints
        assert not marked - {support.stop_token} & set(support.columns.tolist()), kind


@pytest.mark.parametrize("kind", ["continuation", "infilling", "constrained", "subjectivity"])
def test_an_illegal_list_that_leaves_nothing_is_refused(kind: str) -> None:
    fields: dict[str, Any] = {"pattern": "a"} if kind == "constrained" else {}
    with pytest.raises(ConfigError, match=r"task\.illegal=\[''\] leaves no token"):
        problem(kind, illegal=[""], **fields)


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


def test_records_may_be_one_list_and_lines_under_another_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text('[\n  {"prompt": "ab"},\n\n  {"prompt": "cd"}\n]')
    for path in (str(tmp_path / "prompts.json"), written(tmp_path / "p.ndjson", {"prompt": "ab"}, {"prompt": "cd"})):
        assert [text_of(prompt) for prompt in problem("continuation", prompts=path).prompts] == ["ab", "cd"]
    (tmp_path / "prompts.json").write_text('[\n\n\n  {"prompt" "ab"}\n]')
    with pytest.raises(ConfigError, match=r"no JSON \(Expecting ':' delimiter, line 4\)$"):
        problem("continuation", prompts=str(tmp_path / "prompts.json"))
    lines = written(tmp_path / "lines.json", {"question": "a", "answer": 1}, {"question": "b", "answer": 1})
    with pytest.raises(ConfigError, match=r"no JSON \(Extra data, line 2\); a file with a record in each line is called"):
        problem("verifiable", questions=lines)


def test_a_table_of_prompts_is_refused_and_a_text_that_is_called_jsonl_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.prompts='a\.csv' is a table.*make it a text with one prompt a line"):
        problem("continuation", prompts="a.csv")
    (tmp_path / "a.jsonl").write_text("one\n")
    with pytest.raises(ConfigError, match=r"line 1: no JSON \(Expecting value\); write one record a line; .* is called \.txt"):
        problem("continuation", prompts=str(tmp_path / "a.jsonl"))


def test_a_role_that_chat_templates_do_not_know_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "prompts.jsonl"
    said = [{"messages": [{"role": role, "content": "Hi"}]} for role in ("user", "human")]
    assert len(read_prompts(Continuation(prompts=written(path, *said)))) == 2
    [warning] = caplog.messages
    assert "prompts.jsonl', line 2: the role 'human' is none of system, user, assistant, tool" in warning


def test_messages_are_written_by_the_models_chat_template(tmp_path: Path, smollm2: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who are you?"}]
    expected = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    path = written(tmp_path / "prompts.jsonl", {"prompt": None, "messages": messages})
    [prompt] = problem("continuation", smollm2, prompts=path, stop="<|im_end|>").prompts
    assert smollm2.decode(list(prompt.policy_tokens)) == expected == prompt.meta["text"]
    assert prompt.meta["messages"] == messages
    begun = written(tmp_path / "begun.jsonl", {"messages": [*messages, {"role": "assistant", "content": "I am"}]})
    [prompt] = problem("continuation", smollm2, prompts=begun, stop="<|im_end|>").prompts
    assert prompt.meta["text"] == expected + "I am", "a last message of the assistant's is gone on from"
    [asked] = problem("verifiable", smollm2, chat=True, prompt="{question} Be short.", limit=1, stop="<|im_end|>").prompts
    assert str(smollm2.decode(list(asked.policy_tokens))).endswith(
        "<|im_start|>user\nWhat is 0 + 0? Be short.<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ConfigError, match=r"line 1: the model's chat template does not take it: "):
        problem("continuation", TOKENIZER, prompts=path)


# --------------------------------------------------------------------------------------------------------------- files


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


# ------------------------------------------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(("kind", "judge"), [("continuation", variety), ("infilling", overlap), ("verifiable", correctness)])
def test_each_task_brings_its_judge(kind: str, judge: Any, smollm2: PreTrainedTokenizerBase) -> None:
    assert problem(kind, smollm2).judge is judge


def test_a_verdict_that_some_prompts_lack_is_the_mean_over_the_others() -> None:
    rows = [{"prompt": "a", "length": 3.0}, {"task/bleu_4": 0.5, "task/x": np.nan}, {"task/bleu_4": 0.1, "task/x": np.nan}]
    assert means(rows) == {"task/bleu_4": pytest.approx(0.3)}
