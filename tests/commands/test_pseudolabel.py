"""The command `raydistill pseudolabel`: what it prepares before Ray starts."""

import pytest

from raydistill.config.run import Dataset, ExtraSources
from raydistill.core.errors import UserError
from raydistill.data.extra import ensure_extra, extra_dataset, read_extra
from raydistill.pseudolabel import prepare_extra
from tests.factories.data_files import write_jsonl
from tests.factories.workspace import corpus_rows, write_corpus


def test_extra_rows_of_the_command_are_those_of_a_run(tmp_path, monkeypatch):
    """A run of a sweep keeps validation rows apart; its label set is the one of the command nevertheless."""
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    data = write_corpus(tmp_path / "data", train=6, other=4)
    train, test = (corpus_rows(n, seed) for n, seed in ((6, 0), (4, 2)))
    sources = ["A text that is new.", train[0]["source"], test[1]["source"], "Another text that is new."]
    path = write_jsonl(tmp_path / "more.jsonl", [{"text": source} for source in sources])
    dataset = Dataset(name=str(data))
    with pytest.raises(UserError, match=r"more\.jsonl:3: equal to row 'r2-1' of the test split"):
        prepare_extra(dataset, str(path), None, "reject")
    prepared = prepare_extra(dataset, str(path), 2, "drop")
    run_data = Dataset(name=str(data), selection_share=0.5)
    folder = ensure_extra(
        run_data, ExtraSources(name=str(path)), tmp_path / "home" / "extra", max_rows=2, overlap="drop"
    )
    assert prepared == extra_dataset(folder)
    assert read_extra(folder).sources == [sources[0], sources[3]]
