"""Text that satisfies a constraint, and is otherwise as likely as the model finds it: R = p(Z stop | X) * c(Z).

c is 1 where every keyword is there, the pattern is found and the predicate is true, and exp(floor) elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import regex
from transformers import PreTrainedTokenizerBase

from system.config import ConfigError
from system.constraints import Constraints
from system.function_process import FunctionFault, function_process
from system.required import Required, has_word
from system.task_config import Constrained
from system.tasks import continuation
from system.tasks.problem import Problem, demonstrated
from system.text import decode
from system.trajectory import Prompt

logger = logging.getLogger(__name__)


def build(section: Constrained, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """Raises ConfigError as `continuation.build`, for a keyword that no tokens make, or a predicate that cannot be had."""
    if section.predicate:
        predicate = function_process(section.predicate, "task.predicate", section.seconds)
        predicate.start()
        predicate.close()  # until an evaluation asks it
    try:
        regex.compile(section.pattern or "")
    except regex.error as error:  # re, which the config was read with, takes a little that regex does not
        raise ConfigError(f"task.pattern={section.pattern!r} is no regular expression: {error}") from error
    for keyword in section.keywords:
        piece = next((piece for piece in section.illegal if piece in keyword), None)
        if piece is not None:
            raise ConfigError(f"task.keywords: {keyword!r} has {piece!r}, which is in task.illegal; take it out of one of them")
    problem = continuation.build(section, tokenizer)
    if section.keywords:
        texts = tokenizer.batch_decode([[token] for token in problem.constraints.columns.tolist()])
        _check_characters(section.keywords, {form for text in texts for form in text.lower() + text.upper()})
    written = {keyword: tuple(tokenizer.encode(" " + keyword, add_special_tokens=False)) for keyword in section.keywords}
    # A keyword that cannot be drawn in this form, or that a tokenizer reads back as another text, may still be there in
    # another form, of other case or in other pieces.
    known = {
        keyword: tokens
        for keyword, tokens in written.items()
        if problem.constraints.allows(tokens) and has_word(decode(tokenizer, tokens), keyword)
    }
    if unknown := [keyword for keyword in section.keywords if keyword not in known]:
        logger.warning(
            "task.keywords: %s cannot be drawn as written here, in other pieces or another case at best: task.guided and "
            "sampler.exploration.planted do without", unknown,
        )  # fmt: skip
    hints = tuple(known.values())
    constraint = {
        "keywords": list(section.keywords),
        "pattern": section.pattern,
        "predicate": section.predicate,
        "floor": section.floor,
        "seconds": section.seconds,
    }
    prompts = tuple(replace(p, hints=hints, meta=p.meta | {"constraint": constraint}) for p in problem.prompts)
    constraints = problem.constraints
    if section.guided and hints:
        try:
            required = Required(tokenizer, tuple(known), hints, section.max_tokens)
        except ValueError as error:
            raise ConfigError(f"task.keywords: {error}; raise task.max_tokens") from error
        constraints = replace(constraints, required=required)
        problem = _admitted(problem, constraints, tokenizer)
    return replace(problem, prompts=prompts, constraints=constraints, judge=validity)


def _admitted(problem: Problem, constraints: Constraints, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """With the demonstrations alone that the constraints admit."""
    tokens = {name: [known.tokens_T.tolist() for known in known_K] for name, known_K in problem.demonstrations.items()}
    admitted = demonstrated(tokens, constraints, tokenizer)
    admitted["undrawable"] += problem.undrawable
    admitted["why_undrawable"] = problem.why_undrawable or admitted["why_undrawable"]
    return replace(problem, **admitted)


def _check_characters(keywords: Sequence[str], drawable: set[str]) -> None:
    """Raises ConfigError for a keyword with a character, whatever its case, that no token has which may be drawn."""
    for keyword in keywords:
        if missing := sorted(set(keyword.lower()) - drawable):
            raise ConfigError(f"task.keywords: {keyword!r} has {missing}, which is in no token that may be drawn; leave it out")


def validity(prompt: Prompt, texts: Sequence[str], tokens_K: Sequence[Sequence[int]], unscored: int) -> dict[str, float]:
    """Share of what was drawn that satisfies the constraint, and of distinct texts."""
    found_K = [_found(prompt, text, list(tokens)) for text, tokens in zip(texts, tokens_K, strict=True)]
    valid = sum(found_K) / (len(found_K) + unscored)
    return continuation.variety(prompt, texts, tokens_K, unscored) | {"validity": valid}


def _found(prompt: Prompt, text: str, tokens: list[int]) -> bool:
    try:
        return satisfied(prompt, text, tokens)
    # Another time it did not fail, or the sample would not be here.
    except (TimeoutError, FunctionFault):
        return False


def satisfied(prompt: Prompt, text: str, tokens: list[int]) -> bool:
    """Keywords are whole words, whatever their case.

    Raises:
        TimeoutError: the search for the pattern took longer than task.seconds.
        FunctionFault: the predicate gave no value.
    """
    constraint = prompt.meta["constraint"]
    if not all(has_word(text, word) for word in constraint["keywords"]):
        return False
    # A pattern can take exponential time on a text that it nearly matches: re could not be ended, regex can.
    if constraint["pattern"] and not regex.search(constraint["pattern"], text, timeout=constraint["seconds"]):
        return False
    predicate = constraint["predicate"]
    return not predicate or bool(function_process(predicate, "task.predicate", constraint["seconds"])(prompt, text, tokens))


def log_constraint(prompt: Prompt, text: str, tokens: list[int]) -> float:
    """log c, nats."""
    return 0.0 if satisfied(prompt, text, tokens) else float(prompt.meta["constraint"]["floor"])
