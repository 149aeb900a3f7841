"""Does the layout fit the cluster's nodes, and can it starve? Arithmetic over a list of nodes; no Ray here.

Comes in: what the config asks for (`Layout`) and the nodes as they are. Goes out: None, or the first thing that is
wrong, in one line with its numbers and the setting that cures it.

A stream starves when nothing is left for its reads (0.25 CPUs) and its repartition (1 CPU), which wait for rows while
they hold what they have: teachers are actors and give nothing back. Where Ray puts an actor is its own choice, so a
layout is refused when there is any placement that starves it. CPUs here are logical: asking for fewer costs nothing.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_kd.config import RunConfig, each_teacher, worker_range

REPARTITION_CPUS = 1.0
"""Ray Data's repartition operator."""
READ_CPUS = 0.25
"""One read task (data/stream.py)."""

SUBCLUSTER = "ray-subcluster"
"""The node label by which Ray tells apart whose resources it counts: Ray Data's of nodes that its label selector names
by it, elastic Ray Train's of nodes that do not have it."""

_UNITS = 10_000  # Ray counts in ten-thousandths
_SHAPES = 4  # kinds of nodes that a message lists
_FEWER_CPUS = (0.5, 0.25, 0.1, 0.05, 0.01)


@dataclass(frozen=True)
class Node:
    """A node that is alive, by its logical resources."""

    name: str
    num_cpus: float
    num_gpus: float
    labels: Mapping[str, str]
    is_head: bool = False


@dataclass(frozen=True)
class Group:
    """Processes that are alike: the train workers, the actors of one teacher pool, or the tasks of the stream."""

    name: str
    key: str
    """Section of the config that they come from; empty for the stream."""
    least: int
    """How many there must be at once."""
    most: int
    """How many there may be."""
    num_cpus: float
    num_gpus: float
    labels: Mapping[str, str]

    def __str__(self) -> str:
        gpus = f" and {self.num_gpus:g} GPUs" if self.num_gpus else ""
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"{count} {self.name} of {self.num_cpus:g} CPUs{gpus}"


@dataclass(frozen=True)
class Layout:
    """What a run asks of a cluster."""

    workers: Group
    pools: tuple[Group, ...]
    stream_labels: Mapping[str, str]
    """Of the nodes on which rows are read."""

    @classmethod
    def of(cls, config: RunConfig) -> "Layout":
        """All pools of the config, whatever their caches have."""
        train = config.train
        least, most = worker_range(train)
        workers = Group(
            "train workers", "train", least, most, train.cpus_per_worker, train.gpus_per_worker, train.label_selector
        )
        pools = []
        for place, (one, alone) in enumerate(each_teacher(config)):
            pool = alone.teacher.pool
            name, key = ("teachers", "teacher.pool") if one is None else (f"'{one.name}'", f"teachers.{place}.pool")
            pools.append(
                Group(name, key, pool.min_actors, pool.max_actors, pool.num_cpus, pool.num_gpus, pool.label_selector)
            )
        return cls(workers, tuple(pools), common_labels([pool.labels for pool in pools]))

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.workers, *self.pools)

    @property
    def stream(self) -> tuple[Group, Group]:
        """The tasks that must have room beside the others: the repartition, and a read a teacher."""
        reads = sum(pool.least for pool in self.pools)
        return (
            Group("repartition", "", 1, 1, REPARTITION_CPUS, 0, self.stream_labels),
            Group("reads", "", reads, reads, READ_CPUS, 0, self.stream_labels),
        )


@dataclass(frozen=True)
class Problem:
    """Why a layout is not started."""

    text: str
    """One line: the numbers, and what cures it."""
    is_short: bool
    """More nodes like those that there are would do: waiting may help."""


def common_labels(selectors: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The labels that all pools ask for: those of the nodes on which rows are read."""
    first, *others = selectors or [{}]
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def find_problem(layout: Layout, nodes: Sequence[Node], can_grow: bool = False) -> Problem | None:
    """The first thing that keeps the layout from running on these nodes, or that may starve it later.

    can_grow: there is an autoscaler. Pools are then taken at their least, and a lost node comes back.
    """
    return (
        _unmatched(layout, nodes)
        or _without_room(layout, nodes)
        or _not_counted(layout, nodes)
        or _starving(layout, nodes, can_grow)
    )


def cautions(layout: Layout, nodes: Sequence[Node], can_grow: bool = False) -> Iterator[str]:
    """What does not keep the layout from running, one line each: a pool that cannot grow to its most, nodes miscounted.

    can_grow: as in `find_problem`.
    """
    stream = [node for node in nodes if matches(node.labels, layout.stream_labels) and node.num_cpus]
    named = layout.stream_labels.get(SUBCLUSTER)
    if stream and all(node.labels.get(SUBCLUSTER) != named for node in stream):
        value = stream[0].labels.get(SUBCLUSTER)
        yield (
            f"the teachers' nodes carry {SUBCLUSTER}={value} and {layout.pools[0].key}.label_selector does not name "
            f"it: Ray Data counts the CPUs of other nodes as its own. Add {SUBCLUSTER}: {value} to the label_selector "
            "of every pool"
        )
    if can_grow:
        return
    rooms = [_Room(node) for node in nodes]
    for group in layout.groups:
        _fill(group, group.least, rooms)
    for pool in layout.pools:
        fitting = pool.least + _fill(pool, pool.most - pool.least, rooms)
        if fitting < pool.most:
            yield f"{pool.key}.max_actors={pool.most}: the cluster has room for {fitting} beside all the others"


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels is one that Ray's label selector means: `a`, `!a`, `in(a, b)` or `!in(a, b)`."""
    for key, wanted in selector.items():
        bare = wanted.removeprefix("!")
        listed = re.fullmatch(r"in\((.*)\)", bare)
        values = [value.strip() for value in listed[1].split(",")] if listed else [bare]
        if (labels.get(key) in values) == wanted.startswith("!"):
            return False
    return True


class _Room:
    """What is left of a node, in Ray's units."""

    def __init__(self, node: Node) -> None:
        self.labels = node.labels
        self.cpus = _units(node.num_cpus)
        self.gpus = [_UNITS] * int(node.num_gpus)

    def take(self, group: Group) -> bool:
        """Room for one of the group, if it has that."""
        cpus, gpus = _units(group.num_cpus), _units(group.num_gpus)
        if self.cpus < cpus or not matches(self.labels, group.labels):
            return False
        # A fraction lies on one GPU, the fullest that has room; whole ones are empty.
        size, count = (gpus, 1) if gpus < _UNITS else (_UNITS, gpus // _UNITS)
        having = sorted((left, place) for place, left in enumerate(self.gpus) if left >= size)[:count]
        if gpus and len(having) < count:
            return False
        for _, place in having if gpus else ():
            self.gpus[place] -= size
        self.cpus -= cpus
        return True


def _units(amount: float) -> int:
    return round(amount * _UNITS)


def _fill(group: Group, count: int, rooms: Sequence[_Room], spread: bool = False) -> int:
    """Place up to so many of a group, on the emptiest nodes (spread) or the fullest; how many have room."""
    for placed in range(count):
        rooms = sorted(rooms, key=lambda room: (sum(room.gpus), room.cpus), reverse=spread)
        if not any(room.take(group) for room in rooms):
            return placed
    return count


def _unmatched(layout: Layout, nodes: Sequence[Node]) -> Problem | None:
    for group in layout.groups:
        if not any(matches(node.labels, group.labels) for node in nodes):
            key = f"{group.key}.label_selector"
            return Problem(
                f"{key}={_labels(group.labels)} is carried by none of the cluster's {_listed(layout, nodes)}: start "
                f"nodes with these labels (ray start --labels), or change {key}",
                is_short=True,
            )
    return None


def _without_room(layout: Layout, nodes: Sequence[Node]) -> Problem | None:
    """The group that does not fit when all are to run at once."""
    groups = [replace(group, most=group.least) for group in layout.groups] + list(layout.stream)
    best: tuple[int, int, Group] | None = None
    # Packing is hard in general: any order that fits will do.
    orders = (lambda g: (-g.num_gpus, -g.num_cpus), lambda g: (-len(g.labels), -g.num_cpus))
    for order, spread in itertools.product(orders, (False, True)):
        rooms = [_Room(node) for node in nodes]
        lacking = [
            (group.least - _fill(group, group.least, rooms, spread), group) for group in sorted(groups, key=order)
        ]
        missing = sum(number for number, _ in lacking)
        if missing == 0:
            return None
        if best is None or missing < best[0]:
            best = missing, *next((number, group) for number, group in lacking if number)
    assert best is not None
    _, number, lacks = best
    where = f" labelled {_labels(lacks.labels)}" if lacks.labels else ""
    asked = ", ".join(str(group) for group in groups)
    cpus, gpus = (sum(getattr(g, name) * g.least for g in groups) for name in ("num_cpus", "num_gpus"))
    settings = {
        "train": "train.num_workers, train.cpus_per_worker or train.gpus_per_worker",
        "": "teacher.pool.num_cpus or train.cpus_per_worker",
    }.get(lacks.key, f"{lacks.key}.min_actors, {lacks.key}.num_cpus or {lacks.key}.num_gpus")
    return Problem(
        f"the layout needs {cpus:g} CPUs and {gpus:g} GPUs at once ({asked}), and on the cluster's "
        f"{_listed(layout, nodes)} there is no room for {number} of {lacks.least} {lacks.name}{where}: lower "
        f"{settings}, or add nodes",
        is_short=True,
    )


def _not_counted(layout: Layout, nodes: Sequence[Node]) -> Problem | None:
    """Nodes on which Ray counts room for a range of workers that are not to run there, or none for those that are."""
    workers = layout.workers
    if workers.least == workers.most:
        return None
    # Ray counts on all that a node has; the head's part only where it has any.
    counted = [
        node for node in nodes if SUBCLUSTER not in node.labels and _Room(node).take(replace(workers, labels={}))
    ]
    foreign = [node for node in counted if not matches(node.labels, workers.labels)]
    if foreign:
        return Problem(
            f"train.num_workers=[{workers.least}, {workers.most}]: Ray counts room for workers on every node without "
            f"the label {SUBCLUSTER}, and {foreign[0].name} has room but not train.label_selector="
            f"{_labels(workers.labels)}: start it with --labels={SUBCLUSTER}=other (teachers' nodes: the value that "
            "their label_selector names), or set train.num_workers to one number",
            is_short=False,
        )
    if _fill(workers, workers.least, [_Room(node) for node in counted]) < workers.least:
        return Problem(
            f"train.num_workers=[{workers.least}, {workers.most}]: Ray counts room for workers only on nodes without "
            f"the label {SUBCLUSTER}, which leaves none for {workers.least}: start the students' nodes without it",
            is_short=False,
        )
    return None


def _starving(layout: Layout, nodes: Sequence[Node], can_grow: bool) -> Problem | None:
    if can_grow:
        layout = replace(layout, pools=tuple(replace(pool, most=pool.least) for pool in layout.pools))
    found = _starved_by(layout, nodes, can_grow)
    if found is None:
        return None
    lost, remaining = found
    stream = [node for node in remaining if matches(node.labels, layout.stream_labels)]
    left = [room.cpus / _UNITS for room in _worst(layout, remaining)]
    after = "" if lost is None else f" after the loss of a teacher node ({lost.name})"
    where = f" labelled {_labels(layout.stream_labels)}" if layout.stream_labels else ""
    asked = ", ".join(str(group) for group in layout.groups)
    return Problem(
        f"the layout can starve{after}: rows are read and repartitioned with {READ_CPUS:g} and {REPARTITION_CPUS:g} "
        f"CPUs on nodes{where}, and {asked} may leave no more than {max(left):g} CPUs on any of "
        f"{_listed(layout, stream)}: {_cure(layout, nodes, can_grow)}",
        is_short=False,
    )


def _starved_by(
    layout: Layout, nodes: Sequence[Node], can_grow: bool
) -> tuple[Node | None, Sequence[Node]] | None:  # fmt: skip
    """(the node whose loss starves the stream or None for no loss, the nodes that are left); None: it never starves."""
    if _is_starved(_worst(layout, nodes)):
        return None, nodes
    if can_grow:
        return None
    seen = set()
    for lost in nodes:
        shape = (lost.num_cpus, lost.num_gpus, *sorted(_relevant(layout, lost).items()))
        is_teachers = any(matches(lost.labels, pool.labels) for pool in layout.pools)
        if not is_teachers or lost.is_head or shape in seen:  # without the head there is no cluster
            continue
        seen.add(shape)
        remaining = [node for node in nodes if node is not lost]
        rooms = [_Room(node) for node in remaining]
        is_stopped = _fill(layout.workers, layout.workers.least, rooms) < layout.workers.least or not all(
            any(matches(node.labels, pool.labels) for node in remaining) for pool in layout.pools
        )
        if not is_stopped and _is_starved(_worst(layout, remaining)):
            return lost, remaining
    return None


def _worst(layout: Layout, nodes: Sequence[Node]) -> list[_Room]:
    """What is left for the stream when Ray places workers and teachers as badly as it may."""
    rooms = [_Room(node) for node in nodes if matches(node.labels, layout.stream_labels)]
    rooms.sort(key=lambda room: room.cpus)
    groups = sorted(layout.groups, key=lambda group: -group.num_cpus)
    left = [group.most for group in groups]
    # No room for the repartition on as many nodes as can be, then as little as can be for the reads.
    for enough in (REPARTITION_CPUS, 0.0):
        for room in rooms:
            for place, group in enumerate(groups):
                while left[place] and room.cpus >= _units(enough) and room.take(group):
                    left[place] -= 1
    return rooms


def _is_starved(rooms: Sequence[_Room]) -> bool:
    first, second = sorted([0, 0, *(room.cpus for room in rooms)])[:-3:-1]
    repartition, read = _units(REPARTITION_CPUS), _units(READ_CPUS)
    return first < repartition or (first < repartition + read and second < read)


def _cure(layout: Layout, nodes: Sequence[Node], can_grow: bool) -> str:
    """The mildest settings with which the layout would not starve."""

    def is_cured(**changed: Any) -> bool:
        return _starved_by(replace(layout, **changed), nodes, can_grow) is None

    def pools_with(name: str, value: float) -> tuple[Group, ...]:
        return tuple(replace(pool, **{name: min(getattr(pool, name), value)}) for pool in layout.pools)

    keys = [pool.key for pool in layout.pools]
    cures = []
    if (cpus := next((c for c in _FEWER_CPUS if is_cured(pools=pools_with("num_cpus", c))), None)) is not None:
        cures.append(" ".join(f"{key}.num_cpus={cpus:g}" for key in keys))
    most_of, least_of = (max(getattr(pool, name) for pool in layout.pools) for name in ("most", "least"))
    fewer = range(most_of - 1, least_of - 1, -1)
    if (most := next((m for m in fewer if is_cured(pools=pools_with("most", m))), None)) is not None:
        cures.append(" ".join(f"{key}.max_actors={most}" for key in keys))
    workers = layout.workers
    if not cures and (cpus := next((c for c in _FEWER_CPUS if c < workers.num_cpus and is_cured(
        workers=replace(workers, num_cpus=c), pools=pools_with("num_cpus", c))), None)) is not None:  # fmt: skip
        cures.append(" ".join([f"train.cpus_per_worker={cpus:g}", *(f"{key}.num_cpus={cpus:g}" for key in keys)]))
    return f"set {' or '.join(cures)}" if cures else "it needs nodes with more CPUs"


def _relevant(layout: Layout, node: Node) -> dict[str, str]:
    asked = {SUBCLUSTER}.union(*(group.labels for group in layout.groups))
    return {key: value for key, value in node.labels.items() if key in asked}


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in labels.items()) + "}"


def _listed(layout: Layout, nodes: Sequence[Node]) -> str:
    """The nodes by their kinds, with the labels that matter here."""
    shapes: Counter[str] = Counter()
    for node in nodes:
        labels = _relevant(layout, node)
        shapes[f"{node.num_cpus:g} CPUs, {node.num_gpus:g} GPUs{', ' + _labels(labels) if labels else ''}"] += 1
    kinds = [f"{count} x {shape}" for shape, count in shapes.most_common(_SHAPES)]
    more = ["..."] if len(shapes) > _SHAPES else []
    return f"{len(nodes)} node{'s' * (len(nodes) != 1)} ({'; '.join(kinds + more)})"
