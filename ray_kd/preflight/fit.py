"""Does the layout fit the machines, can it starve, and does what runs ahead fit their memory."""

from collections.abc import Iterator

from ray_kd import cluster, objectives, pipeline
from ray_kd.cluster import Look
from ray_kd.config import RunConfig
from ray_kd.errors import ConfigError
from ray_kd.layout import Layout, Node, cautions
from ray_kd.preflight.report import FAILED, OK, SKIPPED, WARNING, Finding, Subject
from ray_kd.preflight.space import nearest
from ray_kd.run_folder import run_dir


def check_fit(subject: Subject) -> Iterator[Finding]:
    """The nodes there are, those of the configured cluster or this machine, against what the run asks for."""
    config, where = subject.config, cluster.address(subject.config)
    if where is None:
        cluster.check_local(config)
        node = cluster.local_node(config)
        yield from _judge(config, Look([node], [], can_grow=False), "a local Ray on this machine")
        yield from _check_memory(subject, _local_store_nbytes(), "a local Ray")
    elif subject.is_offline:
        yield Finding("layout", SKIPPED, f"the cluster at '{where}' is not joined with --offline")
    else:
        with subject.join(config) as joined:
            yield from _judge(config, joined.look(), f"the cluster at '{where}'")
            joined.check_shared(nearest(run_dir(config)), config.train.timeout_s, "run.dir")
            yield from _check_memory(subject, joined.object_store_nbytes(), "the cluster")


def _judge(config: RunConfig, seen: Look, where: str) -> Iterator[Finding]:
    layout = Layout.of(config)
    problem = seen.problem(layout)
    if problem is None:
        asked = ", ".join(str(group) for group in layout.groups)
        yield Finding("layout", OK, f"{asked} fit {where} ({_in_words(seen.alive)}) and cannot starve")
        yield from (Finding("layout", WARNING, line) for line in cautions(layout, seen.alive, seen.can_grow))
    elif seen.can_grow and problem.is_short:
        yield Finding("layout", WARNING, f"not now: its autoscaler has to start nodes first: {problem.text}")
    else:
        yield Finding("layout", FAILED, problem.text, ConfigError.exit_code)


def _in_words(nodes: list[Node]) -> str:
    cpus, gpus = sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes)
    return f"{len(nodes)} node{'s' * (len(nodes) != 1)}, {cpus:g} CPUs and {gpus:g} GPUs for Ray"


def _check_memory(subject: Subject, held: int, where: str) -> Iterator[Finding]:
    """What the teacher may be ahead against the object store."""
    config = subject.config
    if subject.models is None:
        yield Finding("layout", SKIPPED, "bytes of a row: they need what 'models' did not find out")
        return
    nbytes_per_token = objectives.planned_nbytes_per_token(config)
    targets = config.data.sequence_length if subject.manifest is None else subject.manifest.max_targets_per_row
    _, run_ahead = pipeline.stream_sizes(config, targets, nbytes_per_token)
    pipeline.warn_of_spilling(config, run_ahead, held)  # which is then in the table as a warning
    yield Finding(
        "layout", OK, f"up to {run_ahead / 1e6:,.1f} MB run ahead of the student, in an object store of "
        f"{held / 1e9:,.1f} GB ({where})",
    )  # fmt: skip


def _local_store_nbytes() -> int:
    """What a local Ray would take now: 30 % of the free memory, at most what /dev/shm and Ray's own limit allow."""
    from ray._private.utils import estimate_available_memory, resolve_object_store_memory

    return int(resolve_object_store_memory(estimate_available_memory()))
