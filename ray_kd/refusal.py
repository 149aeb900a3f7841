"""What only a worker or an actor can find out, and no other try would change, reaches the driver at once.

Ray retries a worker that raised, whatever it raised: a model that can never be used would be loaded
`max_failures + 1` times before its one line appears, a full disk be filled as often. So the process that finds it
leaves the line in the run folder, and the driver, which looks there while it waits, ends the run.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_kd import storage
from ray_kd.errors import ConfigError, StorageFull

REFUSAL = ".refused"

logger = logging.getLogger(__name__)

_ENDS = {error.__name__: error for error in (ConfigError, StorageFull)}


@contextmanager
def reported(run_dir: Path) -> Iterator[None]:
    """Leave the line of a ConfigError or StorageFull for the driver, and raise it as before."""
    try:
        yield
    except tuple(_ENDS.values()) as error:
        kind = StorageFull if isinstance(error, StorageFull) else ConfigError
        try:
            storage.write_text(run_dir / REFUSAL, json.dumps([kind.__name__, str(error)]))
        except OSError as second:  # no space for this either: the driver hears it from Ray, after the retries
            logger.warning("'%s' could not be written: %s", run_dir / REFUSAL, second)
        raise


class Reported:
    """What workers and actors reported, for the driver to ask again and again."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / REFUSAL
        self._flag = storage.Flag(self._path)

    def check(self) -> None:
        """Raise the error that was reported, if one was."""
        if self._flag.is_set():
            kind, line = json.loads(storage.read_text(self._path))
            raise _ENDS[kind](line)
