"""Plain text: every token of the field is trained, and the eos token that ends it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_kd.data.formats._fields import text_field
from ray_kd.data.records import Segment
from ray_kd.data.tokenizer import bos_segments, eos_segment

EXAMPLE: dict[str, Any] = {"text": "A whole text is trained."}
EXAMPLE_TRAINED = ("A whole text is trained.",)


@dataclass
class Config:
    column: str = "text"
    """Field with the text."""


class Format:
    def __init__(self, config: Config) -> None:
        self.config = config

    def segments(self, record: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
        """The text and eos, all trained, after bos where the tokenizer puts one."""
        text = text_field(record, self.config.column)
        return [*bos_segments(tokenizer), Segment(text, is_trained=True), eos_segment(tokenizer)]
