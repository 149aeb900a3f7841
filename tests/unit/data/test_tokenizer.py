"""Tokens, labels and bytes of segments; what identifies a tokenizer."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ray_kd.data.records import Segment
from ray_kd.data.tokenizer import (
    bos_segments,
    check_unicode,
    encode,
    eos_segment,
    load_tokenizer,
    pad_id,
    tokenizer_identity,
)
from ray_kd.errors import ConfigError
from tests.tiny import tiny_tokenizer


def metaspace_tokenizer():
    """A tokenizer that, as SentencePiece does, starts a text with a space of its own."""
    vocabulary = {"<unk>": 0, "<s>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5, "▁b": 6}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def encoded(tokenizer, *segments):
    [document] = encode([[Segment(text, is_trained) for text, is_trained in segments]], tokenizer)
    return document


def test_characters_of_several_tokens_count_their_bytes_once():
    document = encoded(tiny_tokenizer(), ("aö", False), ("€𝄞<|im_end|>", True))
    assert document.nbytes.sum() == 1 + 2 + 3 + 4
    assert document.nbytes[document.is_trained].sum() == 3 + 4
    assert document.is_trained.tolist() == [False] * 3 + [True] * 8
    assert (document.input_ids.dtype, document.is_trained.dtype, document.nbytes.dtype) == (
        np.int32,
        np.bool_,
        np.int32,
    )


def test_a_document_is_not_tokenised_segment_by_segment():
    document = encoded(metaspace_tokenizer(), ("a", False), ("b", True), (" a", False), (" b", True))
    assert document.input_ids.tolist() == [5, 4, 5, 6]
    assert document.is_trained.tolist() == [False, True, False, True]
    assert document.nbytes.tolist() == [1, 1, 2, 2]


def test_a_token_over_the_border_is_trained():
    document = encoded(metaspace_tokenizer(), ("a ", False), ("b", True))
    assert document.input_ids.tolist() == [5, 6]
    assert document.is_trained.tolist() == [False, True]


def test_no_documents():
    assert encode([], tiny_tokenizer()) == []


def test_lone_surrogates_are_refused():
    check_unicode([Segment("fine 𝄞", True)])
    with pytest.raises(ValueError, match="surrogate"):
        check_unicode([Segment("fine", True), Segment(json.loads('"\\ud800"'), True)])


def test_bos_where_the_tokenizer_adds_one():
    assert bos_segments(tiny_tokenizer()) == ()
    tokenizer = metaspace_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert bos_segments(tokenizer) == (Segment("<s>", is_trained=False),)


def test_eos_is_needed_and_pad_is_not():
    tokenizer = metaspace_tokenizer()
    with pytest.raises(ConfigError, match="no eos_token"):
        eos_segment(tokenizer)
    assert pad_id(tokenizer) == 0
    assert pad_id(tiny_tokenizer()) == 2


def test_the_identity_changes_with_the_template_and_not_with_the_place(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "one")
    tiny_tokenizer(tmp_path / "two")
    first = tokenizer_identity(str(tmp_path / "one"), None)
    assert tokenizer_identity(str(tmp_path / "two"), None) == first
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(tmp_path / "two")
    assert tokenizer_identity(str(tmp_path / "two"), None) != first


def test_folders_without_a_tokenizer_are_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        tokenizer_identity(str(tmp_path), None)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path), None)
