"""The sections of a config that say what is sampled: the tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from system.reward_config import FunctionPath, FunctionReward, LMPosterior, ProductReward, Reward
from system.section import Section


def _check_template(field: str, text: str, /, needed: bool = True, **values: object) -> None:
    """Raises ValueError for a text with anything else to fill in than `values`, or if `needed` without one of them."""
    try:
        filled = text.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        names = " and ".join(f"{{{name}}}" for name in values)
        raise ValueError(f"{field}={text!r}: only {names} can be filled in; write {{{{ and }}}} for braces") from error
    for name in values if needed else ():
        if text.format(**values | {name: f"{values[name]}x"}) == filled:
            raise ValueError(f"{field}={text!r} is the same for every {name}; write {{{name}}} where it belongs")


TRIMMED = r"^\S(.*\S)?$"
NUMBER_REWARD = "system.tasks.random_number:log_reward"
PAPERS_NUMBER_REWARD = "system.tasks.random_number:paper_log_reward"
LAST_NUMBER = "system.tasks.verifiable:last_number"


class RandomNumber(Section):
    """An integer, uniform over low..high: the posterior is known exactly, so this task measures the method. (A number that the
    tokenizer can write in several ways, as one with tokens of many digits can under `support=vocabulary`, counts for each.)"""

    kind: Literal["random_number"] = "random_number"
    low: int = Field(default=0, ge=0)
    """The least number."""
    high: int = Field(default=100, ge=1, le=9999)
    """The largest number."""
    prompt: str = Field(default="The following is a random integer drawn uniformly between {low} and {high}: ", min_length=1)
    """`{low}` and `{high}` are filled in."""
    stop: str = Field(default=".", min_length=1)
    """What ends a number: a text that is one token."""
    support: Literal["digits", "vocabulary"] = "digits"
    """What may be drawn before the stop. With `vocabulary`, as in the paper, what is a number has to be learned too."""
    floor: float = Field(default=-12.0, le=-10.0)
    """log R of anything that is not one of the numbers, nats. A number has log R = 0."""
    reward: Reward = FunctionReward(path=NUMBER_REWARD, every_prefix=True, seconds=None)
    """`system.tasks.random_number:paper_log_reward` is the paper's."""
    longest: int | None = Field(default=None, ge=1, le=16)
    """Most tokens of a draw; by default the digits of `high`."""

    @property
    def min_tokens(self) -> int:
        return 0

    @property
    def max_tokens(self) -> int:
        return self.longest or len(str(self.high))

    @property
    def is_listed(self) -> bool:
        """The posterior is known, number by number: under the task's own rewards each is as likely as the others."""
        return isinstance(self.reward, FunctionReward) and self.reward.path in (NUMBER_REWARD, PAPERS_NUMBER_REWARD)

    @model_validator(mode="after")
    def _an_interval(self) -> RandomNumber:
        if self.high <= self.low:
            raise ValueError(f"high={self.high} must be above low={self.low}; raise high or lower low")
        digits = len(str(self.high))
        if self.max_tokens < digits:
            raise ValueError(f"longest={self.longest} is too short for high={self.high}; raise longest to {digits}")
        _check_template("prompt", self.prompt, needed=False, low=self.low, high=self.high)
        return self


class Drawn(Section):
    """Which prompts a run takes of a file, and how long what is drawn for them may be."""

    limit: int | None = Field(default=None, ge=1)
    """Take only this many prompts."""
    offset: int = Field(default=0, ge=0)
    """Skip this many prompts first."""
    held_out: int = Field(default=0, ge=0)
    """Of those taken, keep the last so many back: nothing is trained on them, and evaluations, those of `deploy/evaluate.py`
    and `deploy/baselines.py` too, are on them alone. With 0 the evaluations of a run are on what it is trained on."""
    min_tokens: int = Field(default=1, ge=0)
    """Fewest tokens of a sample: before, the stop is outside the support."""
    max_tokens: int = Field(default=30, ge=1)
    """Most tokens of a sample before its stop, which then comes for certain."""

    @model_validator(mode="after")
    def _lengths(self) -> Drawn:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}: nothing can be drawn; lower min_tokens"
            )
        return self


class Sentence(Drawn):
    """What may be drawn where Z is one sentence."""

    stop: str = Field(default=".", min_length=1)
    """The end of a sentence: a text that is one token. Its log-probability is part of the reward."""
    illegal: tuple[str, ...] = (
        "\n", "\r", "\t", '"', "“", "”", "?", "!", ":", ";", "(", ")", "[", "]", "<", ">", "http", "www", ".",
    )  # fmt: skip
    """A token whose text contains one of these is outside the policy's support, as are special tokens, and those that are a
    part of a character alone: characters that a tokenizer writes in several pieces are not drawn."""
    reward: Reward = LMPosterior()


class NextSentence(Sentence):
    prompts: str = "packaged"
    """A UTF-8 text file with one prompt a line; a .jsonl file of lines, or a .json list, of {"prompt": text}, taken as it is,
    or {"messages": [{"role": "user", "content": text}]}, which the model's chat template writes; or `packaged` for a small one
    that comes with the project. Where the last message is the assistant's, samples go on from it. A "completion" beside it, a
    text as it goes on (often with a space in front), or a list of "completions", are demonstrations. A reward finds all that a
    line has in `prompt.meta`, where "text" is the prompt as the policy sees it."""


class Continuation(NextSentence):
    """The next sentence, from the tempered posterior p(Z . | X)^(1/T), with T from learner.reward_temperature."""

    kind: Literal["continuation"] = "continuation"


class Constrained(NextSentence):
    """The next sentence, from p(Z . | X) among those that satisfy all that is asked for."""

    kind: Literal["constrained"] = "constrained"
    keywords: tuple[Annotated[str, Field(pattern=TRIMMED)], ...] = ()
    """Words that must be there, in any order and case, each without spaces around it."""
    guided: bool = False
    """A sentence stops only once all keywords are there, and at the last places what is missing comes for certain: it is a
    matter of the policy's support, in training, evaluations and baselines, and hardly a sample is without them. Of a pattern
    and a predicate nothing is known before the end, nor of a keyword that cannot be drawn as it is written here."""
    pattern: str | None = None
    """A regular expression that must be found in the sentence."""
    predicate: FunctionPath | None = None
    """Import path of a function `f(prompt: Prompt, text: str, tokens: list[int]) -> bool` that must be true. Evaluations ask it
    once more, for the share of samples that satisfy it."""
    seconds: float = Field(default=10.0, gt=0)
    """Longest time of a search for the pattern, and of a call of the predicate, which runs in a process of its own."""
    floor: float = Field(default=-20.0, le=-5.0)
    """log c of a sentence that does not satisfy them, nats."""
    # Known where a sample ends alone: most prefixes satisfy nothing yet, and to be right about how rare a stop there has to be
    # would outweigh all that is learned from sentences.
    reward: Reward = ProductReward(
        of=(LMPosterior(), FunctionReward(path="system.tasks.constrained:log_constraint", seconds=None))
    )

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> Constrained:
        if not (self.keywords or self.pattern or self.predicate):
            raise ValueError("keywords, pattern and predicate are all empty: set one of them, or use kind=continuation")
        try:
            re.compile(self.pattern or "")
        # The last two are how `re` says that a number in it, or its nesting, is too large.
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern={self.pattern!r} is no regular expression that can be used: {error}") from error
        return self


class Infilling(Sentence):
    """The missing sentence Z of a story, from p(Z | X, Y) in proportion to p(X Z . Y): X is before it, Y after."""

    kind: Literal["infilling"] = "infilling"
    stories: str = "packaged"
    """JSONL: each line {"sentences": [texts]}, of which `gap` is left out, or {"before": text, "after": text}, with
    "middle" where it is known. `packaged` is a small file that comes with the project."""
    gap: int = Field(default=3, ge=1)
    """Number of the missing sentence, from 0."""
    prompt: str = Field(default="Ending: {after}\nStory: {before}", min_length=1)
    """What the policy sees; `{before}` and `{after}` are filled in. A model that only continues text does best where Z goes on
    from what is before it."""
    max_tokens: int = Field(default=25, ge=1)

    @model_validator(mode="after")
    def _a_text_to_fill_in(self) -> Infilling:
        _check_template("prompt", self.prompt, before="", after="")
        return self


class Verifiable(Drawn):
    """Answers that a program checks, from p(Z . | X) exp(r / beta): the reward is known at the end alone."""

    kind: Literal["verifiable"] = "verifiable"
    questions: str = "packaged"
    """JSONL, each line {"question": text, "answer": text or number}; `packaged` for all sums of two digits. A "completion"
    beside it, a text as it goes on, or a list of "completions", are demonstrations. A verifier finds all that a line has in
    `prompt.meta`."""
    prompt: str = Field(default="Question: {question}\nAnswer:", min_length=1)
    """`{question}` is filled in."""
    chat: bool = False
    """The prompt is a user's turn in the model's chat template, and the answer the assistant's: set `stop` to what ends it."""
    max_tokens: int = Field(default=24, ge=1)
    stop: str = Field(default="\n", min_length=1)
    """The end of an answer: a text that is one token."""
    reward: Reward = ProductReward(of=(LMPosterior(), FunctionReward(path=LAST_NUMBER, beta=0.1, seconds=None)))

    @model_validator(mode="after")
    def _a_question_to_fill_in(self) -> Verifiable:
        _check_template("prompt", self.prompt, question="")
        return self


class Arithmetic(Drawn):
    """Rationales that work out a sum with a calculator, from p(Z . "The answer is Y." | examples X)."""

    kind: Literal["arithmetic"] = "arithmetic"
    questions: str = "generated"
    """`generated`, or a JSON or JSONL file: {"question": "Question: 1 + 2 = ? Answer:", "answer": 3}, or the paper's files."""
    rationales: str | None = None
    """With questions from a file: a file of questions that have a "rationale" too. Without one, test questions from a file
    have the generated examples in front."""
    split: Literal["train", "test"] = "train"
    """`test`: generated questions that are in no training set; from a file, those of `questions` without `rationales`."""
    operands: tuple[int, ...] = Field(default=(3, 4), min_length=1)
    """Generated questions have one of these numbers of operands."""
    test_operands: tuple[int, ...] | None = None
    """Of the test questions; by default as `operands`."""
    count: int = Field(default=1000, ge=1)
    """Generated questions."""
    worked: int = Field(default=50, ge=0)
    """Generated training questions that have a rationale."""
    examples: int = Field(default=3, ge=0)
    """Worked examples in front of every question, the first of those with a rationale."""
    min_tokens: int = Field(default=5, ge=0)
    max_tokens: int = Field(default=32, ge=1)
    """Actions: the calculator's tokens do not count."""
    tool_tokens: int = Field(default=24, ge=0)
    """Most tokens that the calculator writes into one sample."""
    reward: Reward = LMPosterior(every_prefix=False)

    @field_validator("operands", "test_operands")
    @classmethod
    def _few_operands(cls, operands: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if operands is not None and (not operands or not all(2 <= number <= 10 for number in operands)):
            raise ValueError("each number of operands must be from 2 to 10, as in [3, 4]")
        return operands

    @model_validator(mode="after")
    def _rationales_are_read(self) -> Arithmetic:
        if self.rationales is not None and self.questions == "generated":
            raise ValueError(
                f"rationales={self.rationales!r} would not be read: questions=generated have rationales of their own; name a "
                "file of questions, or set rationales=null"
            )
        return self


class Subjectivity(Drawn):
    """Texts with labels. `reason` trains a rationale Z towards p(Z, label | X); the other stages answer with a label.

    `label` answers from the text alone, and `predict` from the text and a rationale that an earlier run drew. Both imitate
    the records' labels with loss.kind=mle.
    """

    kind: Literal["subjectivity"] = "subjectivity"
    stage: Literal["reason", "label", "predict"] = "reason"
    """What the policy draws, as above."""
    records: str = "packaged"
    """JSONL: each line {"text": text, "label": one of `labels`, or its number from 0}, with "label_text" where a number is
    to be checked. `packaged` is a small file that comes with the project."""
    labels: tuple[Annotated[str, Field(min_length=1)], ...] = ("objective", "subjective")
    """Each one token where it stands in `evidence` and `label_prompt`."""
    prompt: str = 'Classify this movie review as objective or subjective: "{text}" This review is'
    """What a rationale follows; `{text}` is filled in."""
    label_prompt: str = 'Classify this movie review as objective or subjective: "{text}" It is'
    """What a label follows without a rationale; `{text}` is filled in."""
    evidence: str = " so it is {label}."
    """What follows a rationale and its stop; `{label}` is filled in. Where the policy answers, its end is the stop."""
    rationales: str | None = None
    """JSONL that `deploy/evaluate.py` wrote of a `reason` run on these records: each line {"prompt": id, "text": Z, "context":
    its prompt}. Several rationales of a record become as many prompts, which vote on its label."""
    examples: int = Field(default=0, ge=0)
    """This many labelled records of `examples_from`, the first, stand in front of every prompt."""
    examples_from: str | None = None
    """A file such as `records`. A record is never among its own examples."""
    stop: str = Field(default=",", min_length=1)
    """The end of a rationale: a text that is one token. Its log-probability is part of the reward."""
    illegal: tuple[str, ...] = ("\n", "\r", "\t", '"', "“", "”", "?", "!", ":", ";", "(", ")", ".", ",")
    """A token whose text contains one of these is no part of a rationale, as are special tokens."""
    max_tokens: int = Field(default=5, ge=1)
    reward: Reward = LMPosterior()

    @model_validator(mode="after")
    def _texts_to_fill_in(self) -> Subjectivity:
        _check_template("prompt", self.prompt, text="")
        _check_template("label_prompt", self.label_prompt, text="")
        _check_template("evidence", self.evidence, label="")
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(f"labels={list(self.labels)} must be two or more that differ")
        return self

    @model_validator(mode="after")
    def _files_are_there_for_what_needs_them(self) -> Subjectivity:
        if (self.stage == "predict") != bool(self.rationales):
            raise ValueError(
                f"stage={self.stage} with rationales={self.rationales!r}: stage=predict reads the rationales of an earlier "
                "run, and no other stage does; set both or neither"
            )
        if bool(self.examples) != bool(self.examples_from):
            raise ValueError(
                f"examples={self.examples} with examples_from={self.examples_from!r}: set how many and the file, or neither"
            )
        return self


PROMPT_FILES = {
    "continuation": "prompts", "constrained": "prompts", "infilling": "stories",
    "verifiable": "questions", "arithmetic": "questions", "subjectivity": "records",
}  # fmt: skip
"""The field of each task that names a file of prompts."""
WHOLE: dict[str, Any] = {"offset": 0, "limit": None, "held_out": 0}
"""The fields with which a task takes all of such a file."""

Task = Annotated[
    RandomNumber | Continuation | Infilling | Constrained | Verifiable | Arithmetic | Subjectivity, Field(discriminator="kind")
]


HOW_ASKED = frozenset({"seconds", "start_seconds", "concurrency"})
"""The fields of a task's functions that say nothing of what these reward or demand."""


def is_same(task: Task, kept: Mapping[str, Any]) -> bool:
    """Whether a run kept this of the same task. A field that there was not then has its default."""
    try:
        then = type(task).model_validate(kept)
    except ValidationError:
        return False
    return _target(then.model_dump()) == _target(task.model_dump())


def _target(value: Any) -> Any:
    """Without HOW_ASKED, however deep."""
    if isinstance(value, dict):
        return {name: _target(each) for name, each in value.items() if name not in HOW_ASKED}
    return [_target(each) for each in value] if isinstance(value, (list, tuple)) else value
