"""The cache_teacher job; `--help` says what it takes. The body is `ray_kd.cli.cache_teacher`."""

import sys

from ray_kd.cli import main

if __name__ == "__main__":
    sys.exit(main("cache_teacher"))
