"""Every field of the config, by the schema that pydantic makes of it: each wrong value is refused by field, value and fix."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from system.config import Config, ConfigError
from system.config_file import parse

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = Config.model_json_schema()
TEXT, MISSPELT = "no such value", "no_such_field"
REQUIRED = {"path": "package.module:name"}
"""Fields without a default, besides kinds and sections."""
NEEDED = {"constrained": {"keywords": ["sea"]}, "product": {"of": [{"kind": "lm_posterior"}, {"kind": "lm_posterior"}]}}
"""What a section of this kind needs to be right as a whole."""


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    return SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def branches(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [resolved(branch) for branch in schema.get("anyOf") or schema.get("oneOf") or [schema]]


def smallest(section: dict[str, Any]) -> dict[str, Any]:
    """A tree that is right for a section of this schema."""
    properties = section["properties"]
    tree = {"kind": properties["kind"]["const"]} if "kind" in properties else {}
    return (
        tree
        | {name: REQUIRED[name] for name in section.get("required", ()) if name in REQUIRED}
        | NEEDED.get(tree.get("kind", ""), {})
    )


def fields(section: dict[str, Any], tree: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """(path, schema, whole tree that is right) of every field, those of every kind of a section among them."""
    for name, schema in section["properties"].items():
        at = (*path, name)
        yield at, schema, tree
        for branch in branches(schema):
            if "properties" in branch:
                yield from fields(branch, placed(tree, at, smallest(branch)), at)
            for entry in branches(branch.get("items", {})):
                if "properties" in entry:
                    yield from fields(entry, placed(tree, at, [smallest(entry)] * 2), (*at, "0"))


def placed(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    node: Any = tree
    for name in path[:-1]:
        node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
    node[path[-1]] = value
    return tree


def wrong(schema: dict[str, Any]) -> Iterator[Any]:
    """Values that no branch of a field's schema takes: of other types, beyond each bound, without what is asked for."""
    found = branches(schema)
    types = {branch.get("type", "string" if "enum" in branch or "const" in branch else "object") for branch in found}
    if "null" not in types:
        yield None
    yield from ([[TEXT]], {MISSPELT: 1}) if "array" not in types and "object" not in types else ()
    if types & {"integer", "number"}:
        yield from (TEXT, math.nan, math.inf, -math.inf, True)
    if "integer" in types:
        yield 1.5
    if types <= {"boolean"}:
        yield from (TEXT, 7)
    if types <= {"array", "null"}:
        yield from (TEXT, 7)
    if types <= {"object"}:
        yield from (TEXT, 7, [1])
    if types <= {"string", "null"}:
        yield 7
    for branch in found:
        if "enum" in branch or "const" in branch:
            yield TEXT
        if "pattern" in branch:
            yield "no/such value!"
        if branch.get("minLength"):
            yield ""
        if branch.get("minItems") and "prefixItems" not in branch:
            yield []
        if "prefixItems" in branch:
            yield from ([1.0], [1.0, 1.0, 1.0], [TEXT, 1.0])
        for bound, beyond in (("minimum", -1), ("exclusiveMinimum", 0), ("maximum", 1), ("exclusiveMaximum", 0)):
            if bound in branch:
                yield branch[bound] + beyond


def cases() -> Iterator[tuple[tuple[str, ...], Any, dict[str, Any]]]:
    """(field, wrong value, whole tree)."""
    for path, schema, tree in fields(SCHEMA, {"task": {"kind": "random_number"}}, ()):
        distinct = {repr(value): value for value in wrong(schema)}
        for value in distinct.values():
            yield path, value, placed(tree, path, value)
        for branch in branches(schema):
            if "properties" in branch:
                yield (*path, MISSPELT), 1, placed(tree, path, smallest(branch) | {MISSPELT: 1})


def contradictions() -> Iterator[tuple[list[str], dict[str, Any]]]:
    """(what the message must have, whole tree): values that are right alone and wrong together."""
    function = {"kind": "function"} | REQUIRED
    for branch in branches(SCHEMA["properties"]["task"]):
        task = smallest(branch)
        for kind in ("db", "subtb", "tb"):
            yield (
                [f"loss.kind={kind}", "task.reward.kind=function", "use"],
                {"task": task | {"reward": function}, "loss": {"kind": kind}},
            )
        if {"min_tokens", "max_tokens"} <= branch["properties"].keys():
            for longest in (1, 7):
                yield (
                    ["min_tokens=8", f"max_tokens={longest}", "lower"],
                    {"task": task | {"min_tokens": 8, "max_tokens": longest}},
                )
    for branch in branches(SCHEMA["properties"]["loss"]):
        kind = branch["properties"]["kind"]["const"]
        loss = {"task": {"kind": "random_number"}, "loss": {"kind": kind}}
        if kind in ("grpo", "ppo", "rloo", "mle"):
            yield [f"loss.kind={kind}", "replay", "set"], loss | {"replay": {"fresh": 0.5, "uniform": 0.5}}
        if kind in ("grpo", "ppo", "rloo"):
            yield [f"loss.kind={kind}", "sampler.exploration.on_policy=0.5", "set"], loss


def test_every_wrong_value_of_every_field_is_refused_by_field_value_and_fix() -> None:
    found = list(cases())
    assert len(found) > 1000
    problems = []
    for path, value, tree in found:
        try:
            parse(tree)
            problems.append(f"{path}={value!r} is taken")
        except ConfigError as error:
            if not any(names(line, path, value) for line in str(error).splitlines()):
                problems.append(f"{path}={value!r}: {error}")
    assert problems == []


def names(line: str, path: tuple[str, ...], value: Any) -> bool:
    """`field=value: fix`, or `section: name=value is … fix`, or of one entry of a list."""
    field, fix = ".".join(path), r".*\b(must|should|check|give)\b.*"
    values = "|".join(re.escape(text) for text in (repr(value), repr(str(value))))
    whole = rf"{re.escape(field)}=({values}): {fix}"
    inside = rf"{re.escape('.'.join(path[:-1]) or 'config')}: {path[-1]}={re.escape(str(value))} {fix}"
    entry = rf"{re.escape(field)}\.\d+(=.*)?: {fix}"
    return any(re.fullmatch(pattern, line) for pattern in (whole, inside, entry))


def test_the_cases_leave_out_no_field_of_no_section() -> None:
    covered = {path for path, _, _ in cases()}
    sections = [section for section in SCHEMA["$defs"].values() if "properties" in section]
    assert {name for section in [SCHEMA, *sections] for name in section["properties"]} <= {path[-1] for path in covered}
    top_level = [
        (name, inner)
        for name, schema in SCHEMA["properties"].items()
        for b in branches(schema)
        for inner in b.get("properties", ())
    ]
    assert set(top_level) <= covered


def test_what_contradicts_is_refused_with_both_sides_and_a_fix() -> None:
    found = list(contradictions())
    assert len(found) >= 30
    for pieces, tree in found:
        with pytest.raises(ConfigError) as caught:
            parse(tree)
        assert all(piece in str(caught.value) for piece in pieces), (tree, str(caught.value))


def test_the_job_refuses_before_anything_starts(tmp_path: Path) -> None:
    """Some of the cases at the command line: exit code 2, no run folder, and nothing heavy was even imported."""
    (tmp_path / "config.yaml").write_text("task: {kind: random_number}\n")
    program = (
        "import json, sys; from deploy.job import main\n"
        "codes = [main(['config.yaml', override]) for override in json.loads(sys.argv[1])]\n"
        "heavy = sorted({'torch', 'ray', 'vllm', 'mlflow', 'transformers'} & sys.modules.keys())\n"
        "print(json.dumps([codes, heavy]))"
    )
    flat = [(path, value) for path, value, _ in cases() if path[0] not in ("task", "loss") and not isinstance(value, float)]
    overrides = [f"{'.'.join(path)}={json.dumps(value)}" for path, value in flat[::10]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(overrides)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [[2] * len(overrides), []]
    assert len(overrides) > 30
    assert done.stderr.count("config error: ") == len(overrides)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
