"""What only a worker or an actor can find out, and no other try would change, reaches the driver at once.

Ray retries a worker that raised, whatever it raised: a model that can never be used would be loaded
`max_failures + 1` times before its one line appears, a full disk be filled as often. So the process that finds it
leaves the line in the run folder, and the driver, which looks there while it waits, ends the run.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        except OSError as second:  # no space for the line either; an empty file takes none, and says as much
            logger.warning("'%s' could not be written: %s", run_dir / REFUSAL, second)
            with suppress(OSError):
                (run_dir / REFUSAL).touch()
        raise


class Reported:
    """What workers and actors reported, for the driver to ask again and again."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / REFUSAL
        self._flag = storage.Flag(self._path)

    def check(self) -> None:
        """Raise the error that was reported, if one was."""
        if self._flag.is_set():
            text = storage.read_text(self._path)
            if not text:
                raise StorageFull(
                    f"no space left on device for '{self._path.parent}': the same command goes on once there is"
                )
            kind, line = json.loads(text)
            raise _ENDS[kind](line)
