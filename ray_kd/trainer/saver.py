"""Checkpoints that training does not wait for: a copy at the step, files in a thread, the commit at a later step.

    saver.start(step, state, metrics)   every rank copies what it holds; a thread writes, syncs, hashes and uploads it
    saver.is_written                    this rank's thread is done; the next step's reduction tells it to all ranks
    saver.commit()                      once all are: rank 0 makes the folder count, and Ray Train hears of it

Nothing counts before `commit`: a kill leaves a temporary folder, which is swept at the next start, and the checkpoint
before it. `start` and `commit` are collectives, so the ranks must come to them at the same steps.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode

from ray_kd import checkpoint, storage
from ray_kd.config import Train
from ray_kd.errors import RetryableError, StorageFull
from ray_kd.locks import Held
from ray_kd.trainer.best import best_step
from ray_kd.trainer.fragments import Copy, copy_fragments, write_fragments
from ray_kd.trainer.rng import rng_state, save_rng

CONFIG = "config.yaml"


@dataclass(frozen=True)
class _Started:
    step: int
    tmp: Path
    state: dict[str, Any]
    loss: float | None
    hashes: "Future[checkpoint.Hashes]"
    """Of this rank's files, once they are written."""


class Saver:
    """Writes the checkpoints of one worker.

    root: the run's folder of checkpoints. config_yaml: goes along with each of them.
    saved_step: of the last one that counts, at first of that the training goes on from.
    on_commit: told on rank 0 of each that counts: its step, and the seconds that the files of this rank took.
    """

    def __init__(
        self, root: Path, engine: Any, options: Train, config_yaml: str, held: Held, saved_step: int,
        on_commit: Callable[[int, float], None],
    ) -> None:  # fmt: skip
        self._root, self._engine, self._options = root, engine, options
        self._config_yaml, self._held = config_yaml, held
        self._rank = dist.get_rank()
        self._started: _Started | None = None
        self._on_commit = on_commit
        self._write_s = 0.0
        self.saved_step = saved_step

    @property
    def is_written(self) -> bool:
        """Whether this rank's files of a started checkpoint are there. Raises what went wrong with them."""
        if self._started is None or not self._started.hashes.done():
            return False
        self._started.hashes.result()
        return True

    def start(self, step: int, state: dict[str, Any], loss: float | None) -> None:
        """Begin the checkpoint of this step; the one before is committed first. A collective.

        state: what goes into state.json. loss: of the step, for Ray Train's list.
        With `train.async_checkpoints` the copy costs host memory and the files are written while training goes on,
        else they are there when this returns.
        """
        self.commit()
        tmp = checkpoint.begin(self._root, step, self._rank)
        dist.barrier()
        copy = copy_fragments(self._engine, self._engine.module, at_once=self._options.async_checkpoints)
        hashes: Future[checkpoint.Hashes] = Future()
        self._started = _Started(step, tmp, state, loss, hashes)
        arguments = (hashes, copy, rng_state(), tmp, step)
        if self._options.async_checkpoints:
            threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True).start()
        else:
            self._write(*arguments)

    def commit(self) -> None:
        """Make the started checkpoint count, waiting for its files; nothing if none is. A collective.

        Raises RetryableError when they are not written within `train.timeout_s`, and whatever went wrong with them.
        """
        if self._started is None:
            return
        started, self._started = self._started, None
        own = self._hashes(started)
        self._held.check()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        folder = [""]
        if self._rank == 0:
            merged = {name: record for hashes in everyone for name, record in hashes.items()}
            next_slot = started.step * self._options.global_batch_size
            folder = [str(checkpoint.commit(started.tmp, self._root, started.step, next_slot, started.state, merged))]
            best = best_step(self._root, last=started.step) if self._options.keep_best else None
            keep = () if best is None else (best,)
            checkpoint.rotate(self._root, started.step, keep_last=self._options.keep_checkpoints, keep=keep)
        dist.broadcast_object_list(folder, src=0)
        # The folder already lies in Train's experiment directory (the run folder), so nothing is copied.
        ray.train.report(
            {"step": started.step, "loss": started.loss},
            checkpoint=Checkpoint(*storage.for_arrow(storage.path(folder[0]))),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
        self.saved_step = started.step
        if self._rank == 0:
            self._on_commit(started.step, self._write_s)

    def _hashes(self, started: _Started) -> checkpoint.Hashes:
        try:
            return started.hashes.result(timeout=self._options.timeout_s)
        except FutureTimeoutError:
            raise RetryableError(
                f"the checkpoint of step {started.step} was not written within train.timeout_s="
                f"{self._options.timeout_s:g} s: is the storage of run.dir there?"
            ) from None

    def _write(
        self, hashes: "Future[checkpoint.Hashes]", copy: Copy, rng: dict[str, torch.Tensor], tmp: Path, step: int
    ) -> None:  # fmt: skip
        """Never raises: what goes wrong is the future's."""
        start = time.perf_counter()
        try:
            files = [*write_fragments(copy, tmp), save_rng(rng, tmp, self._rank)]
            if self._rank == 0:
                (tmp / CONFIG).write_text(self._config_yaml, encoding="utf-8")
                files.append(CONFIG)
            put = checkpoint.put_files(tmp, self._root, step, files)
            self._write_s = time.perf_counter() - start
            hashes.set_result(put)
        except BaseException as error:
            if storage.is_full(error):
                self._make_room(tmp)
                error = StorageFull(
                    f"no space left on device for the checkpoint of step {step} in '{self._root}': the one of step "
                    f"{self.saved_step} is good, and the same command goes on from it when there is space"
                )
            hashes.set_exception(error)  # the training thread raises it

    def _make_room(self, tmp: Path) -> None:
        """What is left to say has to be written too."""
        for file in tmp.glob(f"rank{self._rank:05d}*"):
            file.unlink()
