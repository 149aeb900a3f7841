"""Every format on disk: its example's trained tokens are exactly the texts it says, and other records are refused."""

import pytest

from ray_kd import plugins
from ray_kd.data.packing import has_target
from ray_kd.data.records import Segment
from ray_kd.data.tokenizer import check_unicode, encode
from tests.tiny import tiny_tokenizer

KINDS = plugins.available("data.formats")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def build(kind, **options):
    module, config = plugins.options("data.formats", {"kind": kind, **options}, "data.format")
    return module, module.Format(config)


def test_the_formats_of_the_design_are_found():
    assert {"text", "messages", "prompt_completion", "alpaca", "sharegpt"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_trains_its_texts_with_their_ends_and_nothing_else(kind, tokenizer):
    module, form = build(kind)
    segments = form.segments(module.EXAMPLE, tokenizer)
    assert all(isinstance(segment, Segment) for segment in segments)
    check_unicode(segments)
    [document] = encode([segments], tokenizer)
    trained = tokenizer.decode(document.input_ids[document.is_trained])
    assert trained == "".join(text + tokenizer.eos_token for text in module.EXAMPLE_TRAINED)
    assert has_target(document)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_text_without_special_tokens(kind, tokenizer):
    module, form = build(kind)
    segments = form.segments(module.EXAMPLE, tokenizer)
    [document] = encode([segments], tokenizer)
    plain = tokenizer.decode(document.input_ids, skip_special_tokens=True)
    assert document.nbytes.sum() == len(plain.encode())
    assert document.nbytes[document.is_trained].sum() == len("".join(module.EXAMPLE_TRAINED).encode())


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_text_is_tokenised_as_it_would_be_at_inference(kind, tokenizer):
    module, form = build(kind)
    segments = form.segments(module.EXAMPLE, tokenizer)
    [document] = encode([segments], tokenizer)
    text = "".join(segment.text for segment in segments)
    assert document.input_ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_records_without_the_fields_are_refused_with_one_line(kind, tokenizer):
    module, form = build(kind)
    for record in ({}, {"unrelated": "x"}, dict.fromkeys(module.EXAMPLE), dict.fromkeys(module.EXAMPLE, 3),
                   dict.fromkeys(module.EXAMPLE, "  "), {name: [] for name in module.EXAMPLE}):  # fmt: skip
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            form.segments(record, tokenizer)
