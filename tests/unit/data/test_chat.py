"""Assistant turns are found in any template: marked by special tokens or not, rewriting history or not."""

import pytest

from ray_kd.data.chat import chat_segments, check_messages
from ray_kd.data.formats import alpaca, messages, sharegpt
from ray_kd.data.tokenizer import encode
from ray_kd.errors import ConfigError
from tests.tiny import CHATML, tiny_tokenizer

DIALOGUE = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} <|im_end|>{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
# The last turn gets an empty thought, earlier turns lose theirs.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set said = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n{{ m['content'].split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m['content'] }}\n</think>\n\n{{ said }}{% else %}{{ said }}{% endif %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The end of the last turn is another token than that of earlier ones.
RETURNING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}"
    "{{ '<|endoftext|>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
REFUSING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


def trained(template, conversation, **options):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    segments = chat_segments(conversation, tokenizer, **options)
    kept = "".join(segment.text for segment in segments)
    assert tokenizer.apply_chat_template(conversation, tokenize=False).startswith(kept)
    [document] = encode([segments], tokenizer)
    assert tokenizer.decode(document.input_ids[document.is_trained]) == "".join(
        s.text for s in segments if s.is_trained
    )
    return [segment.text for segment in segments if segment.is_trained]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["First.<|im_end|>", "Second.<|im_end|>"]),
        (LLAMA2, ["First. <|im_end|>", "Second. <|im_end|>"]),
        (PLAIN, ["First.\n\n", "Second.\n\n"]),
        (THINKING, ["First.<|im_end|>", "Second.<|im_end|>"]),
        (RETURNING, ["First.<|im_end|>", "Second.<|endoftext|>"]),
    ],
)
def test_assistant_turns_and_their_ends_are_trained(template, expected):
    assert trained(template, DIALOGUE) == expected


def test_what_follows_the_last_assistant_turn_is_left_out():
    assert trained(CHATML, [*DIALOGUE, {"role": "user", "content": "Three?"}]) == trained(CHATML, DIALOGUE)


def test_a_conversation_may_start_with_the_assistant():
    assert trained(CHATML, DIALOGUE[1:]) == ["First.<|im_end|>", "Second.<|im_end|>"]


def test_the_same_words_said_by_both_are_told_apart():
    echo = [{"role": role, "content": "assistant\nuser"} for role in ("user", "assistant", "user", "assistant")]
    assert trained(CHATML, echo) == ["assistant\nuser<|im_end|>"] * 2


def test_spaces_around_a_text_are_trained_where_the_template_keeps_them():
    spaced = [DIALOGUE[0], {"role": "assistant", "content": "\n First. \n"}]
    assert trained(CHATML, spaced) == ["\n First. \n<|im_end|>"]
    assert trained(LLAMA2, spaced) == ["First. <|im_end|>"]


def test_a_thought_is_trained_where_the_template_shows_it():
    thought = [DIALOGUE[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFirst."}]
    assert trained(THINKING, thought) == ["<think>\nhm\n</think>\n\nFirst.<|im_end|>"]


def test_a_thought_that_the_template_removes_is_refused():
    thought = [DIALOGUE[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFirst."}, *DIALOGUE[2:]]
    with pytest.raises(ValueError, match="renders message 2 differently"):
        trained(THINKING, thought)


def test_tool_calls_are_trained_as_the_template_writes_them():
    template = CHATML.replace("message['content']", "message['content'] or message['tool_calls'][0]['name']")
    calls = [DIALOGUE[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "look_up"}]}]
    assert trained(template, check_messages(calls)) == ["look_up<|im_end|>"]


def test_all_trains_the_template_too():
    rendered = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nFirst.<|im_end|>\n"
    assert trained(CHATML, DIALOGUE[:2], train_on="all") == [rendered]


@pytest.mark.parametrize(
    ("template", "conversation", "reason"),
    [
        (CHATML, DIALOGUE[:1], "no assistant message"),
        (REFUSING, DIALOGUE[1:], "refuses the conversation: roles must alternate"),
    ],
)
def test_conversations_that_cannot_be_trained_on_are_refused(template, conversation, reason):
    with pytest.raises(ValueError, match=reason):
        trained(template, conversation)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("hello", "not a list"),
        ([], "not a list of at least one"),
        (["hello"], "message 1 is not an object"),
        ([{"role": "narrator", "content": "x"}], "message 1 has role 'narrator'"),
        ([{"role": "user", "content": " "}], r"message 1 \(user\) has no text"),
        ([{"role": "user", "content": None}], r"message 1 \(user\) has no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"message 1 \(user\) has no text"),
    ],
)
def test_what_is_no_conversation_is_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        check_messages(given)


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "ab"}]


def test_without_a_template_messages_say_so_and_alpaca_and_sharegpt_are_plain():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        messages.Format(messages.Config()).segments(messages.EXAMPLE, tokenizer)
    with pytest.raises(ConfigError, match=r"data\.format\.style=plain"):
        alpaca.Format(alpaca.Config(style="chat")).segments(alpaca.EXAMPLE, tokenizer)
    plain = alpaca.Format(alpaca.Config()).segments(alpaca.EXAMPLE, tokenizer)
    assert "".join(s.text for s in plain if s.is_trained) == "The sum is 4.<|im_end|>"
    assert "### Input:\n2 and 2\n" in "".join(s.text for s in plain)
    turns = sharegpt.Format(sharegpt.Config()).segments(sharegpt.EXAMPLE, tokenizer)
    assert "".join(s.text for s in turns) == (
        "USER: Hello?\nASSISTANT: Hello!<|im_end|>USER: Two and two?\nASSISTANT: Four.<|im_end|>"
    )


@pytest.mark.parametrize(
    ("module", "options"), [(messages, {"train_on": "user"}), (alpaca, {"style": "x"}), (sharegpt, {"style": "x"})]
)
def test_unknown_options_are_config_errors(module, options):
    with pytest.raises(ConfigError, match=r"data\.format\.\w+ is .*: allowed is"):
        module.Format(module.Config(**options))
