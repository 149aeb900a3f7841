"""Random state through a file without pickle."""

import random
from pathlib import Path

import numpy as np
import torch

from ray_kd.trainer import rng


def draw() -> list[float]:
    legacy = np.random.normal(size=1).item()  # noqa: NPY002 (the global generator is what is saved)
    return [torch.rand(1).item(), legacy, np.random.rand(), random.gauss(0, 1), random.random()]  # noqa: NPY002


def test_round_trip(tmp_path: Path) -> None:
    # One and two draws: with and without the second normal number of a pair waiting.
    for _ in range(2):
        draw()
        name = rng.save_rng(rng.rng_state(), tmp_path, rank=3)
        expected = [draw() for _ in range(3)]
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        assert rng.load_rng(tmp_path, rank=3)
        assert [draw() for _ in range(3)] == expected
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_rank_without_state_keeps_its_own(tmp_path: Path) -> None:
    rng.save_rng(rng.rng_state(), tmp_path, rank=0)
    before = torch.get_rng_state()
    assert not rng.load_rng(tmp_path, rank=1)
    assert torch.equal(torch.get_rng_state(), before)
