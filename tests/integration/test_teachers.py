"""Several teachers through the jobs: mixed, routed, cached."""

import json

import numpy as np
import pytest

from ray_kd import run_folder
from ray_kd.data.order import SlotOrder
from ray_kd.data.prepared import PreparedData
from ray_kd.teacher.journal import read_journal

pytestmark = pytest.mark.ray


def teachers(jobs, *of_each):
    """The override; the first is the single teacher of the other runs."""
    models = [str(jobs.teacher), str(jobs.student)]
    entries = [{"model": models[place], "threads": 1} | own for place, own in enumerate(of_each)]
    return f"teachers={json.dumps(entries)}"


def losses(job):
    return [line["train/kd_loss"] for line in job.metrics]


def test_a_mixture_of_a_teacher_with_itself_is_the_teacher(jobs):
    alone = jobs.distill("teachers-alone", "eval.kl=topk")
    same = {"model": str(jobs.teacher)}
    both = jobs.distill("teachers-same", teachers(jobs, {"name": "one"}, same | {"name": "two", "weight": 3}))
    assert both.exit_code == 0, both.stderr
    np.testing.assert_allclose(losses(both), losses(alone), rtol=2e-3)
    assert both.summary["teacher_rows_computed"] == 2 * alone.summary["teacher_rows_computed"]
    assert both.summary["teacher_rows_repeated"] == 0
    assert [pool["teacher"] for pool in both.summary["teacher_pools"]] == ["one", "two"]
    assert {actor["teacher"] for actor in both.summary["teacher_actors"]} == {"one", "two"}
    assert both.summary["eval"]["before"] == pytest.approx(alone.summary["eval"]["before"], rel=1e-3)


@pytest.mark.extended
def test_rows_are_routed_by_a_column_and_each_teacher_has_its_cache(jobs):
    routed = teachers(jobs, {"rows": ["even"]}, {"rows": ["odd"]})
    options = ("data.route_by=parity", "train.max_steps=null", "train.epochs=2", "teacher.cache.mode=write_through",
               f"teacher.cache.path={jobs.folder}/of-teachers")  # fmt: skip
    job = jobs.distill("teachers-routed", routed, *options)
    assert job.exit_code == 0, job.stderr
    rows = job.summary["rows_prepared"]
    assert job.summary["teacher_rows_computed"] == job.summary["teacher_rows_from_cache"] == rows
    content = run_folder.content_of(job.run_dir)["prepared data"]
    prepared = PreparedData(job.run_dir.parent / "prepared" / content[:16])
    assert prepared.manifest.routes == ["even", "odd"]
    order = SlotOrder(num_rows=rows, global_batch_size=4, epochs=2, max_steps=None, seed=0)
    seen = {"teacher": [], "student": []}
    for line in read_journal(job.run_dir):
        seen[line["teacher"]] += order.rows(0, order.num_slots)[line["slots"]].tolist()
    for route, name in enumerate(("teacher", "student")):
        assert sorted(seen[name]) == np.flatnonzero(prepared.routes() == route).tolist()
    again = jobs.distill("teachers-cached", routed, *options)
    assert again.exit_code == 0, again.stderr
    assert again.summary["teacher_rows_computed"] == 0
    assert losses(again) == losses(job)
    filled = jobs.run("cache_teacher", *jobs.arguments("teachers-filled", routed, *options))
    assert filled.exit_code == 0, filled.stderr
    assert [line.split(",")[1] for line in filled.stdout.splitlines() if line.startswith("cached")] == [
        " 0 computed now",
        " 0 computed now",
    ]


def test_a_route_that_nobody_answers_is_named(jobs):
    job = jobs.distill("teachers-partial", teachers(jobs, {"rows": ["even"]}, {"rows": ["od"]}), "data.route_by=parity")
    assert job.exit_code == 64
    assert "teachers: none has the rows of 'odd'; they take 'teacher' 'even'; 'student' 'od'" in job.stderr
