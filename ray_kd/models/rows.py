"""Which tokens of packed rows count when a model is measured on them."""

import numpy as np
from numpy.typing import NDArray


def real_tokens(input_ids: NDArray[np.integer], position_ids: NDArray[np.integer]) -> NDArray[np.bool_]:
    """[n, T]: False in a last document whose ids are all the same, which is padding. Both [n, T]."""
    length = input_ids.shape[1]
    last_start = length - 1 - np.argmax(position_ids[:, ::-1] == 0, axis=1)
    in_last = np.arange(length) >= last_start[:, None]
    is_padding = np.where(in_last, input_ids == input_ids[:, -1:], True).all(axis=1, keepdims=True)
    return ~(in_last & is_padding)
