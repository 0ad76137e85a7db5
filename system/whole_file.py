"""A text file that is whole, or as it was: written beside it first, so that neither a kill nor a full disk leaves a part."""

from __future__ import annotations

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """As `Path.write_text` in UTF-8. Raises OSError where it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
