"""The evaluate job; `--help` says what it takes. The body is `ray_kd.cli.evaluate`."""

import sys

from ray_kd.cli import main

if __name__ == "__main__":
    sys.exit(main("evaluate"))
