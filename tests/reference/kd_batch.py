"""Random inputs of the distillation loss, drawn the same for the fast path and its slow twin."""

import torch
from torch import Tensor

from ray_kd import plugins

_GROUP = "losses.divergences"


def kinds(of_logits: bool = False) -> list[str]:
    """The divergences on disk between probabilities, or those between logits."""
    return [
        kind
        for kind in plugins.available(_GROUP)
        if getattr(plugins.load(_GROUP, kind).Config, "compares_logits", False) == of_logits
    ]


def draw(
    num_tokens=7,
    width=5,
    vocab_size=19,
    top_k=4,
    temperature=1.0,
    with_bias=False,
    with_ignored=False,
    with_empty=False,
    dtype=torch.float64,
    seed=0,
) -> dict[str, Tensor | None]:
    """Keyword arguments of the loss.

    The teacher is a random distribution at `temperature` whose tail is well above 1e-7.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher = torch.log_softmax(normal(num_tokens, vocab_size) / temperature, -1).topk(top_k)
    ids, logprobs = teacher.indices, teacher.values
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    # Both cases of the label: one of the teacher's tokens, and none of them.
    labels[::2] = ids[::2, 1]
    if with_ignored:
        labels[[0, 3]] = -100
    if with_empty:
        # By id, by log-probability, the first slot of a row (id 0 must stay untouched), and a whole row.
        ids[1, 2] = -1
        logprobs[2, 3] = -float("inf")
        ids[4, 0] = -1
        ids[5] = -1
        logprobs[5] = -float("inf")
        ids[6] = torch.tensor([-1, 0, *range(1, top_k - 1)])
    return {
        "hidden": normal(num_tokens, width).to(dtype),
        "lm_head_weight": normal(vocab_size, width).to(dtype),
        "lm_head_bias": normal(vocab_size).to(dtype) if with_bias else None,
        "teacher_ids": ids,
        "teacher_logprobs": logprobs if dtype == torch.float64 else logprobs.float(),
        "labels": labels,
    }


def with_grads(batch: dict[str, Tensor | None], frozen_head: bool = False) -> dict[str, Tensor | None]:
    """Fresh leaves for hidden states and, unless frozen, the head."""
    trained = ["hidden"] if frozen_head else ["hidden", "lm_head_weight", "lm_head_bias"]
    return {
        name: value.detach().clone().requires_grad_() if name in trained and value is not None else value
        for name, value in batch.items()
    }


def grads_of(batch: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The gradients that a backward left."""
    return {name: batch[name].grad for name in ("hidden", "lm_head_weight", "lm_head_bias") if batch[name] is not None}
