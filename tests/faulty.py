"""Functions that a user might name in a config, each with a fault of its own on some texts. Imports nothing heavy."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def score(prompt: Any, text: str, tokens: list[int]) -> Any:
    """log R = -len(text), but for texts that hold the name of a fault."""
    if "raise" in text:
        raise ArithmeticError("log of zero")
    if "sleep" in text:
        time.sleep(600)
    if "spin" in text:  # native code that holds the interpreter's lock for ever
        re.fullmatch(r"(a+)+b", "a" * 64)
    if "exit" in text:
        sys.exit(3)
    if "crash" in text:
        os._exit(7)
    if "nan" in text:
        return math.nan
    if "list" in text:
        return [0.0, 0.0]
    return -float(len(text))


def digits(prompt: Any, text: str, tokens: list[int]) -> Any:
    """Of the tiny models' texts: 0, but texts that begin with 1 raise, with 2 hang, with 3 have NaN, with 4 two numbers."""
    if text[:1] == "1":
        raise ArithmeticError("log of zero")
    if text[:1] == "2":
        time.sleep(600)
    if text[:1] == "4":
        return [0.0, 0.0]
    return math.nan if text[:1] == "3" else 0.0


def without_a(prompt: Any, text: str, tokens: list[int]) -> float:
    """Raises for a text with an `a`."""
    if "a" in text:
        raise ArithmeticError("log of zero")
    return 0.0


def never(prompt: Any, text: str, tokens: list[int]) -> float:
    raise ArithmeticError("log of zero")


def shouting(prompt: Any, text: str, tokens: list[int]) -> bool:
    return text.isupper()


def short(prompt: Any, text: str, tokens: list[int]) -> bool:
    """Of no token it cannot say."""
    if not tokens:
        raise ArithmeticError("nothing to count")
    return len(tokens) < 3


def process_id(prompt: Any, text: str, tokens: list[int]) -> int:
    return os.getpid()


def slow(prompt: Any, text: str, tokens: list[int]) -> float:
    """Takes its time, so that there is a run to interrupt."""
    time.sleep(0.01)
    return -0.5 * abs(len(text) - 3)


def leaves_a_child(prompt: Any, text: str, tokens: list[int]) -> None:
    """Waits for a program that hangs, whose process id is written to the file that the text names."""
    child = subprocess.Popen(["sleep", "600"])
    Path(text).write_text(str(child.pid))
    child.wait()


def always(prompt: Any, text: str, tokens: list[int]) -> float:
    raise ArithmeticError("log of zero")


def length(prompt: Any, text: str, tokens: list[int]) -> int:
    return len(tokens)


def in_company(prompt: Any, text: str, tokens: list[int]) -> float:
    """Processes of this function that are at work, itself among them."""
    mine = Path(prompt.meta["folder"]) / str(os.getpid())
    mine.touch()
    time.sleep(0.1)
    found = len(list(mine.parent.iterdir()))
    mine.unlink()
    return float(found)
