"""The next sentence, sampled from the tempered posterior p(Z stop | X)^(1/T) (Hu et al. 2024, section 4.1).

Sampling each token at a low temperature does not sample whole sentences at a low temperature: the posterior weighs a
token by all that can follow it. Mind that the tempered likelihood of whole sequences prefers short sentences: that is
the target's doing, and `task.min_tokens` is the way to ask for longer ones.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from system.config import ConfigError
from system.task_config import NextSentence
from system.tasks.files import choose, distinct, joined, read_lines, read_records
from system.tasks.problem import (
    Problem,
    chat_context,
    completions,
    context_tokens,
    demonstrated,
    single_token,
    support,
)
from system.text import special_tokens
from system.trajectory import Prompt

logger = logging.getLogger(__name__)

JSON = (".jsonl", ".ndjson", ".json")
"""How the names of files end that hold records, and not a prompt in each line."""
TABLES = (".csv", ".tsv", ".parquet", ".xlsx")
ROLES = ("system", "user", "assistant", "tool")
"""Those that chat templates have words for."""
PACKAGED_PROMPTS = Path(__file__).with_name("prompts.txt")


def build(section: NextSentence, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """Raises ConfigError if the prompts cannot be read, the stop is not one token, or there is nothing else to draw."""
    stop = single_token(tokenizer, section.stop, "task.stop")
    constraints = support(section, tokenizer, stop, legal_tokens(tokenizer, section.illegal))
    prompts, known = [], {}
    for number, record in read_prompts(section):
        where = f"task.prompts={section.prompts!r}, line {number}"
        if "prompt" in record:
            text = record["prompt"]
            context = context_tokens(tokenizer, text)
        else:
            text, context = chat_context(tokenizer, record["messages"], where)
        prompts.append(Prompt(f"line-{number}", context, context, meta=record | {"text": text}))
        known[f"line-{number}"] = completions(record, tokenizer, section.stop, where)
    return Problem(
        prompts=tuple(prompts),
        constraints=constraints,
        reward_stop=(stop,),
        judge=variety,
        **demonstrated(known, constraints, tokenizer),
    )


def variety(prompt: Prompt, texts: Sequence[str], tokens_K: Sequence[Sequence[int]], unscored: int) -> dict[str, float]:
    """Share of distinct texts."""
    return {"distinct": len(set(texts)) / len(texts)} if texts else {}


def read_prompts(section: NextSentence) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, record) of the prompts chosen by offset and limit; empty lines and repetitions are left out. A line
    of a text file is the record {"prompt": line}, without the spaces around it.

    Raises:
        ConfigError: the file is missing, not UTF-8, or has no prompt in that range, a line of a .jsonl file is no prompt, or a
            text file has records of JSON.
    """
    path = PACKAGED_PROMPTS if section.prompts == "packaged" else Path(section.prompts)
    if path.suffix in JSON:
        records = _records(path)
    elif path.suffix in TABLES:
        raise ConfigError(
            f"task.prompts={section.prompts!r} is a table, whose lines would be the prompts as they stand there; make it a "
            'text with one prompt a line, or a .jsonl file with {"prompt": text} in each'
        )
    else:
        lines = read_lines(path, "task.prompts")
        if _is_record(lines[0][1]):
            raise ConfigError(
                f"task.prompts={section.prompts!r} begins with a record in JSON, which would be the prompt as it stands there: "
                "call the file .jsonl"
            )
        # What follows a prompt begins with a space of its own, as words do in a byte-pair vocabulary.
        records = [(number, {"prompt": line}) for number, line in lines]
    prompts = distinct(joined(records, _said), "task.prompts", section.prompts, key=_said)
    return choose(prompts, section.offset, section.limit, "task.prompts", section.prompts)


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(record, dict) and not record.keys().isdisjoint(("prompt", "messages"))


def _records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    prompts = []
    for number, record in read_records(path, "task.prompts"):
        match record:
            case {"prompt": str(text)} if text.strip():
                prompts.append((number, record))
            case {"messages": [{"role": str(), "content": str()}, *_]}:
                prompts.append((number, {name: value for name, value in record.items() if name != "prompt"}))
                roles = [message.get("role") for message in record["messages"] if isinstance(message, dict)]
                if unknown := [role for role in roles if role not in ROLES]:
                    logger.warning(
                        "task.prompts=%r, line %d: the role %r is none of %s, and a chat template may leave the message out",
                        str(path), number, unknown[0], ", ".join(ROLES),
                    )  # fmt: skip
            case _:
                raise ConfigError(
                    f'task.prompts={str(path)!r}, line {number}: needs {{"prompt": text}}, and not an empty text, or '
                    '{"messages": [{"role": "user", "content": text}]} for a model that has a chat template'
                )
    return prompts


def _said(record: dict[str, Any]) -> str:
    """What makes two prompts the same."""
    return json.dumps(record.get("prompt") or record["messages"])


def length(prompt: Prompt, text: str, tokens: list[int]) -> float:
    """Tokens of a sentence, as a reward: with beta = 1 / b it is worth b nats a token.

    A tempered likelihood of whole sequences prefers short sentences: sharpening by 1 / T costs a token of entropy H about
    H (1 / T - 1) nats, whatever it says. b near H (1 - T), in the product with the likelihood, gives that back.
    """
    return float(len(tokens))


def legal_tokens(tokenizer: PreTrainedTokenizerBase, illegal: tuple[str, ...]) -> np.ndarray:
    """Ids of the tokens that may be drawn: not special, whole characters, and containing no illegal text."""
    special = special_tokens(tokenizer)
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    legal = [
        token not in special and text != "" and "�" not in text and not any(piece in text for piece in illegal)
        for token, text in enumerate(texts)
    ]
    return np.flatnonzero(legal)
