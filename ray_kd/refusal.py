"""What only a worker or an actor can find out about the user's input reaches the driver at once.

Ray retries a worker that raised, whatever it raised: a model that can never be used would be loaded
`max_failures + 1` times before its one line appears. So the process that finds it leaves the line in the run folder,
and the driver, which looks there while it waits, ends the run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_kd import storage
from ray_kd.errors import ConfigError

REFUSAL = ".refused"


@contextmanager
def reported(run_dir: Path) -> Iterator[None]:
    """Leave a ConfigError's line for the driver, and raise it as before."""
    try:
        yield
    except ConfigError as error:
        storage.write_text(run_dir / REFUSAL, str(error))
        raise


class Reported:
    """What workers and actors reported, for the driver to ask again and again."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / REFUSAL
        self._flag = storage.Flag(self._path)

    def check(self) -> None:
        """Raise the ConfigError that was reported, if one was."""
        if self._flag.is_set():
            raise ConfigError(storage.read_text(self._path))
