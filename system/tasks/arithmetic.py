"""Integer arithmetic with a calculator: Z is a rationale, in proportion to p(Z . Y | examples X) (Hu et al. 2024, section 4.4).

` 6 - 0 = 6, 6 - 4 = 2, 2 - 8 = -6` works out `6 - 0 - 4 - 8`: the policy writes the expressions, the calculator what
follows `=`. Policy and frozen model see the same worked examples in front of the question; the evidence is the answer.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from system.config import ConfigError
from system.task_config import Arithmetic
from system.tasks.files import choose, read_records
from system.tasks.problem import Problem, context_tokens, single_token, support, why_undrawable
from system.tools import Calculator, play
from system.trajectory import Prompt, sampled
from system.voting import wins

QUESTION = re.compile(r"Question: (-?\d+(?: [+-] \d+)+) = \? Answer:", re.ASCII)
STEP = re.compile(r"(-?\d{1,6} [+-] \d{1,6}) =( -?\d+)?", re.ASCII)
"""What a rationale's steps look like in a file, the result being optional: all of it is understood by the calculator."""
HELD_OUT = 5
"""Of generated questions, one in so many is for tests, by a hash of its text: no question is in both halves."""


@dataclass(frozen=True)
class Question:
    expression: str
    """`6 - 0 - 4`."""
    steps: tuple[str, ...] | None = None
    """The expressions of a worked rationale: `6 - 0`, `6 - 4`; None where none is given."""

    @property
    def text(self) -> str:
        return f"Question: {self.expression} = ? Answer:"

    @property
    def answer(self) -> int:
        return evaluate(self.expression)

    @property
    def worked(self) -> str:
        """As an example in front of another question."""
        assert self.steps is not None
        results = ", ".join(f"{step} = {evaluate(step)}" for step in self.steps)
        return f"{self.text} {results}. The answer is {self.answer}.\n"


def build(section: Arithmetic, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """Raises ConfigError if the questions cannot be read, there are too few examples, or the stop is not one token."""
    stop = single_token(tokenizer, ".", "task: the stop")
    tool = Calculator(tokenizer)
    questions, shown = read_questions(section)
    if len(shown) < section.examples:
        raise ConfigError(
            f"task.examples={section.examples}, but only {len(shown)} questions have a rationale; "
            f"lower it, or {'raise task.worked' if section.questions == 'generated' else 'give more in task.rationales'}"
        )
    front = "".join(question.worked for question in shown[: section.examples])
    constraints = support(section, tokenizer, stop, sorted(rationale_tokens(tokenizer)))
    _check_room(section, tokenizer, tool, [question for _, question in questions])
    prompts, demonstrations = [], {}
    refused: list[tuple[str, Sequence[int]]] = []
    for number, question in questions:
        context = context_tokens(tokenizer, front + question.text)
        answer = tokenizer.encode(f" The answer is {question.answer}.", add_special_tokens=False)
        meta = {"answer": question.answer, "expression": question.expression}
        prompt = Prompt(f"question-{number}", context, context, tuple(answer), meta)
        prompts.append(prompt)
        actions = encode_steps(tokenizer, question.steps or ())
        if question.steps and not constraints.admits(actions):
            refused.append((prompt.id, actions))
        elif question.steps:
            demonstrations[prompt.id] = (sampled(*play(tool, section.tool_tokens, actions), max_tokens=constraints.max_tokens),)
    return Problem(
        prompts=tuple(prompts),
        constraints=constraints,
        reward_stop=(stop,),
        demonstrations=demonstrations,
        undrawable=len(refused),
        why_undrawable=why_undrawable(*refused[0], constraints, tokenizer) if refused else "",
        tool=tool,
        judge=judge,
    )


def _check_room(section: Arithmetic, tokenizer: PreTrainedTokenizerBase, tool: Calculator, asked: Sequence[Question]) -> None:
    """Raises ConfigError if a question's rationale, worked out from left to right, is longer than a sample may be."""
    for question in asked:
        _, is_action_T = play(tool, 1 << 30, encode_steps(tokenizer, steps_of(question.expression)))
        needed = {"max_tokens": int(is_action_T.sum()), "tool_tokens": int((~is_action_T).sum())}
        for field, tokens in needed.items():
            if tokens > getattr(section, field):
                raise ConfigError(
                    f"task.{field}={getattr(section, field)}: to work out {question.expression!r} takes {tokens} of them; "
                    "raise it, or ask questions of fewer operands"
                )


def encode_steps(tokenizer: PreTrainedTokenizerBase, steps: Sequence[str]) -> list[int]:
    """The actions of a rationale: what stands between the calculator's outputs."""
    parts = [f"{', ' if number else ' '}{step} =" for number, step in enumerate(steps)]
    return [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]


def rationale_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What rationales are written with: each number, positive and negative, at each place."""
    numbers = [str(number) for number in range(-99, 100)]
    steps = [f"{number} {sign} {abs(int(number))}" for number in numbers for sign in "+-"]
    return set(encode_steps(tokenizer, steps))


def evaluate(expression: str) -> int:
    """Of integers with + and - between them, from left to right. Nothing else is understood: it never runs the text."""
    return sum(int(term.replace(" ", "")) for term in _terms(expression))


def steps_of(expression: str) -> tuple[str, ...]:
    """The rationale that works an expression out from left to right, two operands at a time."""
    first, *rest = _terms(expression)
    steps, value = [], int(first)
    for term in rest:
        steps.append(f"{value} {term}")
        value = evaluate(steps[-1])
    return tuple(steps)


def _terms(expression: str) -> list[str]:
    """`6 - 0 - 4` as `6`, `- 0`, `- 4`."""
    return re.findall(r"^-?\d+|[+-] \d+", expression, re.ASCII)


# ------------------------------------------------------------------------------------------------------ questions


def read_questions(section: Arithmetic) -> tuple[list[tuple[int, Question]], list[Question]]:
    """(questions with their numbers from 1, chosen by offset and limit; the worked ones, of which the first are examples).

    Training questions are the worked ones that are no examples, and those without a rationale; `split` says which half.

    Raises:
        ConfigError: a file is missing, or a record of it is no question; the message has the record's number.
    """
    asked, shown = [], []
    if section.questions == "generated" or (section.split == "test" and not section.rationales):
        asked = generate(section.operands, section.count, test=False)
        shown = [replace(question, steps=steps_of(question.expression)) for question in asked[: section.worked]]
        asked = asked[section.worked :]
    if section.questions != "generated":
        shown = _read(section.rationales, "task.rationales", worked=True) if section.rationales else shown
        asked = _read(section.questions, "task.questions")
    elif section.split == "test":
        asked = generate(section.test_operands or section.operands, section.count, test=True)
    if section.split == "train":
        asked = shown[section.examples :] + asked
    numbered = list(enumerate(asked, 1))
    return choose(numbered, section.offset, section.limit, "task.questions", section.questions), shown


def generate(operands: Sequence[int], count: int, *, test: bool) -> list[Question]:
    """Distinct questions with one-digit operands, the same in every run. Raises ConfigError if there are not so many."""
    rng = np.random.default_rng(0)
    found: dict[str, Question] = {}
    for _ in range(100 * count):
        if len(found) == count:
            return list(found.values())
        terms = int(rng.choice(operands))
        digits, signs = rng.integers(0, 10, terms), rng.choice(["+", "-"], terms - 1)
        expression = str(digits[0]) + "".join(f" {sign} {digit}" for sign, digit in zip(signs, digits[1:], strict=True))
        question = Question(expression)
        if (zlib.crc32(question.text.encode()) % HELD_OUT == 0) == test:
            found.setdefault(expression, question)
    raise ConfigError(f"task.count={count}: there are not so many questions with {list(operands)} operands; lower it")


def _read(path: str, field: str, worked: bool = False) -> list[Question]:
    """The questions of a file, which have rationales, all of them, if they are to be `worked`."""
    questions = []
    for number, record in read_records(Path(path), field):
        question = _question(record, where := f"{field}={path!r}, record {number}")
        if worked and question.steps is None:
            raise ConfigError(f'{where}: has no "rationale"; give it one, or move it to the file of task.questions')
        questions.append(question)
    return questions


def _question(record: Any, where: str) -> Question:
    match record:
        case {"str_query": str(text), "num_sol": int(answer)} | {"question": str(text), "answer": int(answer)}:
            steps = record.get("str_rationale", record.get("rationale"))
            asked = QUESTION.fullmatch(text.strip())
            if asked and isinstance(steps, (str, type(None))):
                question = Question(asked.group(1), None if steps is None else _steps(steps, where))
                if answer != question.answer:
                    raise ConfigError(f"{where}: {text!r} is {question.answer}, not {answer}; mend the file")
                if question.steps and (end := evaluate(question.steps[-1])) != answer:
                    raise ConfigError(f"{where}: its rationale {steps!r} ends at {end}, not at {answer}; mend the file")
                return question
    raise ConfigError(
        f'{where}: needs {{"question": "Question: 1 + 2 - 3 = ? Answer:", "answer": 0}}, and perhaps '
        '"rationale": "1 + 2 =, 3 - 3 ="'
    )


def _step(text: str) -> re.Match[str] | None:
    """Of STEP; None for another text, and for a step with a wrong result."""
    step = STEP.fullmatch(text.strip())
    wrong = step and step.group(2) and int(step.group(2)) != evaluate(step.group(1))
    return None if wrong else step


def _steps(rationale: str, where: str) -> tuple[str, ...]:
    steps = []
    for text in rationale.split(","):
        if (step := _step(text)) is None:
            raise ConfigError(
                f"{where}: {text.strip()!r} is no step of a rationale; write two numbers of at most six digits, as in "
                '"14 - 3 =", with the right result behind it or with none'
            )
        steps.append(step.group(1))
    return tuple(steps)


# ------------------------------------------------------------------------------------------------------- verdicts


def result(text: str) -> int | None:
    """The number after the last `=`, where the text ends with it."""
    match = re.search(r"=\s*(-?\d{1,9})\s*$", text, re.ASCII)
    return int(match.group(1)) if match else None


def works_out(text: str, expression: str) -> bool:
    """The text is a rationale: steps of which each goes on from the last one's result, and which take each operand of the
    expression once, in any order. A result that the calculator did not write is none."""
    running: str | None = None
    taken: list[int] = []
    for part in text.split(","):
        step = _step(part)
        if step is None or step.group(2) is None:
            return False
        first, second = _terms(step.group(1))
        if running is None:
            taken.append(evaluate(first))
        elif first != running:
            return False
        taken.append(evaluate(second))
        running = step.group(2).strip()
    return sorted(taken) == sorted(map(evaluate, _terms(expression)))


def log_correct(prompt: Prompt, text: str, tokens: list[int]) -> float:
    """0 for a rationale that works the question out, -20 for any other text: p(Y | Z) where a small model's is too soft.

    After a rationale with a wrong result a small model finds the right answer only a few nats less likely, and a step that is
    left out saves more than that, so that its own posterior prefers short wrong rationales. If only the last result counted,
    it would prefer ` 9 - 3 + 6 - 1 = 11`, which the calculator leaves alone and a guess completes.
    """
    return 0.0 if works_out(text, prompt.meta["expression"]) else -20.0


def judge(prompt: Prompt, texts: Sequence[str], tokens_K: Sequence[Sequence[int]], unscored: int) -> dict[str, float]:
    """Whether the answer that most texts give is right (a tie is not, nor are most without a number), the share of right texts,
    and of those that work it out."""
    answer = prompt.meta["answer"]
    results = [result(text) for text in texts] + [None] * unscored
    won = wins(results, answer)
    worked = [works_out(text, prompt.meta["expression"]) for text in texts] + [False] * unscored
    right = [value == answer for value in results]
    return {"vote": float(won), "accuracy": float(np.mean(right)), "worked_out": float(np.mean(worked))}
