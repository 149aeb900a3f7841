"""Preparation: sources -> packed, shuffled Parquet in a folder named by the fingerprint of what determines it.

Runs in the driver. Two Ray Data passes of one operator each: shards become parts (tokenise, pack), parts become files
(shuffle). Data that is there already is found by its fingerprint and no Ray work is started.
The driver holds 24 bytes a row and 16 bytes a document, never the data; the disk holds the rows twice for a while.
"""

import json
import logging
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ray_kd import config as configuration
from ray_kd import schema, storage
from ray_kd.data.manifest import MANIFEST_NAME, Manifest, PreparedFile, is_intact
from ray_kd.data.plan import Plan, plan_preparation
from ray_kd.data.prepared import PreparedData
from ray_kd.data.shard import SIDES, ShardResult, Task, bad_path, parts_folder, prepare_shard
from ray_kd.data.shuffle import FilePlan, FileResult, plan_files, write_file
from ray_kd.data.staging import commit, staging, sweep
from ray_kd.errors import ConfigError, DataError, RayKDError

logger = logging.getLogger(__name__)

QUARANTINE_NAME = "quarantine.jsonl"
TASK_NUM_CPUS = 0.5
"""Logical CPUs of a task: small, so that preparation runs on a Ray that offers few."""

Job = TypeVar("Job")
Result = TypeVar("Result")


def prepare(
    config: configuration.Data,
    tokenizer_path: str,
    revision: str | None,
    seed: int,
    prepared_dir: str | Path,
    quarantine_path: str | Path | None = None,
    num_blocks: int | None = None,
    plan: Plan | None = None,
) -> PreparedData:
    """The prepared data of a config: found in prepared_dir, or made there with Ray Data (Ray must be initialised).

    prepared_dir: a folder that every node sees, or a URI. quarantine_path: where the refused records are listed
    besides the data's own folder. num_blocks: tasks that the shards are dealt to; any number gives the same bytes.
    plan: of these settings, where it was made before; it saves a pass over the sources.
    Raises ConfigError for what the user can fix; DataError when no usable record is left or more than
    max_bad_fraction of them are refused, with the refused ones listed in quarantine_path, or beside the folder.
    """
    plan = plan or plan_preparation(config, tokenizer_path, revision, seed)
    root = storage.path(prepared_dir, "data.prepared_dir")
    final = root / plan.folder_name
    beside = root / f"{final.name}.{QUARANTINE_NAME}"
    listed = storage.path(quarantine_path or beside)
    if is_intact(final, plan.fingerprint):
        # Training lists refused teacher answers in the same file: what is there stays.
        if not listed.exists():
            _join([final / QUARANTINE_NAME], listed)
    else:
        sweep(root)
        with staging(root) as folder:
            _make(plan, folder, listed, config, num_blocks)
            commit(folder, final, partial(is_intact, fingerprint=plan.fingerprint))
    prepared = PreparedData(final)
    _check_bad(prepared.manifest.quarantined, prepared.manifest.records_read, config.max_bad_fraction, listed)
    beside.unlink(missing_ok=True)
    _warn(prepared.manifest)
    return prepared


def _make(plan: Plan, folder: Path, listed: Path, config: configuration.Data, num_blocks: int | None) -> None:
    """Write everything into the staged folder, the manifest last; `listed` before anything is refused."""
    storage.make_folder(parts_folder(folder))
    shards = [(index, is_eval, shard) for index, (is_eval, shard) in enumerate(plan.shards)]
    results = _map(partial(_run_shard, task=plan.task, folder=str(folder)), shards, num_blocks)
    counts = sum((result.counts for result in results), Counter[str]())
    bad_files = [bad_path(folder, index) for index in range(len(results))]
    _join(bad_files, folder / QUARANTINE_NAME)
    _join(bad_files, listed)
    _check_bad(counts["quarantined"], counts["records_read"], config.max_bad_fraction, listed)
    _check_sides(counts, config)
    # Only now is it known which routes there are: the shards' parts name them, the files have their indices.
    routes = sorted({route for result in results for rows in result.route_rows.values() for route in rows})
    files: list[FilePlan] = []
    for side in SIDES:
        files += plan_files(side, [result.route_rows[side] for result in results], routes, plan.task.seed)
    written = _map(partial(write_file, folder=str(folder), length=config.sequence_length), files, num_blocks)
    storage.remove(parts_folder(folder))
    manifest = _manifest(plan, counts, results, routes if plan.task.route_by is not None else [], files, written)
    storage.write_text(folder / MANIFEST_NAME, manifest.to_json())


def _manifest(
    plan: Plan,
    counts: Counter[str],
    results: Sequence[ShardResult],
    routes: list[str],
    files: Sequence[FilePlan],
    written: Sequence[FileResult],
) -> Manifest:
    length = plan.task.sequence_length
    by_side = {side: [pair for pair in zip(files, written, strict=True) if pair[0].side == side] for side in SIDES}
    entries = {
        side: [PreparedFile(file.name, done.rows, done.nbytes, done.sha256) for file, done in pairs]
        for side, pairs in by_side.items()
    }
    hashes = np.concatenate([result.hashes[side] for result in results for side in SIDES])
    train_sketches, eval_sketches = (np.concatenate([result.sketches[side] for result in results]) for side in SIDES)
    return Manifest(
        fingerprint=plan.fingerprint,
        schema_version=schema.SCHEMA_VERSION,
        sequence_length=length,
        num_rows=counts["train_rows"],
        eval_rows=counts["eval_rows"],
        files=entries["train"],
        eval_files=entries["eval"],
        routes=routes,
        route_rows=[sum(result.route_rows["train"].get(route, 0) for result in results) for route in routes],
        num_tokens=counts["train_tokens"],
        target_tokens=sum(done.target_tokens for _, done in by_side["train"]),
        target_bytes=sum(done.target_bytes for _, done in by_side["train"]),
        eval_tokens=counts["eval_tokens"],
        eval_target_tokens=sum(done.target_tokens for _, done in by_side["eval"]),
        eval_bytes=sum(done.target_bytes for _, done in by_side["eval"]),
        max_targets_per_row=max(done.max_targets for done in written),
        packing_efficiency=counts["train_tokens"] / (counts["train_rows"] * length),
        records_read=counts["records_read"],
        quarantined=counts["quarantined"],
        bad_fraction=counts["quarantined"] / counts["records_read"],
        documents=counts["train_documents"],
        eval_documents=counts["eval_documents"],
        split_documents=counts["split_documents"],
        repeated_tokens=counts["repeated_tokens"],
        dropped_tokens=counts["dropped_tokens"],
        duplicates=len(hashes) - len(np.unique(hashes)),
        near_duplicates_train_eval=int(np.isin(eval_sketches, train_sketches).sum()),
    )


def _map(function: Callable[[Job], Result], jobs: Sequence[Job], num_blocks: int | None) -> list[Result]:
    """function of each job, in order, by one Ray Data operator. A RayKDError of a job is raised as it is."""
    import ray.data

    if not jobs:
        return []
    _quiet_ray_data()
    blocks = num_blocks or 4 * max(1, int(ray.cluster_resources().get("CPU", 1) / TASK_NUM_CPUS))
    # Bytes, because Ray Data would make Arrow structs of nested values and unify them over jobs.
    items = [{"index": index, "job": pickle.dumps(job)} for index, job in enumerate(jobs)]
    blocks_of_jobs = ray.data.from_items(items, override_num_blocks=min(blocks, len(items)))
    dataset = blocks_of_jobs.map(partial(_run_job, function), num_cpus=TASK_NUM_CPUS)
    dataset.set_name("prepare")  # in the dashboard
    dataset.context.enable_progress_bars = sys.stderr.isatty()
    results = {row["index"]: pickle.loads(row["result"]) for row in dataset.iter_rows()}
    failed = [result for result in results.values() if isinstance(result, RayKDError)]
    if failed:
        raise failed[0]
    return [results[index] for index in range(len(jobs))]


def _quiet_ray_data() -> None:
    """Keep Ray Data's announcements, and its advice on the bars that are off, out of the terminal and in its log."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def _run_job(function: Callable[[Any], Any], row: dict[str, Any]) -> dict[str, Any]:
    try:
        with storage.store_errors():
            result = function(pickle.loads(row["job"]))
    except RayKDError as error:  # raised again in the driver; Ray would wrap it and print its traceback
        result = error
    return {"index": row["index"], "result": pickle.dumps(result)}


def _run_shard(shard: tuple[int, bool, dict[str, Any]], task: Task, folder: str) -> ShardResult:
    return prepare_shard(*shard, task, folder)


def _check_bad(quarantined: int, records_read: int, max_fraction: float, listed: Path) -> None:
    if not records_read:
        raise DataError("data.source has no records: its files are empty")
    fraction = quarantined / records_read
    if quarantined < records_read and fraction <= max_fraction:
        return
    with listed.open(encoding="utf-8") as file:
        first = json.loads(file.readline())
    limit = f", more than data.max_bad_fraction={max_fraction}" if fraction > max_fraction else ""
    raise DataError(
        f"{quarantined} of {records_read} records ({fraction:.1%}) cannot be used{limit}; "
        f"the first, {first['file']}:{first['line']}: {first['reason']}; all are listed in {listed}"
    )


def _check_sides(counts: Counter[str], config: configuration.Data) -> None:
    if config.eval_source is not None:
        for side, key in (("train", "data.source"), ("eval", "data.eval_source")):
            if not counts[f"{side}_rows"]:
                raise DataError(f"{key} has no usable record")
    for side, outcome in (("eval", "none for evaluation"), ("train", "none to train on")):
        if config.eval_fraction and not counts[f"{side}_rows"]:
            documents = counts["train_documents"] + counts["eval_documents"]
            raise ConfigError(f"data.eval_fraction={config.eval_fraction} of {documents} documents leaves {outcome}")


def _warn(manifest: Manifest) -> None:
    if manifest.duplicates:
        logger.warning("data: %d documents repeat an earlier one; they are kept", manifest.duplicates)
    if manifest.near_duplicates_train_eval:
        logger.warning(
            "data: %d of %d eval documents resemble a training document, so evaluation flatters the student",
            manifest.near_duplicates_train_eval,
            manifest.eval_documents,
        )


def _join(parts: Iterable[Path], whole: Path) -> None:
    with storage.refused_if_unwritable(whole):
        storage.make_folder(whole.parent)
        with whole.open("wb") if storage.is_remote(whole) else storage.open_own(whole, "wb") as file:
            for part in parts:
                file.write(part.read_bytes())
