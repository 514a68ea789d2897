"""The paper's KD search, as a user runs it."""

import sqlite3
from pathlib import Path

from tests.factories.hub_cache import lay_out_dataset
from tests.factories.models import lay_out_model, save_tiny
from tests.factories.workspace import command, corpus_rows, invoke, last_json

ROOT = Path(__file__).parents[2]


def make_xsum_caches(folder: Path) -> dict[str, str]:
    """A tiny random 12-12 BART and rows of XSUM's format in hub caches, under the real names."""
    model = save_tiny("bart", folder / "bart", encoder_layers=12, decoder_layers=12, dropout=0.0)
    lay_out_model(folder / "hub", "facebook/bart-large-xsum", model)
    splits = {
        split: [
            {"document": r["source"].replace(". ", ".\n"), "summary": r["target"], "id": r["id"]}
            for r in corpus_rows(n, seed)
        ]
        for seed, (split, n) in enumerate({"train": 80, "validation": 8, "test": 8}.items())
    }
    lay_out_dataset(folder / "datasets", "EdinburghNLP/xsum", None, splits, "refs/convert/parquet")
    return {
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
    }


def test_the_papers_kd_search_runs_unchanged_to_a_registered_choice(tmp_path):
    env = make_xsum_caches(tmp_path)
    home = tmp_path / "outputs"
    space = ROOT / "search_spaces" / "kd_xsum.yaml"
    few = ["run.training.max_steps=3", "search.concurrent=1", "search.trials=3"]
    few += ["serving.beams=[1]", "serving.precision=[fp32]"]
    few += ["run.dataset.selection_share=0"]  # half of the eight rows triggers the check for repetition
    few += ["run.decoding.max_length=6"]  # the random teacher writes up to 62 tokens, which every timing repeats
    few += ["run.training.checks_per_epoch=1"]
    few += ["budgets={any: {latency_ms: 1000%}}"]  # the time of a tiny 12-6 varies, and may exceed the space's budgets
    settings = [part for setting in few for part in ("--set", setting)]
    done = command(home, "sweep", space, *settings, "--json", **env)
    summary = last_json(done)
    assert {t["size"] for t in summary["trials"]} == {"12-6", "12-3", "12-1"}
    assert all(t["method"] == "kd" for t in summary["trials"])
    # After three steps of a random student on eight rows, some trials repeat one word and fail
    assert "done" in {t["status"] for t in summary["trials"]}
    for trial in summary["trials"]:
        assert trial["status"] == "done" or "collapsed" in trial["reason"]
    assert {t["params"]["loss.alpha_hidden"] for t in summary["trials"]} == {3}
    arguments = ["--within", "params_m=100", "--name", "any"]
    [chosen] = last_json(invoke(home, "choose", "kd_xsum", *arguments, "--register", "--json"))["choices"]
    with sqlite3.connect(home / "mlflow.db") as store:
        aliases = dict(
            store.execute("select alias, version from registered_model_aliases where name = 'kd_xsum'").fetchall()
        )
    assert chosen["registered"]["uri"] == "models:/kd_xsum@any"
    assert str(aliases["any"]) == chosen["registered"]["version"]
    assert chosen["key"] in {t["key"] for t in summary["trials"] if t["status"] == "done"}
