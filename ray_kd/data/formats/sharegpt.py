"""ShareGPT records {conversations: [{from, value}, ...]}: through the chat template, or plain USER / ASSISTANT text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_kd.data.chat import chat_segments, check_messages, require_template
from ray_kd.data.formats._fields import optional_text
from ray_kd.data.records import Segment
from ray_kd.data.tokenizer import bos_segments, eos_segment
from ray_kd.errors import ConfigError

STYLES = ("auto", "chat", "plain")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

EXAMPLE: dict[str, Any] = {
    "conversations": [
        {"from": "human", "value": "Hello?"},
        {"from": "gpt", "value": "Hello!"},
        {"from": "human", "value": "Two and two?"},
        {"from": "gpt", "value": "Four."},
    ]
}
EXAMPLE_TRAINED = ("Hello!", "Four.")


@dataclass
class Config:
    column: str = "conversations"
    """Field with the list of turns."""
    speaker: str = "from"
    """Key of a turn that names the speaker: human, gpt, system, ..."""
    text: str = "value"
    """Key of a turn with what was said."""
    system: str = "system"
    """Field with a system prompt; it may be absent or empty."""
    style: str = "auto"
    """auto (chat where the tokenizer has a chat template, else plain) | chat | plain."""


class Format:
    def __init__(self, config: Config) -> None:
        if config.style not in STYLES:
            raise ConfigError(f"data.format.style is '{config.style}': allowed is {' | '.join(STYLES)}")
        self.config = config

    def segments(self, record: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
        """The conversation, the assistant's turns trained."""
        messages = self._messages(record)
        if self.config.style == "chat" or (self.config.style == "auto" and tokenizer.chat_template):
            require_template(tokenizer, "set data.format.style=plain")
            return chat_segments(messages, tokenizer)
        if all(message["role"] != "assistant" for message in messages):
            raise ValueError("nothing to train on: no assistant message")
        segments = list(bos_segments(tokenizer))
        for message in messages:
            is_trained = message["role"] == "assistant"
            segments.append(Segment(f"{message['role'].upper()}:", is_trained=False))
            segments.append(Segment(f" {message['content']}", is_trained=is_trained))
            segments.append(eos_segment(tokenizer) if is_trained else Segment("\n", is_trained=False))
        return segments

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self.config.column not in record:
            raise ValueError(f"field '{self.config.column}' is missing")
        turns = record[self.config.column]
        if not isinstance(turns, list):
            raise ValueError(f"field '{self.config.column}' is not a list but {type(turns).__name__}")
        messages = []
        for number, turn in enumerate(turns, start=1):
            if not isinstance(turn, dict):
                raise ValueError(f"turn {number} is not an object")
            speaker = turn.get(self.config.speaker)
            if str(speaker).lower() not in ROLES:
                raise ValueError(f"turn {number} is from {speaker!r}, not one of {', '.join(ROLES)}")
            messages.append({"role": ROLES[str(speaker).lower()], "content": turn.get(self.config.text)})
        system = optional_text(record, self.config.system)
        if system.strip() and (not messages or messages[0]["role"] != "system"):
            messages.insert(0, {"role": "system", "content": system})
        return check_messages(messages)
