"""Classification with a latent reason: Z from p(Z | X, label), in proportion to p(Z stop, label | X) (Hu et al. 2024, 4.3).

The policy sees the text alone, since nobody knows the label of a new one; the label is evidence, so the frozen model can
say after each sampled Z which label it prefers. Two further stages answer with a label themselves: from the text, which is
the baseline, or from the text and a sampled rationale, which is the M-step after the E-step that `reason` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from system.config import ConfigError
from system.constraints import Constraints
from system.task_config import Subjectivity
from system.tasks.continuation import legal_tokens
from system.tasks.files import choose, read_records
from system.tasks.problem import Problem, context_tokens, single_token, support
from system.trajectory import Prompt, sampled

PACKAGED_REVIEWS = Path(__file__).with_name("reviews.jsonl")


@dataclass(frozen=True)
class Record:
    id: str
    text: str
    label: str


def build(section: Subjectivity, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """Raises ConfigError if a file cannot be read or does not fit, a text that has to be one token is not, or a rationale has
    no token to be drawn with."""
    records = choose(read(section.records, section, "records"), section.offset, section.limit, "task.records", section.records)
    examples = _Examples(section)
    if section.stage == "reason":
        return _reason(section, tokenizer, records, examples)
    return _answer(section, tokenizer, records, examples)


def _reason(section: Subjectivity, tokenizer: PreTrainedTokenizerBase, records: list[Record], examples: _Examples) -> Problem:
    stop = single_token(tokenizer, section.stop, "task.stop")
    evidences = {
        label: tuple(tokenizer.encode(section.evidence.format(label=label), add_special_tokens=False))
        for label in section.labels
    }
    prompts, alternatives = [], {}
    for record in records:
        context = context_tokens(tokenizer, examples.before(record) + section.prompt.format(text=record.text))
        meta = {"text": record.text, "label": record.label}
        prompts.append(Prompt(record.id, context, context, evidences[record.label], meta))
        alternatives[record.id] = tuple(evidence for label, evidence in evidences.items() if label != record.label)
    return Problem(
        prompts=tuple(prompts),
        constraints=support(section, tokenizer, stop, legal_tokens(tokenizer, section.illegal)),
        reward_stop=(stop,),
        alternatives=alternatives,
    )


def _answer(section: Subjectivity, tokenizer: PreTrainedTokenizerBase, records: list[Record], examples: _Examples) -> Problem:
    """Z is a label and nothing else, so log q is over the labels alone."""
    before, gap, after = _around(section)
    stop = single_token(tokenizer, after, "task.evidence after {label}")
    labels = {label: single_token(tokenizer, gap + label, "task.labels") for label in section.labels}
    constraints = Constraints.of(
        stop_token=stop, min_tokens=1, max_tokens=1, vocab_size=len(tokenizer), allowed=list(labels.values())
    )
    choices = {label: sampled([token], max_tokens=constraints.max_tokens) for label, token in labels.items()}
    if section.stage == "label":
        texts = {record.id: [section.label_prompt.format(text=record.text)] for record in records}
    else:
        rationales = read_rationales(section, records)
        texts = {
            record.id: [section.prompt.format(text=record.text) + z + section.stop + before for z in rationales[record.id]]
            for record in records
        }
    prompts, demonstrations = [], {}
    for record in records:
        meta = {"text": record.text, "label": record.label, "record": record.id}
        for number, text in enumerate(texts[record.id]):
            name = record.id if section.stage == "label" else f"{record.id}/{number}"
            context = context_tokens(tokenizer, examples.before(record) + text)
            prompts.append(Prompt(name, context, context, meta=meta))
            demonstrations[name] = (choices[record.label],)
    return Problem(
        prompts=tuple(prompts),
        constraints=constraints,
        reward_stop=(stop,),
        demonstrations=demonstrations,
        choices=tuple(choices.values()),
    )


def _around(section: Subjectivity) -> tuple[str, str, str]:
    """The evidence as (what precedes a label, the space that belongs to the label's token, what follows it)."""
    lead, _, after = section.evidence.format(label="\0").partition("\0")
    before = lead.rstrip(" ")
    return before, lead[len(before) :], after


class _Examples:
    """The labelled records that stand in front of a prompt."""

    def __init__(self, section: Subjectivity) -> None:
        self.section = section
        self.pool = read(section.examples_from, section, "examples_from") if section.examples_from else []

    def before(self, record: Record) -> str:
        """Raises ConfigError where there are too few besides the record itself."""
        section = self.section
        shown = [example for example in self.pool if example.text != record.text][: section.examples]
        if len(shown) < section.examples:
            raise ConfigError(
                f"task.examples={section.examples}: task.examples_from={section.examples_from!r} has {len(shown)} records "
                f"besides {record.id!r} itself; lower task.examples or name another file"
            )
        _, gap, after = _around(section)
        return "".join(f"{section.label_prompt.format(text=one.text)}{gap}{one.label}{after}\n\n" for one in shown)


def read(file: str, section: Subjectivity, field: str) -> list[Record]:
    """All records of a file, or of the packaged one.

    Raises:
        ConfigError: the file is missing, or a line of it is no record; the message has the line's number.
    """
    path = PACKAGED_REVIEWS if file == "packaged" else Path(file)
    name = f"task.{field}"
    records = [_record(line, f"{name}={file!r}, line {number}", number, section) for number, line in read_records(path, name)]
    if len({record.id for record in records}) < len(records):
        raise ConfigError(f"{name}={file!r}: two records have the same id; give each its own")
    return records


def _record(line: Any, where: str, number: int, section: Subjectivity) -> Record:
    match line:
        case {"text": str(text), "label": label} if text.strip():
            pass
        case _:
            raise ConfigError(f'{where}: needs {{"text": text, "label": a label or its number}}, the text not empty')
    labels = list(section.labels)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        word = labels[label]
    elif label in labels:
        word = label
    else:
        raise ConfigError(
            f"{where}: label={label!r} is none of task.labels={labels} nor the number of one, from 0; correct one of them"
        )
    if line.get("label_text", word) != word:
        raise ConfigError(
            f"{where}: label={label!r} is {word!r} by task.labels={labels}, but label_text={line['label_text']!r}; "
            "put task.labels into the order of the file's numbers"
        )
    return Record(str(line.get("id", f"line-{number}")), text.strip(), word)


def read_rationales(section: Subjectivity, records: list[Record]) -> dict[str, list[str]]:
    """Record id -> its rationales, as they were drawn: the text between a prompt and the stop.

    Raises:
        ConfigError: the file is missing, a line of it is no sample, the samples are of other records, or a record has none.
    """
    file = str(section.rationales)
    texts = {record.id: record.text for record in records}
    found: dict[str, list[str]] = {name: [] for name in texts}
    for number, line in read_records(Path(file), "task.rationales"):
        match line:
            case {"prompt": str(name), "text": str(rationale), "context": str(context)}:
                pass
            case _:
                raise ConfigError(
                    f'task.rationales={file!r}, line {number}: needs {{"prompt": id, "text": Z, "context": its prompt}}, '
                    "as deploy/evaluate.py writes them"
                )
        if name not in texts:
            continue
        # Ids are line numbers, so a sample of another file's record would pass for one of this file's.
        if texts[name] not in context:
            raise ConfigError(
                f"task.rationales={file!r}, line {number}: {name!r} is another text than in task.records={section.records!r}; "
                "draw rationales for this file with deploy/evaluate.py"
            )
        found[name].append(rationale)
    if missing := [name for name, rationales in found.items() if not rationales]:
        raise ConfigError(
            f"task.rationales={file!r} has none for {len(missing)} of {len(records)} records, such as {missing[0]!r}; "
            "draw them with the same task.offset and task.limit"
        )
    return found
