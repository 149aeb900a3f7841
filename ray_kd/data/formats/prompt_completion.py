"""A prompt and its completion as plain text: the completion and the eos token are trained, the prompt is not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_kd.data.formats._fields import text_field
from ray_kd.data.records import Segment
from ray_kd.data.tokenizer import bos_segments, eos_segment

EXAMPLE: dict[str, Any] = {"prompt": "The capital of France is", "completion": " Paris."}
EXAMPLE_TRAINED = (" Paris.",)


@dataclass
class Config:
    prompt: str = "prompt"
    """Field with the prompt."""
    completion: str = "completion"
    """Field with the completion; it follows the prompt as it stands, so it brings its own space."""


class Format:
    def __init__(self, config: Config) -> None:
        self.config = config

    def segments(self, record: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
        """The prompt, then the completion and eos, trained."""
        prompt = text_field(record, self.config.prompt)
        completion = text_field(record, self.config.completion)
        return [
            *bos_segments(tokenizer),
            Segment(prompt, is_trained=False),
            Segment(completion, is_trained=True),
            eos_segment(tokenizer),
        ]
