"""The missing sentence of a story: Z from p(Z | X, Y), in proportion to p(X Z stop Y) (Hu et al. 2024, section 4.2).

The policy sees what comes before and after; the frozen model scores Z and then Y after X alone, so that Y is never part of
what Z is scored under.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from system.config import ConfigError
from system.task_config import Infilling
from system.tasks.continuation import legal_tokens
from system.tasks.files import choose, read_records
from system.tasks.problem import Problem, context_tokens, demonstrated, single_token, support
from system.text import decode
from system.trajectory import Prompt

logger = logging.getLogger(__name__)

PACKAGED_STORIES = Path(__file__).with_name("stories.jsonl")


@dataclass(frozen=True)
class Story:
    id: str
    before: str
    middle: str
    """The sentence that is to be infilled, as it was written; empty where it is not known."""
    after: str
    tokens: dict[str, list[int]] = field(default_factory=dict)
    """`middle` (without its stop) and `after` as tokens, where a model drew them: texts do not always become them again."""
    told: dict[str, Any] = field(default_factory=dict)
    """Where a model told it: its `support`, as `Constraints.described`, and `log_p` of Z, the stop and Y, nats."""


def build(section: Infilling, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """Raises ConfigError if the stories cannot be read, are of another tokenizer, the stop is not one token, or there is
    nothing else to draw."""
    stop = single_token(tokenizer, section.stop, "task.stop")
    constraints = support(section, tokenizer, stop, legal_tokens(tokenizer, section.illegal))
    prompts, middles, told = [], {}, set()
    stories = read_stories(section)
    for story in stories:
        policy = context_tokens(tokenizer, section.prompt.format(before=story.before, after=story.after))
        tokens = story.tokens or {"after": tokenizer.encode(" " + story.after, add_special_tokens=False)}
        if decode(tokenizer, tokens["after"]).strip() != story.after:
            raise ConfigError(
                f"task.stories={section.stories!r}: the tokens of story {story.id!r} are not its text; "
                "they are of another tokenizer: draw the stories anew with this model"
            )
        meta = {"before": story.before, "middle": story.middle, "after": story.after, "stop": section.stop}
        meta |= {"log_p": story.told["log_p"]} if story.told else {}
        middle = tokens.get("middle")
        if middle is None and story.middle:
            middle = tokenizer.encode(" " + story.middle.removesuffix(section.stop), add_special_tokens=False)
        if middle is not None:
            middles[story.id] = [middle]
            if story.told and constraints.is_within(story.told["support"]):
                told.add(story.id)
        prompts.append(Prompt(story.id, policy, context_tokens(tokenizer, story.before), tuple(tokens["after"]), meta))
    known = demonstrated(middles, constraints, tokenizer)
    if unsigned := sum(bool(story.tokens and not story.told) for story in stories):
        logger.warning(
            "task.stories=%r: %d stories have tokens and not by whom they were told; for a bound from above tell them anew",
            section.stories, unsigned,
        )  # fmt: skip
    return Problem(
        prompts=tuple(prompts),
        constraints=constraints,
        reward_stop=(stop,),
        exact=frozenset(told & known["demonstrations"].keys()),
        judge=overlap,
        **known,
    )


def overlap(prompt: Prompt, texts: Sequence[str], tokens_K: Sequence[Sequence[int]], unscored: int) -> dict[str, float]:
    """BLEU-4 and GLEU-4 with the story's own sentence, in 0..1, means over samples; nothing where it is not known.

    Neither side has its stop, which all samples would get right. Smoothing is NLTK's method 1, as in the paper's code.
    """
    # Takes seconds, and only an evaluation needs it.
    from nltk.tokenize import wordpunct_tokenize
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from nltk.translate.gleu_score import sentence_gleu

    references = [wordpunct_tokenize(prompt.meta["middle"].removesuffix(prompt.meta["stop"]))]
    if not (references[0] and texts):
        return {}
    smoothing = SmoothingFunction().method1
    words_K = [wordpunct_tokenize(text) for text in texts]
    bleu_K = [float(sentence_bleu(references, words, smoothing_function=smoothing)) for words in words_K]  # type: ignore[arg-type]
    gleu_K = [float(sentence_gleu(references, words)) for words in words_K]
    return {"bleu_4": float(np.mean(bleu_K)), "gleu_4": float(np.mean(gleu_K))}


def read_stories(section: Infilling) -> list[Story]:
    """The stories chosen by offset and limit.

    Raises:
        ConfigError: the file is missing, or a line of it is no story; the message has the line's number.
    """
    path = PACKAGED_STORIES if section.stories == "packaged" else Path(section.stories)
    stories = [_story(record, number, section) for number, record in read_records(path, "task.stories")]
    if len({story.id for story in stories}) < len(stories):
        raise ConfigError(f"task.stories={section.stories!r}: two stories have the same id; give each its own")
    return choose(stories, section.offset, section.limit, "task.stories", section.stories)


def _story(record: Any, number: int, section: Infilling) -> Story:
    where = f"task.stories={section.stories!r}, line {number}"
    name = str(record.get("id", f"line-{number}")) if isinstance(record, dict) else ""
    match record:
        case {"sentences": [*sentences]} if all(isinstance(text, str) and text.strip() for text in sentences):
            if not 0 < section.gap < len(sentences) - 1:
                raise ConfigError(
                    f"{where}: task.gap={section.gap} needs sentences before and after it, but there are {len(sentences)} "
                    "(numbered from 0)"
                )
            before, middle, after = sentences[: section.gap], sentences[section.gap], sentences[section.gap + 1 :]
            return Story(name, " ".join(map(str.strip, before)), middle.strip(), " ".join(map(str.strip, after)))
        case {"before": str(before), "after": str(after)} if before.strip() and after.strip():
            tokens, told = {}, {}
            match record:
                case {"tokens": {"middle": [*middle], "after": [*ending]}} if all(
                    isinstance(token, int) for token in [*middle, *ending]
                ):
                    tokens = {"middle": middle, "after": ending}
            match record:
                case {"told": {"support": {"tokens": str(), "min_tokens": int(), "max_tokens": int()}, "log_p": float()}} if (
                    tokens
                ):
                    told = record["told"]
            return Story(name, before.strip(), str(record.get("middle") or "").strip(), after.strip(), tokens, told)
    raise ConfigError(f'{where}: needs {{"sentences": [texts]}} or {{"before": text, "after": text}}, none of them empty')
