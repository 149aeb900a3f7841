"""The Triton kernels of the loss, in a process whose Triton interprets from the start: it decides when imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    cases = Path(__file__).with_name("triton_rows_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
