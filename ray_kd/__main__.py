"""`python -m ray_kd JOB ...`: the jobs of an installed package."""

import sys

from ray_kd.cli import dispatch

if __name__ == "__main__":
    sys.exit(dispatch())
