"""Greedy answers to a few prompts, to look at beside the numbers."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ray_kd.models import quiet


@torch.no_grad()
def generate_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 64
) -> list[str]:
    """The model's greedy continuation of each prompt, without the prompt and special tokens.

    A prompt is a user's turn of the chat template when the tokenizer has one, else plain text to go on with.
    One prompt at a time; leaves the model's mode as it was. Not under ZeRO-3.
    """
    # Beside the tokenizer's, the model's own: instruct models end turns with more than one token.
    stops: Any = getattr(model.generation_config, "eos_token_id", None)
    eos = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(eos) or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    was_training = model.training
    model.eval()
    answers: list[str] = []
    generator: Any = model  # torch types every attribute of a module as Tensor | Module
    for prompt in prompts:
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        else:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        with quiet():
            output = generator.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answers.append(str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    model.train(was_training)
    return answers
