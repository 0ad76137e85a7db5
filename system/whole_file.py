"""What is whole, or as it was: written beside it first, so that neither a kill nor a full disk leaves a part in its place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def replace_text(path: Path, text: str) -> None:
    """As `Path.write_text` in UTF-8. Raises OSError where it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` if the block ends without an error; else nothing is left of it.

    Raises OSError where it cannot be written, or `folder` holds something.
    """
    # Another process or thread may be writing the same.
    part = folder.with_name(f"{folder.name}.part-{uuid4().hex}")
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
