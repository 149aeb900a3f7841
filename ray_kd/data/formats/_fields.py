"""Fields of a record, taken with a reason when they are absent."""

from collections.abc import Mapping
from typing import Any


def text_field(record: Mapping[str, Any], column: str) -> str:
    """The text of a field. Raises ValueError when it is absent, no text, or blank."""
    text = optional_text(record, column)
    if not text.strip():
        raise ValueError(f"field '{column}' is {'empty' if column in record else 'missing'}")
    return text


def optional_text(record: Mapping[str, Any], column: str) -> str:
    """The text of a field, "" when it is absent or null. Raises ValueError when it is something else."""
    value = record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"field '{column}' is not text but {type(value).__name__}")
    return value
