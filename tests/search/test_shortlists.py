"""Shortlists of a sweep: made once from training targets and label sets, with their coverage of held-out rows."""

from pathlib import Path

import pytest

from raydistill.cluster import snapshots, sync
from raydistill.config.run import Dataset, ExtraSources, Run
from raydistill.config.space import Space
from raydistill.core import artifact
from raydistill.core.errors import UserError
from raydistill.data.extra import ensure_extra
from raydistill.inference.shortlist import kept_tokens, read_map, restrict_map, stored_map
from raydistill.label_sets.label_set import Candidate
from raydistill.label_sets.manifest import LabelManifest
from raydistill.models.loading import load_config
from raydistill.models.tokenization import load_tokenizer, tokens_by_id
from raydistill.results.sweep_record import ExtraSourcesRecord, LabelSetScores
from raydistill.search.shortlists import ShortlistInputs, ensure_shortlists
from tests.factories.data_files import write_jsonl
from tests.factories.label_sets import write_labels
from tests.factories.sweeps import sweep_teacher
from tests.factories.workspace import make_world


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Space:
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    teacher, data = make_world(tmp_path)
    run = {"teacher": str(teacher), "dataset": {"name": str(data)}}
    return Space.model_validate({"name": "s", "run": run, "serving": {"shortlist": ["off", 20, "source"]}})


def runs_of(space: Space) -> list[Run]:
    return [Run.model_validate({"name": "s", **space.run})]


def test_shortlists_are_made_once_and_excluded_tokens_are_counted(
    space: Space, capsys: pytest.CaptureFixture[str]
) -> None:
    coverages = ensure_shortlists(space, runs_of(space), sweep_teacher())
    assert coverages.keys() == {"20", "source"}
    teacher = space.run["teacher"]
    tokenizer = load_tokenizer(teacher)
    kept = kept_tokens(tokenizer, load_config(teacher))
    fixed = read_map(stored_map(coverages["20"].folder), tokens_by_id(tokenizer), kept)
    assert coverages["20"].allowed_tokens == coverages["20"].allowed_tokens_batch == len(fixed.always)
    assert len(kept) <= len(fixed.always) <= 20 + len(kept)
    assert 0 < coverages["20"].share_of_tokens_outside < coverages["20"].share_of_rows_outside <= 1
    assert "of the tokens of the references that students are chosen on are outside" in capsys.readouterr().err
    times = [stored_map(coverage.folder).stat().st_mtime_ns for coverage in coverages.values()]
    assert ensure_shortlists(space, runs_of(space), sweep_teacher()) == coverages
    assert [stored_map(coverage.folder).stat().st_mtime_ns for coverage in coverages.values()] == times


def test_a_label_set_makes_another_shortlist_and_a_deleted_one_is_named(space: Space, tmp_path: Path) -> None:
    original = ensure_shortlists(space, runs_of(space), sweep_teacher())
    folder = tmp_path / "home" / "labels" / "set"
    rows = [(f"r0-{i}", [Candidate("the labels repeat these words", -1.0)]) for i in range(48)]
    write_labels(folder, rows, LabelManifest(rows=48))
    scores = {folder.name: LabelSetScores(teacher="t", rows=48, quality=None)}
    with_labels = ensure_shortlists(space, runs_of(space), sweep_teacher(label_sets=scores))
    assert {c.folder for c in original.values()}.isdisjoint(c.folder for c in with_labels.values())
    artifact.remove(folder)
    with pytest.raises(UserError, match="the label set was deleted"):
        ensure_shortlists(space, runs_of(space), sweep_teacher(label_sets=scores))


def test_labels_of_extra_sources_are_aligned_with_these_sources(space: Space, tmp_path: Path) -> None:
    """A shortlist from label sets alone would skip rows that the training split lacks."""
    home, texts = tmp_path / "home", ["A wholly different text.", "And one more of the kind."]
    path = write_jsonl(tmp_path / "more.jsonl", [{"text": text} for text in texts])
    data = Dataset.model_validate(space.run["dataset"])
    extra = ensure_extra(data, ExtraSources(name=str(path)), home / "extra")
    write_labels(
        home / "labels" / "set", [(f"extra:{i}", [Candidate("a label", -1.0)]) for i in range(2)], LabelManifest(rows=2)
    )
    record = ExtraSourcesRecord(folder=extra.name, name=str(path), rows=2, dropped={})
    scores = {"set": LabelSetScores(teacher="t", rows=2, quality=None)}
    teacher = sweep_teacher(label_sets=scores, extra=record)
    sources, targets = ShortlistInputs.of_sweep(runs_of(space), teacher).training_rows
    without, _ = ShortlistInputs.of_sweep(runs_of(space), sweep_teacher(label_sets=scores)).training_rows
    tokenizer = load_tokenizer(space.run["teacher"])
    decoded = tokenizer.batch_decode([list(row) for row in sources[-2:]], skip_special_tokens=True)
    assert [text.strip() for text in decoded] == texts
    assert len(sources) == len(targets) == len(without) + 2
    artifact.remove(extra)
    with pytest.raises(UserError, match="the extra sources were deleted"):
        ensure_shortlists(space, runs_of(space), teacher)


def test_a_map_is_restricted_to_the_tokens_that_a_model_has(tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_text("\ta b c\na\tb d\nd\ta\n")
    assert restrict_map(path, list("abcd"), tmp_path) == path
    assert restrict_map(path, list("abc"), tmp_path).read_text() == "\ta b c\na\tb\n"


def test_a_shortlist_that_was_made_before_a_kill_reaches_the_storage(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "storage").mkdir()
    monkeypatch.setenv(sync.STORAGE_ENV, f"file://{tmp_path / 'storage'}")
    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ensure_shortlists(space, runs_of(space), sweep_teacher())
    coverage = ensure_shortlists(space, runs_of(space), sweep_teacher())["20"]
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "other"))
    path = stored_map(coverage.folder)
    snapshots.pull(path.parent)
    assert path.is_file()
