"""Where the work runs: join or start Ray, size it, and refuse a layout that would starve, before anything starts.

A local Ray gets as many logical CPUs as the layout needs, whatever the machine has: with fewer the stream waits for
ever for the CPU that its repartition takes. Threads come from physical cores instead. On a cluster the layout is held
against the nodes there are (layout.py).
"""

import ipaddress
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_kd import redact, storage, submission
from ray_kd.config import Pool, RunConfig, Teacher, each_teacher, worker_range
from ray_kd.errors import ConfigError, RetryableError
from ray_kd.layout import READ_CPUS, REPARTITION_CPUS, Layout, Node, Problem, cautions, find_problem, matches
from ray_kd.teacher.deaths import REFUSED_AFTER

logger = logging.getLogger(__name__)

_PROBE_S = 10.0
_HEAD_EVERY_S = 3.0
_HEAD_LOST_S = 20.0
_SETTLED_S = 5.0
_LOOK_S = 1.0
_START_S = 300.0


@dataclass(frozen=True)
class Demand:
    """Logical resources of a local Ray, which has all at once that the run may ever take."""

    num_cpus: float
    num_gpus: float

    @property
    def whole_cpus(self) -> int:
        return -int(-self.num_cpus // 1)

    @classmethod
    def of(cls, config: RunConfig) -> "Demand":
        """All workers, all of every teacher pool, the repartition and one read per teacher."""
        train, pools = config.train, pools_of(config)
        _, workers = worker_range(train)
        return cls(
            num_cpus=workers * train.cpus_per_worker
            + sum(pool.max_actors * (pool.num_cpus + READ_CPUS) for pool in pools)
            + REPARTITION_CPUS,
            num_gpus=workers * train.gpus_per_worker + sum(pool.max_actors * pool.num_gpus for pool in pools),
        )


@dataclass(frozen=True)
class Threads:
    """CPU threads of one process of each pool."""

    teacher: int
    """Of a teacher that is not told how many."""
    worker: int

    @classmethod
    def of(cls, config: RunConfig) -> "Threads":
        """As configured, or the physical cores of this machine shared out evenly between teachers and workers."""
        processes = max_teachers(config) + worker_range(config.train)[1]
        share = max(1, physical_cores() // processes)
        return cls(share, config.train.threads_per_worker or share)

    def of_teacher(self, teacher: Teacher) -> int:
        """As it is told, or its share."""
        return teacher.threads or self.teacher


def pools_of(config: RunConfig) -> list[Pool]:
    """The pool of each teacher."""
    return [alone.teacher.pool for _, alone in each_teacher(config)]


def max_teachers(config: RunConfig) -> int:
    """Actors that all pools together may grow to."""
    return sum(pool.max_actors for pool in pools_of(config))


def physical_cores() -> int:
    """Physical cores this process may use."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def address(config: RunConfig) -> str | None:
    """The cluster to join, or None for a new local Ray."""
    given = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if given in (None, "", "local"):
        return None
    if "://" in given:
        hint = "; to a dashboard jobs go by `ray job submit --address`" if given.startswith("http") else ""
        raise ConfigError(
            f"cluster.address (or RAY_ADDRESS) is '{redact.redact(given)}': allowed is auto or host:port, from a node "
            f"of the cluster{hint}"
        )
    return given


def check_token(config: RunConfig) -> None:
    """Refuse a dashboard, and a cluster on another machine, that ask for no token: who reaches them runs code there.

    Ray turns the token on for a local Ray, unless RAY_AUTH_MODE says otherwise; for a cluster that is joined by its
    address it wants RAY_AUTH_MODE=token. Looks up a host's name. Raises ConfigError; not with `cluster.insecure`.
    """
    where, mode = address(config), os.environ.get("RAY_AUTH_MODE")
    if config.cluster.insecure or (mode or "").lower() == "token":
        return
    if where is None and config.cluster.dashboard and mode is not None:
        raise ConfigError(
            f"cluster.dashboard=true would open a dashboard without a token, since RAY_AUTH_MODE is '{mode}': unset it "
            "(or set it to token), or set cluster.insecure=true"
        )
    if where not in (None, "auto"):
        _refuse_clear_text(where)


def _refuse_clear_text(where: str) -> None:
    host = where.rpartition(":")[0].strip("[]")
    if not _is_here(host):
        raise ConfigError(
            f"the Ray cluster at '{where}' is on another machine and would be joined without a token: set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) where its nodes have them too, or set "
            "cluster.insecure=true"
        )


def _is_here(host: str) -> bool:
    """Whether a host is this machine: loopback, or one of its own addresses. True for a name nobody knows."""
    import psutil

    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return True  # it cannot be joined, and `_check_reachable` says so
    own = {known.address.split("%")[0] for cards in psutil.net_if_addrs().values() for known in cards}
    return all(ipaddress.ip_address(one.split("%")[0]).is_loopback or one in own for one in found)


def _check_reachable(where: str) -> None:
    """Ray itself would try for many minutes, and hear no signal meanwhile. Raises ConfigError."""
    if where == "auto":
        return  # Ray looks it up on this machine
    host, _, port = where.rpartition(":")
    if not (host and port.isdigit()):
        raise ConfigError(f"cluster.address (or RAY_ADDRESS) is '{where}': allowed is auto or host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except OSError as error:
        raise ConfigError(
            f"cannot reach the Ray cluster at cluster.address (or RAY_ADDRESS) '{where}': {error.strerror or error}"
        ) from error


class Head:
    """The head of the cluster, for the driver to ask again and again while it waits.

    Ray gives a lost one a minute and then ends this process: no line, no summary, exit code 1.
    where: host:port of its control service. is_own: of a Ray that this process started.
    """

    def __init__(
        self, where: str, lost_s: float = _HEAD_LOST_S, every_s: float = _HEAD_EVERY_S, *, is_own: bool = False
    ) -> None:  # fmt: skip
        host, _, port = where.rpartition(":")
        self._where = (host.strip("[]"), int(port))
        self._lost_s, self._every_s, self._is_own = lost_s, every_s, is_own
        self._asked_at = self._answered_at = time.monotonic()

    def check(self) -> None:
        """Raise RetryableError when it did not answer for lost_s seconds."""
        now = time.monotonic()
        if now < self._asked_at + self._every_s:
            return
        self._asked_at = now
        try:
            socket.create_connection(self._where, timeout=_HEAD_EVERY_S).close()
            self._answered_at = now
        except OSError as error:
            if now - self._answered_at >= self._lost_s:
                if self._is_own:
                    raise RetryableError(
                        "the Ray that this run started has ended: the same command goes on from the newest checkpoint. "
                        "(A signal to the whole process group ends it: signal the driver alone, which then saves one)"
                    ) from error
                raise RetryableError(
                    f"the head of the Ray cluster at {':'.join(map(str, self._where))} did not answer for "
                    f"{self._lost_s:g} s ({error.strerror or error}): the same command goes on, on a cluster that does"
                ) from error


def local_node(config: RunConfig) -> Node:
    """This machine as a local Ray has it: as many logical CPUs as the run may ever take, its own GPUs, no labels."""
    demand = Demand.of(config)
    num_gpus = 0
    if demand.num_gpus:
        import torch

        num_gpus = torch.cuda.device_count()
    return Node("this machine", demand.whole_cpus, num_gpus, labels={}, is_head=True)


def check_local(config: RunConfig) -> None:
    """Refuse GPUs and labels that this machine does not have, when the run is to start a Ray of its own.

    Raises ConfigError.
    """
    if address(config) is not None:
        return
    demand, node = Demand.of(config), local_node(config)
    for group in Layout.of(config).groups:
        if not matches(node.labels, group.labels):
            raise ConfigError(
                f"{group.key}.label_selector is {dict(group.labels)}: a local Ray has no labels, allowed is {{}}, or a "
                "cluster to join (cluster.address)"
            )
    found = node.num_gpus
    if found < demand.num_gpus:
        raise ConfigError(
            f"the layout needs {demand.num_gpus:g} GPUs (train.gpus_per_worker={config.train.gpus_per_worker:g} x "
            f"{worker_range(config.train)[1]} workers + teacher.pool.num_gpus="
            f"{' + '.join(f'{pool.num_gpus:g} x {pool.max_actors} actors' for pool in pools_of(config))}) and this "
            f"machine has {found:g}: set them to 0, or join a cluster"
        )


@contextmanager
def connected(config: RunConfig, *, trains: bool = True) -> Iterator[None]:
    """Ray for the length of the block, as `connecting` has it, and there when it begins."""
    with connecting(config, trains=trains) as wait_for_ray:
        wait_for_ray()
        yield


@contextmanager
def connecting(config: RunConfig, *, trains: bool = True) -> Iterator[Callable[[], None]]:
    """Join the configured cluster, or start a local one, while the block does something else; leave or stop it after.

    Yields what waits until Ray is there. A local one takes seconds of which most are other processes': time to look at
    models and data. trains: whether the whole layout is needed; data preparation takes what there is.
    Raises ConfigError when the cluster cannot be reached or would be joined without a token (`check_token`); waiting
    raises it for one that cannot be joined or never holds the layout, and RetryableError for one that could but does
    not within `cluster.wait_s`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Train's minute is too short for a pod that an autoscaler still has to start. A range of workers starts with
    # those that the nodes there are have room for, and counts again after a start that took too long.
    is_elastic = isinstance(config.train.num_workers, list)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60" if is_elastic else "600")
    # A poll is one call of each worker. At Ray's 2 s the second checkpoint between two polls waited for the next one,
    # and a death or the end was seen a second late on average.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray

    where = address(config)
    if where is not None or config.cluster.dashboard:  # the dashboard knows nothing of Train runs without it
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    check_token(config)
    if where is None:  # nobody preempts this machine: one process less, 3 CPU seconds
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")  # as Ray Train sets it for its controller
        # torch on CPU then asks for huge pages: a fresh gradient of the head took half the time (20 ms for 57 MB).
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logger.info("starting a local Ray" if where is None else f"joining the Ray cluster at {where}")
    if where is not None:
        _check_reachable(where)
    begun: Future[None] = Future()
    ended = threading.Event()

    def begin() -> None:
        try:
            _begin(config, where)
            begun.set_result(None)
        except BaseException as error:  # raised where it is waited for
            begun.set_exception(error)
        # Ray has its processes killed when the thread that started them ends.
        ended.wait()

    def has_begun() -> bool:
        return bool(futures.wait([begun], timeout=_START_S).done)

    def wait() -> None:
        if not has_begun():
            raise RetryableError(
                f"Ray was not there within {_START_S:.0f} s: look at session_latest/logs in its temporary folder"
            )
        begun.result()
        _quiet_console()
        if where is not None and trains:
            _wait_for_layout(Layout.of(config), config.cluster.wait_s)

    thread = threading.Thread(target=begin, name="ray.init", daemon=True)
    thread.start()
    try:
        yield wait
    finally:
        if has_begun():
            ray.shutdown()
            ended.set()
            thread.join()


def _begin(config: RunConfig, where: str | None) -> None:
    import ray
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    try:
        if where is None:
            context = ray.init(
                address="local",
                num_cpus=Demand.of(config).whole_cpus,
                include_dashboard=bool(config.cluster.dashboard),
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            context = ray.init(
                address=where,
                job_config=submission.job_config(config),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"cannot join the Ray cluster '{where}': {str(error).splitlines()[0]}") from error
    if where == "auto" and not (config.cluster.insecure or is_token_auth_enabled()):
        _refuse_clear_text(ray.get_runtime_context().gcs_address)
    if context.dashboard_url:
        logger.info("Ray dashboard: http://%s", context.dashboard_url)


def _quiet_console() -> None:
    """Ray Data's messages stay in its own log files; the terminal has our progress line."""
    import ray.data  # configures the logger

    for handler in logging.getLogger(ray.data.__name__).handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)  # what it says of an interrupt, too: errors reach us as exceptions


def _wait_for_layout(layout: Layout, wait_s: float) -> None:
    """Until the cluster's nodes hold the layout.

    Without an autoscaler a layout that may starve is refused as soon as no node has come for some seconds, and one for
    which there is too little after wait_s: the nodes of a cluster do not all come at once. Raises ConfigError for both;
    RetryableError after wait_s where an autoscaler may yet start nodes, or one that would have done is lost.
    """
    joined = Joined()
    start = changed = time.monotonic()
    known: set[str] = set()
    while True:
        seen = joined.look()
        problem = seen.problem(layout)
        if problem is None:
            for line in cautions(layout, seen.alive, seen.can_grow):
                logger.warning("%s", line)
            return
        now = time.monotonic()
        if names := {node.name for node in seen.alive} - known:
            known |= names
            changed = now
        if not seen.can_grow and not problem.is_short and now - changed >= min(wait_s, _SETTLED_S):
            raise ConfigError(problem.text)
        if now - start >= wait_s:
            waited = f"{problem.text} (waited cluster.wait_s={wait_s:g} s)"
            if seen.can_grow or (seen.lost and find_problem(layout, [*seen.alive, *seen.lost]) is None):
                raise RetryableError(waited)
            raise ConfigError(waited)
        logger.info("waiting for the cluster: %s", problem.text)
        time.sleep(_LOOK_S)


@dataclass(frozen=True)
class Look:
    """A cluster at one moment."""

    alive: list[Node]
    lost: list[Node]
    can_grow: bool
    """There is an autoscaler."""

    def problem(self, layout: Layout) -> Problem | None:
        """What keeps the layout from running on it now."""
        return find_problem(layout, self.alive, self.can_grow)


class Joined:
    """The cluster that this process has joined, as far as it is looked at before anything runs on it."""

    def look(self) -> Look:
        """Its nodes now."""
        from ray.data._internal.cluster_autoscaler.util import is_autoscaling_enabled

        return Look(*_nodes(), is_autoscaling_enabled())

    def object_store_nbytes(self) -> int:
        """Of all its nodes."""
        import ray

        return int(ray.cluster_resources().get("object_store_memory", 0))

    def check_shared(self, folder: Path, timeout_s: float, key: str) -> None:
        """As `check_shared`."""
        check_shared(folder, timeout_s, key)


@contextmanager
def joining(config: RunConfig) -> Iterator[Joined]:
    """The configured cluster for the length of the block, whatever its nodes hold. Raises as `connected` does."""
    with connected(config, trains=False):
        yield Joined()


def _nodes() -> tuple[list[Node], list[Node]]:
    """(the cluster's nodes that are alive, those that are not)."""
    import ray

    found: tuple[list[Node], list[Node]] = [], []
    for node in ray.nodes():
        has = node["Resources"]
        found[not node["Alive"]].append(
            Node(
                name=f"{node['NodeManagerHostname']} {node['NodeID'][:8]}",
                num_cpus=has.get("CPU", 0.0),
                num_gpus=has.get("GPU", 0.0),
                labels=node.get("Labels") or {},
                is_head="node:__internal_head__" in has,
            )
        )
    return found


def actor_pool(pool: Pool) -> dict[str, Any]:
    """Arguments of `map_batches` for a pool of teachers.

    Ray would start a teacher again, and retry its tasks, for ever. Here an actor survives four rows that end its
    process every time (`teacher/deaths.py`); after that the attempt fails, and counts as one of `train.max_failures`.
    """
    import ray.data

    return {
        "compute": ray.data.ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
        "num_cpus": pool.num_cpus,
        "num_gpus": pool.num_gpus,
        "max_restarts": 4 * REFUSED_AFTER,
        "max_task_retries": 4 * REFUSED_AFTER,
        "label_selector": dict(pool.label_selector) or None,
    }


def check_shared(folder: Path, timeout_s: float, key: str = "run.dir") -> None:
    """Prove that every node sees the folder, by a file that a task on each of them reads.

    Raises ConfigError naming the nodes that do not, RetryableError when a node does not answer in time.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    token = secrets.token_hex(8)
    probe = folder / f".probe-{token}"
    probe.write_text(token)
    read = ray.remote(num_cpus=0)(_problem)
    try:
        pending = {
            read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(probe), token
            ): node["NodeManagerHostname"]
            for node in nodes
        }
        seen = dict(zip(pending.values(), ray.get(list(pending), timeout=timeout_s), strict=True))
    except ray.exceptions.GetTimeoutError:
        raise RetryableError(f"a node did not answer within {timeout_s:g} s whether it sees '{folder}'") from None
    finally:
        probe.unlink()
    blind = [f"{name} ({why})" for name, why in seen.items() if why]
    if blind:
        raise ConfigError(f"{key} '{folder}' is not on storage that all nodes share: not read on {', '.join(blind)}")


def _problem(path: str, token: str) -> str:
    """Why this node does not read the token in the file; empty when it does."""
    try:
        return "" if storage.read_text(storage.path(path)) == token else "another file is there"
    except Exception as error:  # no such file, no client, no credentials: the driver says which, and where
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
