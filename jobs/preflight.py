"""The preflight job; `--help` says what it takes. The body is `ray_kd.cli.preflight`."""

import sys

from ray_kd.cli import main

if __name__ == "__main__":
    sys.exit(main("preflight"))
