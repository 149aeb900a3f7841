"""A process of its own, since DeepSpeed binds itself to one process group: what tiny engines hold, as JSON on stdout.

python engines.py FOLDER -> {"stage dtype": bytes of live tensors between backward and step, ..., "checkpoint": bytes}
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
import transformers

from ray_kd.trainer import zero
from ray_kd.trainer.fragments import copy_fragments, write_fragments

SIZES = {
    "vocab_size": 4000, "hidden_size": 128, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
CASES = ((0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (2, "bfloat16"), (3, "float32"))
LENGTH = 8


def held_nbytes():
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.device.type == "cpu"]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def main(folder):
    address = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(address)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=0, world_size=1)
    zero.import_deepspeed()
    found = {}
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    for stage, dtype in CASES:
        before = held_nbytes()
        options = zero.deepspeed_config(
            zero_stage=stage, micro_batch_size=1, gradient_accumulation_steps=2, dtype=dtype, max_grad_norm=1.0
        )
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **SIZES))
        engine = zero.initialize(model, options, learning_rate=1e-4)
        for _ in range(2):
            for _ in range(2):
                zero.backward(engine, engine(input_ids=ids, labels=ids, use_cache=False).loss, 1)
            found[f"{stage} {dtype}"] = held_nbytes() - before
            zero.step(engine, 1.0)
        if (stage, dtype) == (0, "float32"):
            names = write_fragments(copy_fragments(engine, engine.module, at_once=True), folder)
            found["checkpoint"] = sum((folder / name).stat().st_size for name in names)
        del engine, model
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
