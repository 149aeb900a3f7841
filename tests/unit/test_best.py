"""The best checkpoint: found from the checkpoints alone, kept beside the newest, exported by name."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ray_kd import checkpoint, cli
from ray_kd.trainer.best import best_step
from tests.fake_run import write_run


def save(root: Path, step: int, **metrics: float | None) -> Path:
    tmp = checkpoint.begin(root, step)
    (tmp / "weights").write_bytes(b"w" * 10)
    return checkpoint.commit(tmp, root, step, next_slot=step, state={"metrics": {"train/loss": 0.1} | metrics})


def test_the_lowest_held_out_kl_is_the_best(tmp_path):
    assert best_step(tmp_path) is None
    save(tmp_path, 1)
    assert best_step(tmp_path) is None  # not evaluated
    for step, kl in ((2, 2.0), (3, 0.5), (4, 0.5), (5, None), (6, 0.7)):
        save(tmp_path, step, **{"eval/kl": kl, "eval/perplexity": 1.0 / step})
    assert best_step(tmp_path) == 4
    assert best_step(tmp_path, last=3) == 3
    assert best_step(tmp_path, last=1) is None
    (tmp_path / "step_00000004" / "state.json").write_text("{}")
    assert best_step(tmp_path) == 3


def test_without_the_exact_kl_it_is_that_of_the_top_k(tmp_path):
    for step, kl in ((1, 0.2), (2, 0.1), (3, 0.3)):
        save(tmp_path, step, **{"eval/topk_bucket_kl": kl})
    assert best_step(tmp_path) == 2


def test_it_is_kept_beside_the_newest_and_given_up_for_a_better_one(tmp_path):
    """What `_save` does after each commit; nothing but the folders is carried from one step to the next."""
    kept = []
    for step, kl in enumerate((3.0, 1.0, 2.0, 2.0, 1.5, 0.5, 0.7), start=1):
        save(tmp_path, step, **{"eval/kl": kl})
        best = best_step(tmp_path, last=step)
        checkpoint.rotate(tmp_path, step, keep_last=2, keep=(best,))
        kept.append([int(folder.name[5:]) for folder in checkpoint.folders(tmp_path)])
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7]]


def test_one_of_a_history_that_was_given_up_is_not_the_best(tmp_path):
    """The newest was damaged and the run went on from the one before."""
    for step, kl in ((1, 1.0), (2, 2.0), (4, 0.1), (3, 1.5)):
        save(tmp_path, step, **{"eval/kl": kl})
    best = best_step(tmp_path, last=3)
    assert best == 1
    assert checkpoint.rotate(tmp_path, 3, keep_last=1, keep=(best,)) == [2, 4]


def test_the_export_job_writes_the_best(tmp_path, capsys):
    run = write_run(tmp_path)
    assert cli.main("export", [str(run), str(tmp_path / "best"), "--best"]) == 0
    assert "step 4 of " in capsys.readouterr().out
    assert (load_file(tmp_path / "best" / "model.safetensors")["model.norm.weight"] == 4.0).all()
    assert "| kl | 3 | 0.75 |" in (tmp_path / "best" / "README.md").read_text()
    assert cli.main("export", [str(run), str(tmp_path / "newest")]) == 0
    assert (load_file(tmp_path / "newest" / "model.safetensors")["model.norm.weight"] == 5.0).all()


def test_an_export_of_the_best_is_refused_where_there_is_none(tmp_path, capsys):
    run = write_run(tmp_path, last=2, kl={2: None})
    assert cli.main("export", [str(run), str(tmp_path / "out"), "--best"]) == 64
    assert "no checkpoint whose step was evaluated" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        cli.main("export", [str(run), str(tmp_path / "out"), "--best", "--step", "2"])
    assert left.value.code == 64
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_damaged_best_is_refused_by_name(tmp_path, capsys):
    run = write_run(tmp_path)
    shard = run / "checkpoints" / "step_00000004" / "rank00000.json"
    shard.write_text(json.dumps(json.loads(shard.read_text()) | {"world": 2}))
    assert cli.main("export", [str(run), str(tmp_path / "out"), "--best"]) == 64
    assert "the checkpoint of step 4 is damaged" in capsys.readouterr().err
