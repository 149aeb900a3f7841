"""A head kept apart from its model, for who needs the teacher's logits and not the teacher.

A folder of head.safetensors (weight [V, D] in the model's dtype, bias [V] where there is one) and head.json
(vocab_size, width, dtype, softcap, scale), which is written last.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ray_kd import storage
from ray_kd.errors import ConfigError
from ray_kd.head import Head
from ray_kd.models.folder import atomic_folder

WEIGHTS, DESCRIPTION = "head.safetensors", "head.json"


@dataclass(frozen=True)
class HeadShape:
    """What is known of a saved head without loading it."""

    vocab_size: int
    width: int
    dtype: str


def save_head(head: Head, folder: Path) -> HeadShape:
    """Write it there, whole or not at all."""
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    # Clones: a tied weight is a view of memory that is not its own.
    own = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    shape = HeadShape(head.vocab_size, head.width, str(head.weight.dtype).removeprefix("torch."))
    about = asdict(shape) | {"softcap": head.softcap, "scale": head.scale}
    with atomic_folder(folder) as draft:
        save_file(own, draft / WEIGHTS)
        (draft / DESCRIPTION).write_text(json.dumps(about) + "\n", encoding="utf-8")
    return shape


def head_shape(folder: Path) -> HeadShape | None:
    """The shape of the head saved there, None where there is none."""
    path = folder / DESCRIPTION
    if not path.exists():
        return None
    about = json.loads(storage.read_text(path))
    return HeadShape(about["vocab_size"], about["width"], about["dtype"])


def load_head(folder: str, device: torch.device | str = "cpu") -> Head:
    """A saved head, from a path or a URI. Raises ConfigError for one that cannot be read, or is a link."""
    local = storage.fetch(folder, marker=DESCRIPTION)
    weights = local / WEIGHTS
    if weights.is_symlink():
        raise ConfigError(f"'{weights}' is a link: remove '{folder}', and the next start saves the head again")
    about = json.loads((local / DESCRIPTION).read_text(encoding="utf-8"))
    try:
        tensors = load_file(weights, device=str(device))
    except SafetensorError as error:
        raise ConfigError(
            f"'{weights}' is no safetensors file ({error}): remove '{folder}', and the next start saves the head again"
        ) from error
    return Head(tensors["weight"], tensors.get("bias"), about["softcap"], about["scale"])
