"""Which dtype a loss is computed in."""

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for any other."""
    return torch.float64 if dtype == torch.float64 else torch.float32
