"""What `ray job submit --working-dir .` uploads, computed by Ray's own function: a job's files, and no others."""

import shutil
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env import packaging

ROOT = Path(__file__).parents[3]


def package(folder: Path, out: Path) -> dict[str, int]:
    """Name -> bytes of each file that Ray would send."""
    packaging._zip_files(str(folder), excludes=[], output_path=str(out), include_gitignore=True)
    with zipfile.ZipFile(out) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def test_the_repository_as_it_is(tmp_path):
    sent = package(ROOT, tmp_path / "package.zip")
    assert {name.split("/")[0] for name in sent} <= {"ray_kd", "jobs", "configs", "pyproject.toml"} | {
        path.name for path in ROOT.glob("*.yaml") if not path.name.startswith(".")
    }
    wanted = [*ROOT.glob("ray_kd/**/*.py"), *ROOT.glob("jobs/*.py"), *ROOT.glob("configs/**/*.yaml")]
    assert {str(path.relative_to(ROOT)) for path in wanted} | {"pyproject.toml"} <= sent.keys()
    assert not [name for name in sent if name.endswith((".pyc", "/"))]
    assert (tmp_path / "package.zip").stat().st_size < 2e6


@pytest.mark.parametrize(
    "name",
    [".git/config", ".venv/bin/python", ".venv-vllm/x", "runs/mine/driver.log", "tests/unit/test_a.py",
     "k8s/base/x.yaml",
     ".env", ".netrc", "models/teacher/model.safetensors", "data/train.jsonl", "README.md", "LICENSE", "Makefile",
     "ray_kd/__pycache__/a.pyc", "jobs/__pycache__/b.pyc", "a", ".mypy_cache/x.json", ".pre-commit-config.yaml",
     "docs/index.md", "id_rsa", "wandb/latest", "configs/.secret.yaml", "jobs/.env"],
)  # fmt: skip
def test_what_a_job_does_not_need_stays_here(tmp_path, name):
    home = tmp_path / "repository"
    home.mkdir()
    for ignore in (".gitignore", ".rayignore"):
        shutil.copyfile(ROOT / ignore, home / ignore)
    for one in (name, "jobs/distill.py", "ray_kd/data/plan.py", "configs/smoke/a.yaml", "pyproject.toml", "my.yaml"):
        (home / one).parent.mkdir(parents=True, exist_ok=True)
        (home / one).write_text("text")
    assert package(home, tmp_path / "package.zip").keys() == {
        "jobs/distill.py", "ray_kd/data/plan.py", "configs/smoke/a.yaml", "pyproject.toml", "my.yaml"
    }  # fmt: skip
