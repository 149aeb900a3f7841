"""Random state of this process as plain tensors, so that a checkpoint restores it without pickle.

torch on the CPU and on the current CUDA device, numpy's global generator, python's `random`. It is per rank: dropout
differs between ranks, and so must what is restored (DeepSpeed's `client_state` keeps only rank 0's at stages 0-2).
"""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ray_kd.checkpoint import CorruptCheckpoint


def rng_state() -> dict[str, torch.Tensor]:
    """`torch_cpu`, `torch_cuda` (where there is one): uint8. `numpy`, `python`: int64 words. `*_gauss`: float64 [1].

    The gauss entries hold the second normal number of a pair that is not handed out yet, NaN for none.
    """
    numpy_state: Any = np.random.get_state(legacy=True)  # noqa: NPY002 (libraries draw from the global generator)
    _, keys, position, has_gauss, gauss = numpy_state
    _, words, python_gauss = random.getstate()
    state = {
        "torch_cpu": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),
        "numpy_gauss": torch.tensor([gauss if has_gauss else math.nan], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if python_gauss is None else python_gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["torch_cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what `rng_state` returned. A CUDA state is left out where there is no CUDA, and the other way round."""
    torch.set_rng_state(state["torch_cpu"])
    *keys, position = state["numpy"].tolist()
    gauss = state["numpy_gauss"].item()
    np.random.set_state(  # noqa: NPY002
        ("MT19937", np.array(keys, dtype=np.uint32), position, int(not math.isnan(gauss)), np.nan_to_num(gauss))
    )
    python_gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(python_gauss) else python_gauss))
    if "torch_cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["torch_cuda"])


def save_rng(state: dict[str, torch.Tensor], folder: Path, rank: int) -> str:
    """Write what `rng_state` returned on this rank into folder; returns the file's name."""
    name = _file_name(rank)
    save_file(state, folder / name)
    return name


def load_rng(folder: Path, rank: int) -> bool:
    """Restore this rank's state. False when the checkpoint has none (it was written by fewer ranks): seed instead."""
    path = folder / _file_name(rank)
    if not path.exists():
        return False
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise CorruptCheckpoint(f"{path}: is no safetensors file ({error})") from error
    set_rng_state(state)
    return True


def _file_name(rank: int) -> str:
    return f"rank{rank:05d}.rng.safetensors"
