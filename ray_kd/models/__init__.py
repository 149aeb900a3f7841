"""Causal language models as the rest of the package sees them; no ray, no deepspeed.

folder.py   is a path or hub id usable, which model is it; atomic folders
load.py     load safely and quietly; compare vocabularies; Liger patches
decoder.py  the decoder without its head, and the head
head_folder.py  the head kept apart from its model
features.py what its layers compute: hidden states and attention maps
layers.py   a student made of the teacher's layers
trainable.py  low-rank adapters, frozen parts
widths.py   ... and narrower: which sizes, and what stays of each weight
importance.py  what the teacher's neurons, heads and channels do
"""

from ray_kd.models.decoder import (
    base_causal_lm,
    check_architecture,
    decoder_hidden,
    decoder_of,
    head_of,
    require_plain_head,
)
from ray_kd.models.features import (
    DecoderOutputs,
    attention_nbytes,
    check_attention_support,
    check_attentions,
    decoder_outputs,
)
from ray_kd.models.folder import (
    atomic_folder,
    check_model,
    is_local,
    licence_of,
    local_folder,
    model_identity,
    read_config,
)
from ray_kd.models.head_folder import HeadShape, head_shape, load_head, save_head
from ray_kd.models.importance import Importance, width_importance
from ray_kd.models.layers import (
    block_influence,
    check_layers,
    choose_layers,
    config_of_init,
    config_of_layers,
    init_from_layers,
)
from ray_kd.models.load import (
    DTYPES,
    apply_liger,
    compare_vocabularies,
    load_causal_lm,
    load_tokenizer,
    num_token_ids,
    quiet,
    shared_vocab_size,
    torch_dtype,
)
from ray_kd.models.trainable import (
    adapter_state,
    check_trainable,
    choose_trainable,
    load_trained,
    merge_adapters,
    save_adapter,
)
from ray_kd.models.widths import Kept, Widths, asked_widths, check_widths, choose_widths

__all__ = [
    "DTYPES",
    "DecoderOutputs",
    "HeadShape",
    "Importance",
    "Kept",
    "Widths",
    "adapter_state",
    "apply_liger",
    "asked_widths",
    "atomic_folder",
    "attention_nbytes",
    "base_causal_lm",
    "block_influence",
    "check_architecture",
    "check_attention_support",
    "check_attentions",
    "check_layers",
    "check_model",
    "check_trainable",
    "check_widths",
    "choose_layers",
    "choose_trainable",
    "choose_widths",
    "compare_vocabularies",
    "config_of_init",
    "config_of_layers",
    "decoder_hidden",
    "decoder_of",
    "decoder_outputs",
    "head_of",
    "head_shape",
    "init_from_layers",
    "is_local",
    "licence_of",
    "load_causal_lm",
    "load_head",
    "load_tokenizer",
    "load_trained",
    "local_folder",
    "merge_adapters",
    "model_identity",
    "num_token_ids",
    "quiet",
    "read_config",
    "require_plain_head",
    "save_adapter",
    "save_head",
    "shared_vocab_size",
    "torch_dtype",
    "width_importance",
]
