"""The end of a run, killed at each of its steps: the next call finishes the run with the same result."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from raydistill.core import artifact
from raydistill.core.artifact import Manifest
from raydistill.evaluation.metrics import Scores
from raydistill.evaluation.scoring import EvaluationResult
from raydistill.models.metadata import METADATA_FILE, CheckpointMetadata
from raydistill.models.saving import CHECKPOINT_KIND
from raydistill.training import run as training_run
from raydistill.training.inputs import RunInputs
from raydistill.training.records import RESULT_FILE, RunResult
from raydistill.training.run import ActiveRun, train
from raydistill.training.run_folder import delete_working_files
from raydistill.training.validation import Validator
from raydistill.training.workers import Worker
from tests.factories.kills import kill_at_every_step
from tests.factories.training import make_run, no_report, read_state

MEASURED = ("device_hours", "startup_s")  # times, which differ from call to call


@dataclass(frozen=True)
class FixedScores(Validator):
    """A validator that generates no texts, so that the end of a run takes milliseconds."""

    def score(self, folder, splits, beam, required_engine=None):
        artifact.open_artifact(folder, Manifest, CHECKPOINT_KIND)
        scores = Scores({"rouge2": 10.0}, np.full(6, 10.0), "rouge2")
        return {split: EvaluationResult(scores, (9.0, 11.0), 0.1, [], 1.0, "ctranslate2 fp32") for split in splits}


@pytest.fixture
def trained(workspace, tmp_path, monkeypatch) -> ActiveRun:
    """A run that has taken its last step; a copy of its folder is in `tmp_path`/copy."""

    def interrupt(*_):
        raise KeyboardInterrupt

    folder = tmp_path / "home" / "run"
    with monkeypatch.context() as context:
        context.setattr(training_run, "promote_best_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(make_run(workspace), folder, no_report)
    shutil.copytree(folder, tmp_path / "copy")
    active = training_run._prepare(make_run(workspace), folder, RunInputs(), Worker(), 0.0)
    validator = active.validator
    fixed = FixedScores(**vars(validator))
    return replace(active, validator=fixed)


def finish(active: ActiveRun) -> RunResult:
    """What `train` does after the last step."""
    result = RunResult.read_if_present(active.folder / RESULT_FILE)
    if result is None:
        return training_run._score_and_write_result(active, read_state(active.folder))
    delete_working_files(active.folder, result)
    return result


@pytest.mark.parametrize(("teacher_repetition", "status"), [(None, "done"), (-1.0, "failed")])
def test_a_run_killed_at_any_step_of_its_end_finishes_with_the_same_result(
    teacher_repetition, status, trained, tmp_path
):
    active = replace(trained, inputs=RunInputs(teacher_repetition=teacher_repetition))
    num_killed_before_result = 0

    def finish_again(folder: Path) -> tuple[dict, list[str]]:
        nonlocal num_killed_before_result
        num_killed_before_result += not (folder / RESULT_FILE).exists()
        result = finish(active)
        assert result == RunResult.read(folder / RESULT_FILE)
        if result.scored:
            manifest = artifact.open_artifact(folder / "best", Manifest, CHECKPOINT_KIND)
            files = {path.relative_to(folder / "best").as_posix() for path in (folder / "best").rglob("*")}
            assert files == {*manifest.files, artifact.MANIFEST, METADATA_FILE}
            assert CheckpointMetadata.read_from(folder / "best").scores["validation"].metrics["rouge2"] == 10.0
        content = result.model_dump(exclude={"ended_at"})
        content["metrics"] = {name: value for name, value in result.metrics.items() if name not in MEASURED}
        return content, sorted(path.name for path in folder.iterdir())

    outcomes = kill_at_every_step(
        lambda: finish(active),
        lambda: shutil.copytree(tmp_path / "copy", active.folder),
        active.folder,
        finish_again,
    )
    assert outcomes[-1][0]["status"] == status
    assert all(outcome == outcomes[-1] for outcome in outcomes)
    kept = ["best"] if status == "done" else []
    assert outcomes[-1][1] == [
        *(*kept, "input_fingerprints.json", "metrics.jsonl", "result.json", "rows.npz", "run.json")
    ]
    assert len(outcomes) > 20
    assert 10 < num_killed_before_result < len(outcomes)
