"""Prompts from text and JSONL files. Errors name the config's field, the line and what it needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from system.config import ConfigError

T = TypeVar("T")


def read_lines(path: Path, field: str) -> list[tuple[int, str]]:
    """(number from 1, text) of the lines that are not empty. Raises ConfigError if the file is missing or not UTF-8."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}={str(path)!r} is not UTF-8 (byte {error.start}); convert it") from error
    except OSError as error:
        raise ConfigError(f"{field}={str(path)!r} cannot be read: {error.strerror}; name a file") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def read_records(path: Path, field: str) -> list[tuple[int, Any]]:
    """(line, value) of a JSONL file; (number from 1, value) of a .json file with a list.

    Raises:
        ConfigError: as `read_lines`, for a line that is no JSON, or a .json file that is no list.
    """
    if path.suffix == ".json":
        text = "\n".join(line for _, line in read_lines(path, field))
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{field}={str(path)!r}: no JSON ({error.msg}, line {error.lineno})") from error
        if not isinstance(values, list):
            raise ConfigError(f"{field}={str(path)!r}: holds a {type(values).__name__}; it needs a list")
        return list(enumerate(values, 1))
    records = []
    for number, line in read_lines(path, field):
        try:
            records.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{field}={str(path)!r}, line {number}: no JSON ({error.msg})") from error
    return records


def choose(items: Sequence[T], offset: int, limit: int | None, field: str, value: str) -> list[T]:
    """The items that `task.offset` and `task.limit` leave. Raises ConfigError if there are none."""
    chosen = list(items[offset:][:limit])
    if not chosen:
        raise ConfigError(
            f"{field}={value!r} has {len(items)} prompts, none of them after task.offset={offset}; "
            "lower the offset or name another file"
        )
    return chosen
