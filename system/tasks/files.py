"""Prompts from text and JSONL files. Errors name the config's field, the line and what it needs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from system.config import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def _read_text(path: Path, field: str) -> str:
    """Raises ConfigError if the file is missing, empty or not UTF-8."""
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}={str(path)!r} is not UTF-8 (byte {error.start}); convert it") from error
    except OSError as error:
        raise ConfigError(f"{field}={str(path)!r} cannot be read: {error.strerror}; name a file") from error
    if not text.strip():
        raise ConfigError(f"{field}={str(path)!r} is empty; name a file with one entry a line")
    return text


def read_lines(path: Path, field: str) -> list[tuple[int, str]]:
    """(number from 1, text) of the lines that are not empty. Raises ConfigError if the file is missing, empty or not UTF-8."""
    # Not splitlines: that also ends a line at characters which editors show, and JSON allows, inside one.
    lines = _read_text(path, field).split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def distinct(
    items: Sequence[tuple[int, T]], field: str, value: str, key: Callable[[T], Hashable] = lambda item: item
) -> list[tuple[int, T]]:
    """The first of items with equal keys, with its number. Tolerated on purpose, and counted in the log."""
    first: dict[Hashable, tuple[int, T]] = {}
    repeated = []
    for number, item in items:
        known, _ = first.setdefault(key(item), (number, item))
        if known != number:
            repeated.append((number, known))
    if repeated:
        message = "%s=%r: %d entries are left out that repeat an earlier one; the first is %d, which repeats %d"
        logger.warning(message, field, value, len(repeated), *repeated[0])
    return list(first.values())


def joined(
    items: Sequence[tuple[int, dict[str, Any]]], key: Callable[[dict[str, Any]], Hashable]
) -> list[tuple[int, dict[str, Any]]]:
    """Records of equal keys that each have a "completion", or "completions", as the first of them with all of these."""
    first: dict[Hashable, dict[str, Any]] = {}
    result = []
    for number, record in items:
        if not isinstance(more := _completions(record), list):
            result.append((number, record))
        elif (known := first.get(key(record))) is not None:
            known["completions"] = [*known["completions"], *more]
        else:
            first[key(record)] = kept = {name: value for name, value in record.items() if name != "completion"} | {
                "completions": more
            }
            result.append((number, kept))
    return result


def _completions(record: dict[str, Any]) -> Any:
    return [record["completion"]] if "completion" in record else record.get("completions")


def read_records(path: Path, field: str) -> list[tuple[int, Any]]:
    """(line, value) of a JSONL file; (number from 1, value) of a .json file with a list.

    Raises:
        ConfigError: as `read_lines`, for a line that is no JSON, or a .json file that is no list.
    """
    if path.suffix == ".json":
        try:
            values = json.loads(_read_text(path, field))
        except json.JSONDecodeError as error:
            lines = "; a file with a record in each line is called .jsonl" if error.msg == "Extra data" else ""
            raise ConfigError(f"{field}={str(path)!r}: no JSON ({error.msg}, line {error.lineno}){lines}") from error
        if not isinstance(values, list):
            raise ConfigError(f"{field}={str(path)!r}: holds a {type(values).__name__}; it needs a list")
        return list(enumerate(values, 1))
    records = []
    for number, line in read_lines(path, field):
        try:
            records.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            text = "; a file with a prompt in each line is called .txt" if field == "task.prompts" else ""
            raise ConfigError(
                f"{field}={str(path)!r}, line {number}: no JSON ({error.msg}); write one record a line{text}"
            ) from error
    return records


def choose(items: Sequence[T], offset: int, limit: int | None, field: str, value: str) -> list[T]:
    """The items that `task.offset` and `task.limit` leave. Raises ConfigError if there are none."""
    chosen = list(items[offset:][:limit])
    if not chosen:
        raise ConfigError(
            f"{field}={value!r} has {len(items)} prompts, none of them after task.offset={offset}; "
            "lower the offset or name another file"
        )
    if len(chosen) < len(items):
        logger.info("%s=%r: %d of its %d entries are taken (task.offset, task.limit)", field, value, len(chosen), len(items))
    return chosen
