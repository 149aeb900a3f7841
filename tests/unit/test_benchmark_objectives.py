"""The objectives benchmark with a runner that writes what a run would: which runs start, how, and what is said."""

import json
import subprocess
import sys

import pytest

from ray_kd import config, run_folder
from ray_kd.benchmarks import objectives as bench
from ray_kd.benchmarks.plot import grouped_bars
from ray_kd.errors import ConfigError, RayKDError

ENDS = {
    "CE": [(2.0, 20.0), (2.1, 21.0), (2.2, 22.0)],
    "KD": [(1.00, 31.0), (1.02, 32.0), (1.04, 33.0)],
    "KD + CE": [(0.80, 19.0), (0.84, 19.5), (0.82, 19.7)],
    "KD + CE + hidden states": [(0.81, 23.0), (0.83, 24.0), (0.85, 25.0)],
}
"""Objective -> KL and perplexity at the end of seeds 0, 1 and 2."""


@pytest.fixture
def study(tmp_path):
    return bench.Study("configs/quickstart.yaml", ["train.learning_rate=1e-3"], tmp_path / "eval.jsonl", tmp_path, 7)


class FakeRunner:
    """Finishes each run at once with the figures of `ENDS`."""

    def __init__(self, study: bench.Study) -> None:
        self.study, self.started, self.fails_at = study, [], None

    def __call__(self, command: list[str]) -> int:
        assert command[:4] == [sys.executable, "-m", "ray_kd", "distill"]
        if self.fails_at == len(self.started):
            return 75
        loaded = config.load(command[4], command[5:])
        folder = run_folder.run_dir(loaded)
        (folder / "final").mkdir(parents=True)
        (folder / "final" / "config.json").write_text("{}")
        (folder / "checkpoints" / "step-7").mkdir(parents=True)
        run_folder.record(folder, loaded, {"prepared data": "p"})
        (name,) = [one.name for one in bench.OBJECTIVES if self.study.run_dir(one, loaded.run.seed) == folder]
        kl, perplexity = ENDS[name][loaded.run.seed]
        summary = {
            "exit_code": 0, "wall_s": 100.0 + loaded.run.seed, "teacher_rows_computed": 14 if name == "CE" else 0,
            "eval": {"before": {"kl": 3.0, "perplexity": 700.0}, "after": {"kl": kl, "perplexity": perplexity}},
        }  # fmt: skip
        run_folder.write_json(folder / "summary.json", summary)
        self.started.append((name, loaded.run.seed))
        return 0


def all_results(study):
    return list(bench.measure(study, bench.OBJECTIVES, range(3), FakeRunner(study)))


def test_each_objective_runs_once_a_seed_and_differs_in_its_terms_alone(study):
    runner = FakeRunner(study)
    results = list(bench.measure(study, bench.OBJECTIVES, range(3), runner))
    assert runner.started == [(name, seed) for seed in range(3) for name in ENDS]
    assert [(one.objective, one.seed, one.after["kl"]) for one in results] == [
        (name, seed, ENDS[name][seed][0]) for seed in range(3) for name in ENDS
    ]
    assert results[0].before == {"kl": 3.0, "perplexity": 700.0}
    assert (results[0].wall_s, results[0].teacher_rows_computed) == (100.0, 14)
    loaded = [config.load(study.config, study.settings(one, 1)) for one in bench.OBJECTIVES]
    assert [[term["kind"] for term in one.loss.terms] for one in loaded] == [
        ["ce"], ["kd"], ["kd", "ce"], ["kd", "ce", "hidden_state"],
    ]  # fmt: skip
    plain = [config.to_dict(one) for one in loaded]
    for one in plain:
        assert one["train"]["learning_rate"] == 1e-3
        assert (one["train"]["max_steps"], one["run"]["seed"]) == (7, 1)
        del one["loss"]["terms"], one["run"]["dir"], one["teacher"]["payload"], one["teacher"]["cache"]["path"]
    assert plain[1:] == plain[:-1]
    assert len({one.teacher.cache.path for one in loaded[:3]}) == 1
    assert loaded[3].teacher.cache.path != loaded[0].teacher.cache.path


def test_a_finished_run_is_not_run_again_and_leaves_no_checkpoints(study):
    first = FakeRunner(study)
    first.fails_at = 5
    with pytest.raises(RayKDError, match=r"'.*kd-7-steps-seed-1' ended with exit code 75") as failed:
        list(bench.measure(study, bench.OBJECTIVES, range(2), first))
    assert failed.value.exit_code == 75
    second = FakeRunner(study)
    results = list(bench.measure(study, bench.OBJECTIVES, range(2), second))
    assert second.started == [("KD", 1), ("KD + CE", 1), ("KD + CE + hidden states", 1)]
    assert len(results) == 8
    assert not list(study.folder.glob("*/checkpoints"))
    other = bench.Study(study.config, ["train.learning_rate=2e-3"], study.eval_path, study.folder, study.steps)
    with pytest.raises(ConfigError, match=r"train.learning_rate is 0.001, now 0.002"):
        next(bench.measure(other, bench.OBJECTIVES, [0], second))


def test_the_settings_are_a_valid_config(study):
    """Of every objective, as far as config and plug-ins know without a model."""
    from ray_kd.losses.terms import parse_terms

    for objective in bench.OBJECTIVES:
        loaded = config.load(study.config, study.settings(objective, 0))
        entries = parse_terms(loaded.loss.terms)
        assert any(entry.is_feature for entry in entries) == (objective.payload == "features")


def test_the_table_and_who_wins(study):
    results = all_results(study)
    lines = bench.table(results).splitlines()
    assert [line[:26].strip() for line in lines] == ["objective", *ENDS]
    assert [cell.strip() for cell in lines[3][26:].split("  ") if cell] == [
        "3", "3.000 ± 0.000", "0.820 ± 0.020", "700.000 ± 0.000", "19.400 ± 0.361", "101.000 ± 1.000",
    ]  # fmt: skip
    assert bench.verdict(results, "kl") == (
        "KL(teacher || student), nats a token: 'KD + CE' ends lowest, 0.0100 below 'KD + CE + hidden states'; "
        "that does not exceed the spread of the seeds (0.0200), and it is lower in 2 of 3"
    )
    assert bench.verdict(results, "perplexity") == (
        "perplexity: 'KD + CE' ends lowest, 1.6000 below 'CE'; "
        "that exceeds the spread of the seeds (1.0000), and it is lower in 3 of 3"
    )


def test_what_cannot_be_compared_is_said(study):
    results = all_results(study)
    assert bench.verdict(results[:1], "kl").endswith("one objective is no comparison")
    one_seed = bench.verdict(results[:4], "kl")
    assert one_seed.endswith("'KD + CE' ends lowest, 0.0100 below 'KD + CE + hidden states'; "
                             "one seed says nothing of the spread")  # fmt: skip
    # Of the second seed only CE and KD are there: the first one alone is compared.
    assert bench.verdict(results[:6], "kl") == one_seed
    assert bench.table(results[:1]).splitlines()[1].split() == [
        "CE",
        "1",
        "3.000",
        "2.000",
        "700.000",
        "20.000",
        "100.000",
    ]


def test_the_picture_has_both_figures_in_nats(study, tmp_path):
    groups, found = bench.bars(all_results(study))
    assert groups == ["KL(teacher || student)", "ln perplexity"]
    kl, ln_perplexity = found["KD + CE"]
    assert (kl.value, kl.low, kl.high) == pytest.approx((0.82, 0.80, 0.84))
    assert (ln_perplexity.low, ln_perplexity.high) == pytest.approx((2.94444, 2.98062), abs=1e-5)
    grouped_bars(tmp_path / "objectives.png", groups, found, "nats a token")
    assert (tmp_path / "objectives.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_records_are_thinned(tmp_path):
    source, target = tmp_path / "all.jsonl", tmp_path / "few.jsonl"
    source.write_text("".join(f'{{"n": {n}}}\n' for n in range(10)), encoding="utf-8")
    bench.write_held_out(source, target, every=4)
    assert [json.loads(line)["n"] for line in target.read_text().splitlines()] == [0, 4, 8]


def test_a_command_is_run_to_its_exit_code():
    assert bench.run_command([sys.executable, "-c", "print('not shown'); raise SystemExit(64)"]) == 64


def test_the_job_has_help_and_refuses_what_it_cannot_use():
    job = [sys.executable, "jobs/benchmark_objectives.py"]
    done = subprocess.run([*job, "--help"], capture_output=True, text=True, check=True)
    assert "KD + CE + hidden states" in done.stdout
    done = subprocess.run([*job, "--seeds", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert "argument --seeds: '0' is not a whole number of 1 or more" in done.stderr


@pytest.mark.parametrize("override", ["train.max_steps=3", "loss.terms.0.weight=2", "student.init={layers: 5}"])
def test_what_the_study_sets_is_not_overridden_in_silence(study, override):
    key = override.partition("=")[0]
    study = bench.Study(study.config, [override], study.eval_path, study.folder, 7)
    with pytest.raises(ConfigError, match=rf"^{key} is set by the benchmark"):
        study.check()
