"""Tiny models and a byte-level tokenizer that every test can build in milliseconds, without a network.

The tokenizer follows SmolLM2: id 0 <|endoftext|> separates documents, bos <|im_start|>, eos = pad <|im_end|>,
ChatML template, no bos added; then one id per byte, so any text is `len(text.encode())` tokens.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = len(SPECIAL) + 256
"""Size of the tiny tokenizer's vocabulary, and of the models' unless told otherwise."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(folder: str | Path | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 259 ids with a ChatML template; saved to `folder` when one is given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_llama(
    folder: str | Path,
    layers: int = 2,
    hidden: int = 64,
    vocab: int = VOCAB_SIZE,
    seed: int = 0,
    tie: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Save a random Llama (safetensors) and the tiny tokenizer in `folder` and return the folder.

    The weights depend on the arguments only; the caller's random state is left as it was.
    """
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,  # wide enough that predictions differ from token to token
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return Path(folder)
