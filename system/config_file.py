"""Reading a config: a YAML file gives the values, `key=value` on the command line overrides them.

Every mistake becomes a ConfigError that names the field, the value and the fix.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from system.config import NAME, Config, ConfigError
from system.learner_config import DEVICE, Loss
from system.reward_config import FUNCTION_PATH, Factor, Reward
from system.task_config import TRIMMED, Task


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["actors.count=2", "loss.kind=subtb"]` as a nested dict; a value is read as YAML.

    Raises:
        ConfigError: an entry without `=` or with an empty key, a value that is not YAML, or a field of a plain value.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            raise ConfigError(f"override {override!r} is not of the form key=value, such as actors.count=2")
        node = tree
        for name in names[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {name!r} was already set to a plain value; leave one of the two out")
        try:
            node[names[-1]] = yaml.safe_load(value)
        # ValueError: a date that is none, such as 2001-13-01.
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"override {override!r}: the value is not YAML ({_where(error)}); put it in quotes") from error
    return tree


def _merged(own: dict[str, Any], base: dict[str, Any], over: dict[str, Any], field: str = "") -> dict[str, Any]:
    """`over` laid on `base`, which is what the file has of its `own` and the defaults. A section whose kind changes starts
    afresh: the old kind's fields mean nothing to it. So does one whose kind is named, but for what the file has of that kind: a
    default section, of a task's own reward say, is not what is meant then. Numbers for keys are those of a list's entries.

    Raises:
        ConfigError: there is no such entry.
    """
    result = dict(base)
    for key, value in over.items():
        old, mine, name = result.get(key), own.get(key), f"{field}{key}"
        numbered = isinstance(value, dict) and value and all(str(number).isdecimal() for number in value)
        if isinstance(old, list) and numbered:
            entries = {str(number): entry for number, entry in enumerate(old)}
            if unknown := [number for number in value if number not in entries]:
                raise ConfigError(
                    f"override {name}.{unknown[0]}: {name} has {len(old)} entries, of which the first is 0; name one of them, "
                    "or set the whole list"
                )
            of_file = {str(number): entry for number, entry in enumerate(mine)} if isinstance(mine, list) else {}
            result[key] = list(_merged(of_file, entries, value, f"{name}.").values())
        elif isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            mine = mine if isinstance(mine, dict) else {}
            result[key] = _merged(mine, mine if "kind" in value else old, value, f"{name}.")
        else:
            result[key] = value
    return result


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """What may stand at a field of this type, however deep in it."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _completed(annotation: Any, node: Any) -> Any:
    """What stands at a field of this type, with the defaults of what is left out; as it is where it is no section of a kind."""
    if isinstance(node, list):
        return [_completed(annotation, entry) if isinstance(entry, dict) else entry for entry in node]
    if (section := _section(annotation, node)) is None:
        return node
    return node | {
        name: _completed(field.annotation, node[name] if name in node else _default(field))
        for name, field in section.model_fields.items()
        if name in node or not field.is_required()
    }


def _section(annotation: Any, node: Any) -> type[BaseModel] | None:
    """What `node` means at a field of this type; None where it is no section, or of no kind that there is."""
    sections = _sections(annotation) if isinstance(node, dict) else []
    if len(sections) > 1:
        sections = [section for section in sections if _kind(section) == node.get("kind")]
    return sections[0] if sections else None


def _kind(section: type[BaseModel]) -> str:
    return section.model_fields["kind"].default


def _default(field: FieldInfo) -> Any:
    """As YAML says it."""
    return TypeAdapter(Any).dump_python(field.get_default(call_default_factory=True), mode="json")


class _UniqueKeys(yaml.SafeLoader):
    """A section that is written twice is an error: YAML itself would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is set twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _where(error: Exception) -> str:
    """What is wrong with a YAML text and where, on one line."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + (getattr(error, "problem", None) or str(error).splitlines()[0])


MESSAGES = {
    "missing": "must be set",
    "model_type": "must be a section, a mapping of fields; leave it out for the defaults",
    "model_attributes_type": "must be a section, a mapping of fields with a kind",
    "string_type": "must be a text; put it in quotes",
    "tuple_type": "must be a list, such as [a, b]",
}
"""By pydantic's type of error, where its own message does not say what to do."""
PATTERNS = {
    NAME: "must be of letters, digits, `_`, `.` and `-`, with a letter or digit first",
    FUNCTION_PATH: "must be module:function, such as my_rewards:score (without .py, and with dots between folders)",
    DEVICE: "must be auto, cpu, cuda, or one GPU, such as cuda:0",
    TRIMMED: "must be a text that is not empty, without spaces around it",
}
"""What a text must be, by the expression that says so in a section."""


def _child(node: Any, part: int | str) -> Any:
    """What stands at `part` of a section or a list; None where nothing does."""
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, (list, tuple)) and isinstance(part, int) and part < len(node):
        return node[part]
    return None


def _field(location: Iterable[int | str], tree: Any) -> str:
    """A field as the user writes it: pydantic's location has the kind of a section and the branch of a union as well."""
    names: list[str] = []
    node: Any = tree
    for part in location:
        is_kind = isinstance(node, dict) and part not in node and part == node.get("kind")
        is_branch = isinstance(part, str) and not isinstance(node, dict)
        if not is_kind and not is_branch:
            names.append(str(part))
            node = _child(node, part)
    return ".".join(names)


def _kinds(union: Any) -> str:
    return ", ".join(map(_kind, _sections(union)))


def _meant(field: str, tree: dict[str, Any]) -> str:
    """What a field that there is not may be meant to be."""
    *path, name = field.split(".")
    annotation: Any = Config
    node: Any = tree
    for part in path:
        if (section := _section(annotation, node)) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
        node = _child(node, int(part) if part.isdecimal() else part)
    others = _sections(annotation)
    if kinds := [_kind(other) for other in others if len(others) > 1 and name in other.model_fields]:
        return f"no field of this kind, but of kind={' or '.join(kinds)}; check the kind, or leave the field out"
    section = _section(annotation, node)
    near = get_close_matches(name, section.model_fields if section else ())
    meant = [".".join([*path, match]) for match in near]
    for leaf in leaves(_completed(Config, tree)):
        before, found, _ = f".{leaf}.".partition(f".{name}.")
        if found:
            meant.append(f"{before}.{name}".removeprefix("."))
    meant = [other for other in dict.fromkeys(meant) if other != field]
    hint = f": {' or '.join(meant[:3])}?" if meant else ""
    return f"no such field; check the spelling{hint} (--dry-run prints all fields)"


def _readable(error: ValidationError, tree: dict[str, Any]) -> str:
    """A line for each field that is wrong."""
    said: dict[str, dict[str, None]] = {}
    problems = [(problem, _field(problem["loc"], tree)) for problem in error.errors()]
    for problem, field in problems:
        # A list whose entries are wrong is too short without them, and no other type that it might have been.
        if any(other.startswith(f"{field}.") for _, other in problems):
            continue
        kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
        message = MESSAGES.get(kind, problem["msg"].removeprefix("Value error, "))
        for theirs, ours in (("Input should be", "must be"), ("Tuple should have", "must have"), (" after validation", "")):
            message = message.replace(theirs, ours)
        about_section = isinstance(value, (dict, BaseModel)) and (kind == "value_error" or kind.startswith("union_tag"))
        shown = "" if about_section or kind == "missing" else f"={_short(repr(value))}"
        if kind == "extra_forbidden":
            message = _meant(field, tree)
        elif kind == "string_pattern_mismatch":
            message = PATTERNS[context["pattern"]]
        elif kind == "missing" and isinstance(problem["loc"][-1], int):
            field, shown = field.rpartition(".")[0], f"={_short(repr(value))}"
            message = "must have as many entries as its default (--dry-run prints it)"
        elif field == "model" and isinstance(value, str):
            message = f"must be a section; write model.path={value}"
        elif kind == "union_tag_invalid":
            field, shown = f"{field}.kind", f"={context['tag']!r}"
            message = f"must be one of {context['expected_tags']}"
        elif kind == "union_tag_not_found" or (kind == "missing" and field == "task"):
            union = {"task": Task, "loss": Loss, "task.reward": Reward}.get(field, Factor)
            field, message = f"{field}.kind", f"must be set, to one of {_kinds(union)}"
        said.setdefault(f"{field or 'config'}{shown}", {})[message] = None
    # Of the types that a value might have, each has its say, once.
    return "\n".join(f"{what}: {' or '.join(messages).replace(' or must ', ' or ')}" for what, messages in said.items())


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}…"


def parse(tree: Any) -> Config:
    """A nested dict as a Config. Raises ConfigError, one line for each field that is wrong."""
    if not isinstance(tree, dict):
        raise ConfigError(f"a config is a mapping of sections, not {type(tree).__name__}")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_readable(error, tree)) from error


def load(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, lays the overrides on it, and validates the result.

    Raises:
        ConfigError: the file is missing, not UTF-8 or not YAML, or a value is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(
            f"config {str(path)!r} cannot be read: {error.strerror}; name a YAML file, such as one of deploy/configs"
        ) from error
    try:
        tree = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"config {str(path)!r} is not YAML ({_where(error)}); correct it there") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config {str(path)!r} is a {type(tree).__name__}, but must be a mapping of sections")
    # On the defaults too, as --dry-run prints them: a field of a section that the file leaves out can be overridden alone.
    return parse(_merged(tree, _completed(Config, tree), parse_overrides(overrides)))


def dump(config: Config) -> str:
    """The resolved config as YAML, which `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(config: Config) -> dict[str, Any]:
    """`{"learner.lr": 0.001, ...}`: the leaves of the tree, for a tracker."""
    return leaves(config.model_dump(mode="json"))


def leaves(tree: dict[str, Any]) -> dict[str, Any]:
    """A nested section's values by their dotted names."""

    def below(prefix: str, node: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from below(f"{prefix}.{key}" if prefix else key, value)
        elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
            yield from below(prefix, {str(index): item for index, item in enumerate(node)})
        else:
            yield prefix, node

    return dict(below("", tree))
