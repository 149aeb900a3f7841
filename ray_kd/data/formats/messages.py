"""Conversations as [{role, content}, ...] through the tokenizer's chat template; assistant turns are trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_kd.data.chat import chat_segments, check_messages, require_template
from ray_kd.data.records import Segment
from ray_kd.errors import ConfigError

TRAIN_ON = ("assistant", "all")

EXAMPLE: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four."},
    ]
}
EXAMPLE_TRAINED = ("Hello!", "Four.")


@dataclass
class Config:
    column: str = "messages"
    """Field with the list of messages."""
    tools: str = "tools"
    """Field with the tools that the template is given, where a record has one."""
    train_on: str = "assistant"
    """What is trained: assistant (their turns and end-of-turn tokens) | all (the template's tokens too)."""


class Format:
    def __init__(self, config: Config) -> None:
        if config.train_on not in TRAIN_ON:
            raise ConfigError(f"data.format.train_on is '{config.train_on}': allowed is {' | '.join(TRAIN_ON)}")
        self.config = config

    def segments(self, record: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
        """The rendered conversation, cut at the assistant turns."""
        require_template(tokenizer, "use data.format.kind=text or prompt_completion")
        if self.config.column not in record:
            raise ValueError(f"field '{self.config.column}' is missing")
        messages = check_messages(record[self.config.column])
        return chat_segments(messages, tokenizer, self.config.train_on, record.get(self.config.tools) or None)
