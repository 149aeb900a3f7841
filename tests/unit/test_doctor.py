"""The doctor of run folders: every kind of damage is found and named, and what --fix says it does it does."""

import fcntl
import json
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ray_kd import checkpoint, cli, doctor, run_folder, storage
from ray_kd.errors import ConfigError
from ray_kd.trainer.ledger import Ledger
from tests.fake_run import ORDER, write_run


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Folders with a run in them, by the step it came to: written once, copied for each test."""
    written: dict[int, Path] = {}

    def home(last: int) -> Path:
        if last not in written:
            written[last] = tmp_path_factory.mktemp("home")
            write_run(written[last], last=last)
        return written[last]

    return home


@pytest.fixture
def run_of(homes, tmp_path):
    """A run folder that may be damaged; its prepared data and its student lie beside it and may be too."""

    def run(last: int) -> Path:
        home = tmp_path / "home"
        shutil.copytree(homes(last), home)
        path = home / "run" / "config.yaml"
        path.write_text(path.read_text().replace(str(homes(last)), str(home)))  # the student is the copy
        return home / "run"

    return run


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def test_a_finished_run(run_of):
    folder = run_of(ORDER.num_steps)
    report = doctor.examine(folder)
    assert [finding for finding in report.findings if finding.state != doctor.OK] == []
    assert {finding.check for finding in report.findings} == {
        "writers", "checkpoints", "leftovers", "config", "identity", "prepared data", "student", "metrics", "rows",
        "quarantine", "attempts", "ledger", "teacher", "final", "summary",
    }  # fmt: skip
    assert (report.state, report.is_broken, report.mended) == ("finished", False, [])
    assert report.verdict == "The run is finished: its student is in final/."
    said = str(report)
    assert "(best: step 4); a start takes step 5, next slot 20: 20 rows trained, 0 twice, 0 refused" in said
    assert "rows_planned 20, rows_consumed 20, rows_missing 0, rows_duplicated 0" in said
    assert "target_tokens 200" in said


def test_a_run_that_was_stopped(run_of):
    report = doctor.examine(run_of(3))
    assert not report.is_broken
    assert report.verdict == "The run can go on from step 2 of 5 with the same command."
    assert "those of steps 3 to 3 are after the newest checkpoint: a start cuts them" in str(report)


def test_a_run_before_its_first_checkpoint(run_of):
    report = doctor.examine(run_of(1))
    assert not report.is_broken
    assert report.verdict == "The run begins with step 1 of 5 with the same command."


def test_examining_and_fixing_a_healthy_run_change_nothing(run_of):
    folder = run_of(ORDER.num_steps)

    def content() -> dict[str, bytes]:
        files = (path for path in folder.parent.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
        return {str(path): path.read_bytes() for path in files}

    before = content()
    doctor.examine(folder)
    assert content() == before
    assert doctor.examine(folder, fix=True).mended == []
    assert content() == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_line(path: Path, place: int, text: str) -> None:
    lines = lines_of(path)
    lines[place] = text
    path.write_text("".join(lines))


def edit_metrics(folder: Path, place: int, **values: object) -> None:
    line = json.loads(lines_of(folder / "metrics.jsonl")[place]) | values
    edit_line(folder / "metrics.jsonl", place, json.dumps(line) + "\n")


def cut(path: Path, nbytes: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-nbytes])


def repeat_last_line(path: Path) -> None:
    path.write_text(path.read_text() + lines_of(path)[-1])


def rewrite_state(folder: Path, step: int, change: Callable[[dict], None]) -> None:
    """Another state.json in a checkpoint, with a manifest that fits."""
    home = folder / "checkpoints" / f"step_{step:08d}"
    state = json.loads((home / "state.json").read_text())
    change(state)
    (home / "state.json").write_text(json.dumps(state))
    manifest = json.loads((home / "manifest.json").read_text())
    manifest["files"] |= checkpoint.hash_files(home, ["state.json"])
    (home / "manifest.json").write_text(json.dumps(manifest))


def forget_rows(state: dict) -> None:
    """The ledger of a run that trained nothing, with the same totals."""
    totals = state["state"]["ledger"]["totals"]
    state["state"]["ledger"] = Ledger(ORDER.num_rows, ORDER.num_planned_rows).state() | {"totals": totals}


@dataclass(frozen=True)
class Damage:
    do: Callable[[Path], object]
    """To a run folder."""
    check: str
    state: str
    seen: str
    """Pattern of what is seen and advised."""
    fixed: str | None = None
    """Pattern of what the same check says after --fix; None: --fix leaves it."""
    last: int = 5
    verdict: str = "finished"
    """The run's state before --fix."""


STEP_4, STEP_5 = "checkpoints/step_00000004", "checkpoints/step_00000005"
DAMAGE = {
    "the newest checkpoint has a flipped bit": Damage(
        lambda f: flip(f / STEP_5 / "rank00000.safetensors"), "checkpoints", "broken",
        r"step_00000005/rank00000\.safetensors: sha256 differs .*--fix moves it to checkpoints/damaged/",
        fixed="verified in full: step_00000002, step_00000004 .*a start takes step 4",
    ),
    "an older checkpoint lacks a file": Damage(
        lambda f: (f / STEP_4 / "config.yaml").unlink(), "checkpoints", "broken",
        r"step_00000004/config\.yaml: missing",
        fixed="verified in full: step_00000002, step_00000005 .*a start takes step 5",
    ),
    "every checkpoint is damaged": Damage(
        lambda f: (f / "checkpoints/step_00000002/manifest.json").write_text("{"), "checkpoints", "broken",
        r"manifest\.json: cannot be read", fixed="none that can be used: a start begins with step 1", last=2,
        verdict="resumable",
    ),
    "a checkpoint was being written": Damage(
        lambda f: checkpoint.begin(f / "checkpoints", 6), "leftovers", "warning",
        r"checkpoints/\.tmp-step_00000006 of a killed attempt: --fix removes it", fixed="none",
    ),
    "a checkpoint has no manifest": Damage(
        lambda f: (f / STEP_4 / "manifest.json").unlink(), "leftovers", "warning", "step_00000004 of a", fixed="none"
    ),
    "a stop flag was left": Damage(lambda f: (f / ".stop").touch(), "leftovers", "warning", r"\.stop", fixed="none"),
    "a refusal was left": Damage(
        lambda f: (f / ".refused").write_text("no such model"), "leftovers", "warning", r"\.refused", fixed="none"
    ),
    "a probe was left": Damage(lambda f: (f / ".probe-7").touch(), "leftovers", "warning", "probe-7", fixed="none"),
    "a draft was left": Damage(
        lambda f: (f / ".summary.json.tmp").touch(), "leftovers", "warning", r"\.summary\.json\.tmp", fixed="none"
    ),
    "final was being written": Damage(
        lambda f: (f / ".final.partial-1f").mkdir(), "leftovers", "warning", r"\.final\.partial-1f", fixed="none"
    ),
    "config.yaml is gone": Damage(
        lambda f: (f / "config.yaml").unlink(), "config", "broken",
        r"does not exist: --fix takes the copy in step_00000005", fixed="loads",
    ),
    "config.yaml is damaged": Damage(
        lambda f: (f / "config.yaml").write_bytes(b"\xff{"), "config", "broken", "not valid YAML", fixed="loads"
    ),
    "config.yaml is gone and has no copy": Damage(
        lambda f: (f / "config.yaml").unlink(), "config", "broken", "a start with your own config writes it again",
        last=1, verdict="resumable",
    ),
    "run.json is damaged": Damage(
        lambda f: (f / "run.json").write_text("{"), "identity", "broken",
        r"run\.json' is damaged .*: restore it", last=3, verdict="blocked",
    ),
    "run.json is a list": Damage(
        lambda f: (f / "run.json").write_text("[]"), "identity", "broken", r"run\.json' is damaged", last=3,
        verdict="blocked",
    ),
    "run.json is gone": Damage(
        lambda f: (f / "run.json").unlink(), "identity", "broken", r"it has no run\.json: restore it", last=3,
        verdict="blocked",
    ),
    "config.yaml is of another run": Damage(
        lambda f: (f / "config.yaml").write_text((f / "config.yaml").read_text().replace("seed: 3", "seed: 4")),
        "identity", "broken", r"its run\.seed is 3, now 4", last=3, verdict="blocked",
    ),
    "the order is another": Damage(
        lambda f: [
            edit(f / "run.json", settings={}),
            (f / "config.yaml").write_text((f / "config.yaml").read_text().replace("seed: 3", "seed: 4")),
        ],
        "rows", "broken", "3 steps trained other rows than the order gives them, first step 1", last=3,
        verdict="blocked",
    ),
    "the prepared data are gone": Damage(
        lambda f: shutil.rmtree(f.parent / "prepared"), "prepared data", "warning", "is not there: a start prepares it"
    ),
    "the prepared data have a flipped bit": Damage(
        lambda f: flip(f.parent / "prepared/fake-10-16/train-00000.parquet"), "prepared data", "broken",
        "train-00000.parquet' is not what its manifest says: remove", last=3, verdict="blocked",
    ),
    "the prepared data have no manifest": Damage(
        lambda f: (f.parent / "prepared/fake-10-16/manifest.json").unlink(), "prepared data", "broken",
        "has no readable manifest.json", last=3, verdict="blocked",
    ),
    "the student is gone": Damage(
        lambda f: shutil.rmtree(f.parent / "student"), "student", "broken",
        r"config\.json' is missing: put the model back", last=3, verdict="blocked",
    ),
    "the student is cut": Damage(
        lambda f: cut(f.parent / "student/model.safetensors"), "student", "broken", r"bytes, its header says", last=3,
        verdict="blocked",
    ),
    "a line of metrics was being written": Damage(
        lambda f: cut(f / "metrics.jsonl", 30), "metrics", "warning",
        "ends in a line that was cut short: --fix cuts it", fixed="4 lines",
    ),
    "a line of metrics is garbage": Damage(
        lambda f: edit_line(f / "metrics.jsonl", 1, "\0\0\0\n"), "metrics", "broken",
        r"1 lines of metrics\.jsonl cannot be read, first line 2: --fix moves them to damaged\.jsonl",
        fixed="1 steps up to the newest checkpoint have no line, first step 2", last=3, verdict="blocked",
    ),
    "a line of metrics is gone": Damage(
        lambda f: edit_line(f / "metrics.jsonl", 2, ""), "metrics", "warning", "1 steps .* have no line, first step 3"
    ),
    "metrics are gone": Damage(
        lambda f: (f / "metrics.jsonl").unlink(), "metrics", "warning", "5 steps .* have no line, first step 1"
    ),
    "a line of metrics stands twice": Damage(
        lambda f: repeat_last_line(f / "metrics.jsonl"), "metrics", "broken", "step 5 stands there twice"
    ),
    "metrics are out of order": Damage(
        lambda f: edit_metrics(f, 2, step=1), "metrics", "broken", "step 1 stands there twice"
    ),
    "a step trained other rows": Damage(
        lambda f: edit_metrics(f, 1, **{"data/row_ids_sha256": "0" * 64}), "rows", "broken",
        "1 steps trained other rows .* first step 2", last=3, verdict="blocked",
    ),
    "a step began at another slot": Damage(
        lambda f: edit_metrics(f, 0, **{"data/slot_start": 4}), "rows", "broken", "first step 1", last=3,
        verdict="blocked",
    ),
    "a line of the quarantine is garbage": Damage(
        lambda f: (f / "quarantine.jsonl").write_text("{}\n"), "quarantine", "broken", "1 lines", fixed="0 records"
    ),
    "attempts are cut": Damage(
        lambda f: cut(f / "attempts.jsonl"), "attempts", "warning", "cut short", fixed="0"
    ),
    "a line of a teacher's journal is garbage": Damage(
        lambda f: edit_line(f / "teacher/actor-00001.jsonl", 0, '{"slots": [0,\n'), "teacher", "broken",
        r"actor-00001\.jsonl cannot be read, first line 1", fixed="16 rows computed",
    ),
    "rows are missing in the ledger": Damage(
        lambda f: rewrite_state(f, 2, forget_rows), "ledger", "broken",
        "8 rows up to slot 8 were neither trained nor refused", last=3, verdict="blocked",
    ),
    "the ledger is of another batch size": Damage(
        lambda f: rewrite_state(f, 2, lambda state: state.update(next_slot=9)), "ledger", "broken",
        "next slot 9 is not that of step 2 with 4 rows a step", last=3, verdict="blocked",
    ),
    "final has a cut file": Damage(
        lambda f: cut(f / "final/model.safetensors"), "final", "broken", r"--fix moves it to final\.damaged/",
        fixed="not there yet", verdict="blocked",
    ),
    "final lacks its weights": Damage(
        lambda f: (f / "final/model.safetensors").unlink(), "final", "broken", "no safetensors", fixed="not there yet",
        verdict="blocked",
    ),
    "summary.json is damaged": Damage(
        lambda f: (f / "summary.json").write_text('{"exit_code": 0'), "summary", "broken",
        r"is damaged .*--fix moves it to summary\.json\.damaged", fixed="not there", verdict="blocked",
    ),
    "summary.json counts wrongly": Damage(
        lambda f: edit(f / "summary.json", rows_missing=2, rows_duplicated=1), "summary", "broken",
        r"wrong about rows_missing 2 \(counted 0\), rows_duplicated 1 \(counted 0\)",
    ),
    "summary.json is of an earlier attempt": Damage(
        lambda f: edit(f / "summary.json", steps=1), "summary", "ok", "no counts of the same step", last=2,
        verdict="resumable",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_mended(run_of, name):
    damage = DAMAGE[name]
    folder = run_of(damage.last)
    damage.do(folder)
    report = doctor.examine(folder)
    found = [finding for finding in report.findings if finding.check == damage.check and finding.state == damage.state]
    assert any(re.search(damage.seen, str(finding)) for finding in found), report
    assert (report.state, report.is_broken) == (damage.verdict, damage.state == "broken"), report.verdict

    fixed = doctor.examine(folder, fix=True)
    now = "\n".join(str(finding) for finding in fixed.findings if finding.check == damage.check)
    if damage.fixed is None:
        assert fixed.mended == []
        assert re.search(damage.seen, now) or damage.last != 5, now
    else:
        assert {finding.check for finding in fixed.mended} == {damage.check}
        assert re.search(damage.fixed, now), now
        assert not fixed.is_broken, fixed
        assert doctor.examine(folder).state in ("resumable", "finished")
        assert doctor.examine(folder, fix=True).mended == []


def test_a_damaged_checkpoint_is_moved_and_not_found_there(run_of):
    folder = run_of(ORDER.num_steps)
    root = folder / "checkpoints"
    for count in (1, 2):
        flip(root / "step_00000005" / "rank00000.safetensors")
        doctor.examine(folder, fix=True)
        assert len(list((root / "damaged").iterdir())) == count
        shutil.copytree(root / "damaged" / "step_00000005", root / "step_00000005")
        flip(root / "step_00000005" / "rank00000.safetensors")
    assert sorted(path.name for path in (root / "damaged").iterdir()) == ["step_00000005", "step_00000005-2"]
    shutil.rmtree(root / "step_00000005")
    assert checkpoint.sweep(root) == []
    assert checkpoint.newest_verified(root) == root / "step_00000004"
    assert checkpoint.rotate(root, 4, keep_last=1) == [2]
    assert (root / "damaged" / "step_00000005-2" / "manifest.json").exists()


def test_no_line_is_lost(run_of):
    folder = run_of(3)
    edit_line(folder / "metrics.jsonl", 0, "\N{SNOWMAN} what?\n")
    edit_line(folder / "teacher" / "actor-00001.jsonl", 1, "[]\n")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "tr')
    doctor.examine(folder, fix=True)
    taken = [json.loads(line) for line in lines_of(folder / "damaged.jsonl")]
    assert taken == [
        {"file": "metrics.jsonl", "line": 1, "text": "\N{SNOWMAN} what?"},
        {"file": "metrics.jsonl", "line": 4, "text": '{"step": 4, "tr'},
        {"file": "teacher/actor-00001.jsonl", "line": 2, "text": "[]"},
    ]
    assert [json.loads(line)["step"] for line in lines_of(folder / "metrics.jsonl")] == [2, 3]


def test_refused_rows_are_not_lost_ones(run_of):
    folder = run_of(3)
    rewrite_state(folder, 2, forget_rows)
    lines = [{"source": "teacher", "slot": slot, "row_id": 0, "reason": "no answer"} for slot in range(8)]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = doctor.examine(folder)
    assert "each row up to slot 8 was trained once (0) or refused (8)" in str(report)
    (folder / "quarantine.jsonl").unlink()
    assert doctor.examine(folder).state == "blocked"
    rewrite_state(folder, 2, lambda state: state["state"]["ledger"]["totals"].update(rows_refused=8))
    assert doctor.examine(folder).state == "resumable"


HOLD = """
import sys
from pathlib import Path
from ray_kd.locks import {0} as lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize(("kind", "exit_code"), [("driver_lock", 64), ("writer_lock", 75)])
def test_a_living_run_is_examined_and_not_touched(run_of, kind, exit_code, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_LOCK_TIMEOUT_S", 0.3)
    folder = run_of(3)
    checkpoint.begin(folder / "checkpoints", 4)
    cut(folder / "metrics.jsonl", 5)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(kind), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        report = doctor.examine(folder)
        assert report.state == "running"
        assert report.verdict == "The run is under way, its newest checkpoint is of step 2 of 5."
        assert all(finding.state == doctor.OK for finding in report.findings), report
        who = f"driver pid {process.pid} on" if kind == "driver_lock" else "train workers"
        assert f"written now by {who}" in str(report)
        assert cli.main("doctor", [str(folder), "--fix"]) == exit_code
        assert "another run" in (said := capsys.readouterr().err) or "still hold" in said
    finally:
        process.communicate(input="\n", timeout=60)
    assert (folder / "checkpoints" / ".tmp-step_00000004").exists()
    assert cli.main("doctor", [str(folder), "--fix"]) == 0


def test_looking_does_not_keep_the_locks(run_of):
    folder = run_of(3)
    doctor.examine(folder, fix=True)
    doctor.examine(folder)
    for name in (".driver.lock", ".writers.lock"):
        with (folder / name).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_job_and_its_exit_codes(run_of, tmp_path, capsys):
    folder = run_of(3)
    assert cli.main("doctor", [str(folder)]) == 0
    assert capsys.readouterr().out.endswith("\nThe run can go on from step 2 of 5 with the same command.\n")
    edit_line(folder / "metrics.jsonl", 0, "?\n")
    assert cli.main("doctor", [str(folder), "--json"]) == 65
    document = json.loads(capsys.readouterr().out)
    assert (document["state"], document["is_broken"], document["mended"]) == ("blocked", True, [])
    (broken,) = [finding for finding in document["findings"] if finding["state"] == "broken"]
    assert broken == {
        "check": "metrics", "state": "broken", "seen": "1 lines of metrics.jsonl cannot be read, first line 1",
        "advice": "--fix moves them to damaged.jsonl", "blocks": True,
    }  # fmt: skip
    assert cli.main("doctor", [str(folder), "--fix"]) == 0
    assert capsys.readouterr().out.startswith("mended   metrics        1 lines of metrics.jsonl cannot be read")
    for nothing in (tmp_path / "nowhere", tmp_path):
        assert cli.main("doctor", [str(nothing), "--fix"]) == 64
        assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_the_doctor_needs_neither_ray_nor_torch(run_of):
    code = (
        "import sys; from ray_kd.cli import dispatch; code = dispatch(sys.argv[1:])\n"
        "print({'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules)); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", str(run_of(3))], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\nset()\n")


def test_a_run_in_a_store(object_store, run_of, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("ray_kd.locks._SETTLE_S", 0.0)
    home = run_of(3).parent
    there = storage.path(f"{object_store.uri}/{uuid.uuid4().hex}")
    files = [path for path in home.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    storage.upload(home, there, [path.relative_to(home).as_posix() for path in files])
    folder = there / "run"
    with pytest.raises(ConfigError, match="holds no run"):
        doctor.examine(there / "elsewhere")
    report = doctor.examine(folder)
    assert all(finding.state == doctor.OK for finding in report.findings), report
    assert report.verdict == "The run can go on from step 2 of 5 with the same command."

    shard = folder / "checkpoints" / "step_00000002" / "rank00000.safetensors"
    shard.write_bytes(bytes(len(shard.read_bytes())))  # of the right size
    (folder / "checkpoints" / "step_00000004" / "rank00000.json").write_text("{}")
    (folder / ".stop").write_text("")
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text()[:-3])
    report = doctor.examine(folder)
    assert "checkpoints    step_00000002/rank00000.safetensors: sha256 differs" in str(report)
    fixed = doctor.examine(folder, fix=True)
    assert [finding.check for finding in fixed.mended] == ["checkpoints", "leftovers", "leftovers", "metrics"]
    assert not fixed.is_broken, fixed
    assert fixed.verdict == "The run begins with step 1 of 5 with the same command."
    names = set(storage.sizes(folder))
    assert "checkpoints/damaged/step_00000002/manifest.json" in names
    assert not [name for name in names if name.startswith("checkpoints/step_") or name == ".stop"]
    assert len(list(storage.read_lines(folder / "metrics.jsonl"))) == 2
    assert run_folder.content_of(folder)
