"""The tokenised pairs that a run trains on."""

from raydistill.config.run import Dataset
from raydistill.label_sets.label_set import Candidate, write_label_set
from raydistill.label_sets.manifest import LabelManifest
from raydistill.models.teacher import open_teacher
from raydistill.training.run import train
from tests.factories.models import save_tiny
from tests.factories.training import make_run, no_report, read_metrics


def test_pl_student_learns_the_pseudo_labels(workspace, tmp_path):
    """A student of one constant sentence reaches a far lower loss than a student of the original targets."""
    constant = [(f"train{i}", [Candidate("No one.", 0.0)]) for i in range(24)]
    write_label_set(tmp_path / "constant", constant, lambda: LabelManifest(rows=24))
    training = {"epochs": 10, "learning_rate": 0.03, "checks_per_epoch": 1, "patience": 10}
    run = make_run(workspace, "pl", training=training, labels=str(tmp_path / "constant"))
    train(run, tmp_path / "pl", no_report)
    train(make_run(workspace, training=training), tmp_path / "sft", no_report)
    losses = {name: read_metrics(tmp_path / name)[-1]["loss_data"] for name in ("pl", "sft")}
    assert losses["pl"] < 0.8 * losses["sft"]


def test_runs_with_different_numbers_of_rows_share_a_teacher(tmp_path):
    folder = str(save_tiny("bart", tmp_path / "t"))
    few, many = Dataset(name="a", train_rows=10), Dataset(name="a", train_rows=20)
    assert open_teacher(folder, few) is open_teacher(folder, many)
    assert open_teacher(folder, few).commit is None
