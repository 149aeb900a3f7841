"""Does a layout fit, can it starve: lists of nodes instead of clusters."""

import pytest

from ray_kd import config
from ray_kd.layout import Layout, Node, cautions, common_labels, find_problem, matches

TEACHER = {"ray-subcluster": "teacher", "pool": "teacher"}
STUDENT = {"pool": "student"}
POOLS = ("teacher.pool.label_selector={ray-subcluster: teacher}", "train.label_selector={pool: student}")


def layout(*overrides):
    base = ["run.dir=run", "data.source={kind: jsonl, paths: [x]}", "teacher.model=t", "student.model=s"]
    return Layout.of(config.load(None, [*base, *overrides]))


def nodes(*kinds):
    """(count, CPUs, GPUs, labels) each."""
    return [
        Node(f"{kind}-{place}", cpus, gpus, labels)
        for kind, (count, cpus, gpus, labels) in enumerate(kinds)
        for place in range(count)
    ]


HEAD = Node("head", 0, 0, {}, is_head=True)


def problem(asked, given, **more):
    found = find_problem(asked, given, **more)
    if found is not None:
        assert "\n" not in found.text
    return found


def test_what_ray_kd_asks_for_by_default_runs_on_three_cpus_and_not_on_two():
    assert problem(layout(), nodes((1, 3, 0, {}))) is None
    found = problem(layout(), nodes((1, 2, 0, {})))
    assert found.is_short
    assert found.text == (
        "the layout needs 2.25 CPUs and 0 GPUs at once (1 train workers of 0.5 CPUs, 1 teachers of 0.5 CPUs, "
        "1 repartition of 1 CPUs, 1 reads of 0.25 CPUs), and on the cluster's 1 node (1 x 2 CPUs, 0 GPUs) there is no "
        "room for 1 of 1 reads: lower teacher.pool.num_cpus or train.cpus_per_worker, or add nodes"
    )


def test_two_workers_and_a_teacher_at_half_a_cpu_starve_on_two():
    asked = layout("train.num_workers=2", "train.cpus_per_worker=0.5", "teacher.pool.num_cpus=0.5")
    assert problem(asked, nodes((1, 2, 0, {}))).is_short
    assert problem(asked, nodes((1, 3, 0, {}))) is None


@pytest.mark.parametrize(
    ("selector", "labels", "is_meant"),
    [
        ({}, {}, True),
        ({"pool": "a"}, {"pool": "a"}, True),
        ({"pool": "a"}, {"pool": "ab"}, False),
        ({"pool": "a"}, {}, False),
        ({"pool": "!a"}, {"pool": "a"}, False),
        ({"pool": "!a"}, {}, True),
        ({"pool": "in(a, b)"}, {"pool": "b"}, True),
        ({"pool": "in(a,b)"}, {"pool": "c"}, False),
        ({"pool": "!in(a,b)"}, {"pool": "c"}, True),
        ({"pool": "!in(a,b)"}, {"pool": "a"}, False),
        ({"pool": "a", "zone": "1"}, {"pool": "a"}, False),
    ],
)
def test_label_selectors_mean_what_they_do_in_ray(selector, labels, is_meant):
    assert matches(labels, selector) is is_meant


def test_rows_are_read_where_all_pools_are():
    assert common_labels([]) == {}
    assert common_labels([{"a": "1", "b": "2"}]) == {"a": "1", "b": "2"}
    assert common_labels([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}]) == {"a": "1"}


@pytest.mark.parametrize("key", ["teacher.pool", "train"])
def test_a_selector_that_no_node_carries_is_named(key):
    found = problem(layout(f"{key}.label_selector={{pool: nobody}}"), [*nodes((2, 8, 0, TEACHER)), HEAD])
    assert found.is_short
    assert found.text.startswith(
        f"{key}.label_selector={{pool: nobody}} is carried by none of the cluster's 3 nodes (2 x"
    )


def test_enough_in_sum_is_not_enough():
    """Eight CPUs, four of them for workers of three each: only one fits a node."""
    asked = layout("train.num_workers=2", "train.cpus_per_worker=3", "train.label_selector={pool: student}")
    found = problem(asked, nodes((1, 4, 0, STUDENT), (2, 4, 0, {})))
    assert found.is_short
    assert "no room for 1 of 2 train workers labelled {pool: student}" in found.text
    assert "lower train.num_workers, train.cpus_per_worker" in found.text
    assert problem(asked, nodes((2, 4, 0, STUDENT), (1, 4, 0, {}))) is None


def test_fractions_of_gpus_are_packed_on_whole_ones():
    asked = layout("train.num_workers=3", "train.gpus_per_worker=0.6", "teacher.pool.num_gpus=0.4")
    found = problem(asked, nodes((1, 8, 2, {})))  # 2.2 of them are more, and 1.8 for the workers are not
    assert "no room for 1 of 3 train workers" in found.text
    assert problem(asked, nodes((1, 8, 3, {}))) is None
    shared = layout("train.gpus_per_worker=0.6", "teacher.pool.num_gpus=0.4")
    assert problem(shared, nodes((1, 8, 1, {}))) is None
    whole = layout("teacher.pool.num_gpus=2")
    assert problem(whole, nodes((2, 8, 1, {}))).is_short
    assert problem(whole, nodes((1, 8, 2, {}), (1, 8, 0, {}))) is None


def test_an_elastic_pool_needs_its_least_and_is_told_how_far_it_can_grow():
    asked = layout("teacher.pool.num_gpus=1", "teacher.pool.max_actors=8", "teacher.pool.min_actors=2")
    assert problem(asked, nodes((1, 16, 1, {}))).is_short
    given = nodes((2, 16, 2, {}))
    assert problem(asked, given) is None
    assert list(cautions(asked, given)) == [
        "teacher.pool.max_actors=8: the cluster has room for 4 beside all the others"
    ]
    assert list(cautions(asked, nodes((4, 16, 2, {})))) == []


def test_teachers_that_take_every_cpu_are_refused_with_the_cure():
    asked = layout(*POOLS, "teacher.pool.num_cpus=1", "teacher.pool.max_actors=4")
    given = [HEAD, *nodes((1, 4, 0, TEACHER), (1, 2, 0, STUDENT))]
    found = problem(asked, given)
    assert not found.is_short
    assert found.text == (
        "the layout can starve: rows are read and repartitioned with 0.25 and 1 CPUs on nodes labelled "
        "{ray-subcluster: teacher}, and 1 train workers of 0.5 CPUs, 1 to 4 teachers of 1 CPUs may leave no more than "
        "0 CPUs on any of 1 node (1 x 4 CPUs, 0 GPUs, {ray-subcluster: teacher, pool: teacher}): "
        "set teacher.pool.num_cpus=0.5 or teacher.pool.max_actors=2"
    )
    for cure in ("teacher.pool.num_cpus=0.5", "teacher.pool.max_actors=2"):
        assert problem(layout(*POOLS, "teacher.pool.num_cpus=1", "teacher.pool.max_actors=4", cure), given) is None
    assert problem(asked, given, can_grow=True) is None  # it starts with one, and new ones bring their node


def test_ray_may_put_a_teacher_on_every_node():
    """Ten CPUs, but one on each of ten nodes: half a CPU may be left on each, and the repartition takes one."""
    asked = layout("teacher.pool.num_cpus=0.5", "teacher.pool.max_actors=10", "teacher.pool.min_actors=4")
    found = problem(asked, nodes((10, 1, 0, {})))
    assert found.text.startswith("the layout can starve: ")
    assert "no more than 0.5 CPUs on any of 10 nodes" in found.text


def test_the_loss_of_a_teacher_node_is_counted_with():
    """Teachers of one CPU on nodes of two: the restarted ones hold every CPU of the node that is left."""
    asked = layout(*POOLS, "teacher.pool.num_cpus=1", "teacher.pool.max_actors=2")
    given = [HEAD, *nodes((2, 2, 0, TEACHER), (1, 2, 0, STUDENT))]
    found = problem(asked, given)
    assert not found.is_short
    assert "can starve after the loss of a teacher node (0-0)" in found.text
    assert "no more than 0 CPUs on any of 1 node (1 x 2 CPUs" in found.text
    assert found.text.endswith("set teacher.pool.num_cpus=0.25 or teacher.pool.max_actors=1") or found.text.endswith(
        "set teacher.pool.num_cpus=0.25"
    )
    assert problem(asked, given, can_grow=True) is None  # the autoscaler brings another
    half = layout(*POOLS, "teacher.pool.num_cpus=0.25", "teacher.pool.max_actors=2")
    assert problem(half, given) is None


def test_gpus_keep_cpus_free():
    """A teacher that waits for a GPU takes no CPU."""
    asked = layout(*POOLS, "teacher.pool.num_cpus=1", "teacher.pool.num_gpus=1", "teacher.pool.max_actors=8")
    assert problem(asked, [HEAD, *nodes((8, 4, 1, TEACHER), (1, 2, 0, STUDENT))]) is None


def test_the_only_teacher_node_and_the_head_are_not_lost():
    asked = layout(*POOLS, "teacher.pool.num_cpus=0.5")
    assert problem(asked, nodes((1, 2, 0, TEACHER), (1, 1, 0, STUDENT))) is None
    crowded = layout("train.num_workers=2", "teacher.pool.max_actors=2")
    with_cpus = Node("head", 2, 0, {}, is_head=True)
    assert problem(crowded, nodes((2, 2, 0, {}))) is not None
    # The workers would not fit on what is left: the run waits for its node then, whatever the stream does.
    heavy = layout("train.num_workers=2", "train.cpus_per_worker=2", "teacher.pool.num_cpus=0.25")
    assert problem(heavy, [with_cpus, *nodes((1, 5, 0, {}))]) is None


def test_workers_take_part_where_nothing_keeps_them_away():
    asked = layout("train.num_workers=4", "train.cpus_per_worker=1", "teacher.pool.num_cpus=0.5",
                   "teacher.pool.max_actors=3")  # fmt: skip
    assert problem(asked, nodes((1, 6, 0, {}))).text.endswith(
        "set teacher.pool.num_cpus=0.25 or teacher.pool.max_actors=1"
    )
    assert problem(asked, nodes((1, 7, 0, {}))) is None


def test_a_subcluster_that_the_teachers_do_not_name_is_a_caution():
    given = nodes((1, 8, 0, TEACHER), (1, 8, 0, STUDENT))
    asked = layout("teacher.pool.label_selector={pool: teacher}")
    assert problem(asked, given) is None
    (line,) = cautions(asked, given)
    assert "carry ray-subcluster=teacher and teacher.pool.label_selector does not name it" in line
    assert list(cautions(layout("teacher.pool.label_selector={pool: teacher, ray-subcluster: teacher}"), given)) == []


def test_a_range_of_workers_is_counted_by_ray_on_every_node_without_a_subcluster():
    asked = layout(*POOLS, "train.num_workers=[1,2]")
    good = [HEAD, *nodes((1, 4, 0, TEACHER), (2, 1, 0, STUDENT))]
    assert problem(asked, good) is None
    found = problem(asked, [*good, Node("other", 4, 0, {"pool": "idle"})])
    assert "other has room but not train.label_selector={pool: student}" in found.text
    assert problem(layout(*POOLS, "train.num_workers=2"), [*good, Node("other", 4, 0, {"pool": "idle"})]) is None
    students = STUDENT | {"ray-subcluster": "student"}
    found = problem(asked, [HEAD, *nodes((1, 4, 0, TEACHER), (2, 1, 0, students))])
    assert "only on nodes without the label ray-subcluster" in found.text


def test_several_pools_are_named_each():
    teachers = (
        "teachers=[{model: a, pool: {num_cpus: 1, max_actors: 2, label_selector: {pool: a}}},"
        " {model: b, pool: {num_cpus: 1, max_actors: 2, label_selector: {pool: b}}}]"
    )
    run = ["run.dir=run", "data.source={kind: jsonl, paths: [x]}", "student.model=s", teachers]
    asked = Layout.of(config.load(None, run))
    found = problem(asked, nodes((1, 2, 0, {"pool": "a"}), (1, 2, 0, {"pool": "b"})))
    assert "'a' of 1 CPUs, 1 to 2 'b' of 1 CPUs" in found.text
    assert "set teachers.0.pool.num_cpus=0.5 teachers.1.pool.num_cpus=0.5 or" in found.text
    found = problem(asked, nodes((1, 8, 0, {"pool": "a"})))
    assert found.text.startswith("teachers.1.pool.label_selector={pool: b} is carried by none")
