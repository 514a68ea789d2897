"""A trial's early stopping, decided from the files of the sweep."""

import json

from raydistill.config.space import Search
from raydistill.search.trial import early_stop_reason
from tests.factories.sweeps import make_trial


def test_no_trial_is_stopped_for_scores_of_its_warm_up(tmp_path):
    """A run of 100 steps, compared with another one that leads from the first validation on."""
    for key, scores in {"behind": (1.0, 2.0, 3.0), "ahead": (5.0, 6.0, 7.0, 8.0)}.items():
        folder = make_trial(tmp_path, key, 0, 8.0, status=None)
        lines = [
            {"step": 25 * i, "total_steps": 100, "metric": "rouge2", "score": score}
            for i, score in enumerate(scores, 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    behind = tmp_path / "trials" / "behind"
    run = json.loads((behind / "run.json").read_text())
    reasons = {}
    for steps in (0, 40, 500):
        run["training"]["warmup_steps"] = steps
        (behind / "run.json").write_text(json.dumps(run))
        reasons[steps] = str(early_stop_reason(behind, Search(grace=0.3, reduction=2)))
    assert "after 60% of the steps" in reasons[0]  # the rungs are 30 % and 60 %
    assert "after 40% of the steps" in reasons[40]
    assert "after 50% of the steps" in reasons[500]
    run["training"]["warmup_steps"] = 500
    lines = (behind / "metrics.jsonl").read_text().splitlines(keepends=True)
    (behind / "metrics.jsonl").write_text(lines[0])
    assert early_stop_reason(behind, Search(grace=0.1)) is None  # a quarter is done, all of it warm-up
    run["training"]["warmup_steps"] = 0
    (behind / "run.json").write_text(json.dumps(run))
    assert early_stop_reason(behind, Search(grace=0.1)) is not None
