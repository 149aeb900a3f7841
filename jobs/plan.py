"""The plan job; `--help` says what it takes. The body is `ray_kd.cli.plan`."""

import sys

from ray_kd.cli import main

if __name__ == "__main__":
    sys.exit(main("plan"))
