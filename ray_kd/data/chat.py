"""A conversation through a tokenizer's chat template, cut where each assistant turn starts and ends.

Templates seldom mark what the assistant says (`{% generation %}`), so the cuts are found, and proved before use:

1. Render the conversation, and once more with a placeholder for each assistant text. When the first rendering is
   exactly the second with the texts put back, everything else is template: two renderings a conversation.
2. Where the template looks into the texts or adds to them (thinking, tool calls), render the prefixes: the turn lies
   between the generation prompt and the rendering up to the turn. Each must be a prefix of the whole.

A conversation for which neither holds is refused, never guessed at.
"""

import functools
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from ray_kd.data.records import Segment
from ray_kd.errors import ConfigError

ROLES = ("system", "developer", "user", "assistant", "tool")

Cut = tuple[int, int]  # characters [start, end) of the rendering that are trained


def require_template(tokenizer: Any, otherwise: str) -> None:
    """Raises ConfigError when the tokenizer has no chat template; `otherwise` names what to use instead."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer of '{tokenizer.name_or_path}' has no chat template: "
            f"add a chat_template.jinja beside it (instruct models have one), or {otherwise}"
        )


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as templates want them, text parts joined. Raises ValueError for what is no conversation."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages are not a list of at least one message")
    return [_check_message(number, message) for number, message in enumerate(messages, start=1)]


def chat_segments(
    messages: Sequence[dict[str, Any]], tokenizer: Any, train_on: str = "assistant", tools: Any = None
) -> list[Segment]:
    """Segments of the rendered conversation.

    train_on: "assistant" trains each assistant turn with its end-of-turn token and without its header, and leaves out
    what follows the last one; "all" trains everything. Raises ValueError when there is no assistant turn, when the
    template refuses the conversation, or when the turns cannot be told from the template.
    """
    conversation = list(messages)
    if train_on == "all":
        return [Segment(_render(conversation, tokenizer, tools), is_trained=True)]
    turns = [index for index, message in enumerate(conversation) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("nothing to train on: no assistant message")
    conversation = conversation[: turns[-1] + 1]
    whole = _render(conversation, tokenizer, tools)
    cuts = _cuts_by_placeholder(conversation, turns, whole, tokenizer, tools)
    if cuts is None:
        cuts = _cuts_by_prefix(conversation, turns, whole, tokenizer, tools)
    segments: list[Segment] = []
    position = 0
    for start, end in cuts:
        segments += [Segment(whole[position:start], is_trained=False), Segment(whole[start:end], is_trained=True)]
        position = end
    return [*segments, Segment(whole[position:], is_trained=False)]


def _cuts_by_placeholder(
    conversation: list[dict[str, Any]], turns: list[int], whole: str, tokenizer: Any, tools: Any
) -> list[Cut] | None:
    if any(set(conversation[index]) - {"role", "content"} for index in turns):
        return None
    # Private-use characters: no template looks for them, and a text that holds one fails the count below.
    placeholders = [f"\ue000{index}\ue001" for index in turns]
    shown = list(conversation)
    for index, placeholder in zip(turns, placeholders, strict=True):
        shown[index] = {"role": "assistant", "content": placeholder}
    rest = _render(shown, tokenizer, tools)
    frame = []  # the template's text before each turn, and after the last
    for placeholder in placeholders:
        if rest.count(placeholder) != 1:
            return None
        before, rest = rest.split(placeholder)
        frame.append(before)
    frame.append(rest)
    cuts = []
    position = 0
    for number, index in enumerate(turns):
        if not whole.startswith(frame[number], position):
            return None
        start = position + len(frame[number])
        content = conversation[index]["content"]
        texts = (content, content.strip(), content.lstrip(), content.rstrip())  # some templates trim
        fits = [t for t in texts if whole.startswith(t, start) and whole.startswith(frame[number + 1], start + len(t))]
        if not fits:
            return None
        position = start + len(fits[0])
        cuts.append((start, position + _turn_end(frame[number + 1], frame[-1], tokenizer)))
    return cuts if position + len(frame[-1]) == len(whole) else None


def _turn_end(after: str, after_last: str, tokenizer: Any) -> int:
    """Characters of the template's text after a turn that end the turn: up to the first special token if it comes
    at once, else what this turn has in common with the last one, after which nothing follows."""
    blank = len(after) - len(after.lstrip())
    special = [token for token in _special_tokens(tokenizer) if after.startswith(token, blank)]
    if special:
        return blank + max(map(len, special))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(after, after_last, strict=False)))


def _cuts_by_prefix(
    conversation: list[dict[str, Any]], turns: list[int], whole: str, tokenizer: Any, tools: Any
) -> list[Cut]:
    cuts: list[Cut] = []
    for index in turns:
        prompt = _render(conversation[:index], tokenizer, tools, add_generation_prompt=True)
        upto = _render(conversation[: index + 1], tokenizer, tools)
        if not (whole.startswith(prompt) and whole.startswith(upto) and len(prompt) < len(upto)):
            raise ValueError(f"the chat template renders message {index + 1} differently with what surrounds it")
        start, end = len(prompt), len(upto)
        # The line break after an end-of-turn token is the template's: the model has stopped by then.
        trimmed = len(upto.rstrip())
        if any(upto.endswith(token, start, trimmed) for token in _special_tokens(tokenizer)):
            end = trimmed
        cuts.append((start, end))
    return cuts


@functools.lru_cache(maxsize=2)
def _special_tokens(tokenizer: Any) -> frozenset[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return frozenset([*added, *tokenizer.all_special_tokens])


def _render(conversation: list[dict[str, Any]], tokenizer: Any, tools: Any, add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            conversation, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError) as error:  # roles out of order, no system role: the template says so
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the chat template refuses the conversation: {reason}") from error
    return str(rendered)


def _check_message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is not an object")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} has role {role!r}, not one of {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if content is None and message.get("tool_calls"):
        return message
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"message {number} ({role}) has no text")
    return {**{key: value for key, value in message.items() if value is not None}, "content": content}
