"""What only a worker or an actor can find out about the user's input reaches the driver at once.

Ray retries a worker that raised, whatever it raised: a model that can never be used would be loaded
`max_failures + 1` times before its one line appears. So the process that finds it leaves the line in the run folder,
and the driver, which looks there while it waits, ends the run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_kd.errors import ConfigError

REFUSAL = ".refused"


@contextmanager
def reported(run_dir: Path) -> Iterator[None]:
    """Leave a ConfigError's line for the driver, and raise it as before."""
    try:
        yield
    except ConfigError as error:
        temporary = run_dir / f"{REFUSAL}.tmp"
        temporary.write_text(str(error), encoding="utf-8")
        temporary.replace(run_dir / REFUSAL)
        raise


def raise_reported(run_dir: Path) -> None:
    """Raise what a worker or actor reported, if one did."""
    path = run_dir / REFUSAL
    if path.exists():
        raise ConfigError(path.read_text(encoding="utf-8"))
