"""Notices that a node of this run is about to be taken away: a spot instance that is reclaimed, a node being drained.

Ray Train's watcher looks for them; on a Ray that the run started itself it is off, for nobody takes that machine away.
"""

import logging
import os
import time

import ray.train

logger = logging.getLogger(__name__)

_EVERY_S = 2.0  # asking is a message to an actor and back, from every rank


class Notice:
    """What this worker knows of them."""

    def __init__(self) -> None:
        self._is_watched = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0"
        self._due = time.monotonic() + _EVERY_S
        self._known: set[str] = set()

    def is_due(self) -> bool:
        """Whether this rank would ask again."""
        return self._is_watched and time.monotonic() >= self._due

    def is_new(self) -> bool:
        """Ask whether a node is going that was not before. A collective, with the same answer on every rank."""
        self._due = time.monotonic() + _EVERY_S
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self._known if info is not None else set()
        self._known |= new
        if new:
            logger.warning("a checkpoint is saved now, for nodes that are about to go: %s", ", ".join(sorted(new)))
        return bool(new)
