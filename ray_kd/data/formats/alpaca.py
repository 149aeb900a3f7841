"""Alpaca records {instruction, input, output}: one chat exchange, or plain ### Instruction / ### Response text.

Plain template: https://github.com/tatsu-lab/stanford_alpaca
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_kd.data.chat import chat_segments, require_template
from ray_kd.data.formats._fields import optional_text, text_field
from ray_kd.data.records import Segment
from ray_kd.data.tokenizer import bos_segments, eos_segment
from ray_kd.errors import ConfigError

STYLES = ("auto", "chat", "plain")

EXAMPLE: dict[str, Any] = {"instruction": "Add the numbers.", "input": "2 and 2", "output": "The sum is 4."}
EXAMPLE_TRAINED = ("The sum is 4.",)


@dataclass
class Config:
    instruction: str = "instruction"
    """Field with the instruction."""
    input: str = "input"
    """Field with the input; it may be absent or empty."""
    output: str = "output"
    """Field with the answer, the only text that is trained."""
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
        """Instruction and input as the prompt, the output trained."""
        instruction = text_field(record, self.config.instruction)
        output = text_field(record, self.config.output)
        context = optional_text(record, self.config.input)
        system = optional_text(record, self.config.system)
        if self.config.style == "chat" or (self.config.style == "auto" and tokenizer.chat_template):
            require_template(tokenizer, "set data.format.style=plain")
            user = f"{instruction}\n\n{context}" if context.strip() else instruction
            turns = [("system", system)] if system.strip() else []
            turns += [("user", user), ("assistant", output)]
            return chat_segments([{"role": role, "content": text} for role, text in turns], tokenizer)
        prompt = f"{system}\n\n" if system.strip() else ""
        prompt += f"### Instruction:\n{instruction}\n\n"
        if context.strip():
            prompt += f"### Input:\n{context}\n\n"
        return [
            *bos_segments(tokenizer),
            Segment(f"{prompt}### Response:\n", is_trained=False),
            Segment(output, is_trained=True),
            eos_segment(tokenizer),
        ]
