"""What every section of a config is made of. Imports pydantic alone."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class ConfigError(ValueError):
    """The configuration cannot run. The message names the field, the value and the fix."""


class Section(BaseModel):
    """A typo in a key is an error, a section never changes, and the text below a field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yes_is_not_1(cls, values: Any) -> Any:
        """YAML reads `yes` and `on` as true, which pydantic would take for the number 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation is not bool:
                raise ValueError(f"{name}={value} is a truth value; give a number, or put a text in quotes")
        return values
