"""The selection: which trials are finalists."""

from pathlib import Path

import numpy as np

from raydistill.results.selection import select_finalists
from tests.factories.sweeps import change_result, make_trial, sweep_record, sweep_teacher


def test_finalists_are_on_a_front_or_chosen(tmp_path: Path):
    """a and b are on the front of latency, c of parameters, d of device-hours, e is chosen, f is neither.

    No budget bounds parameters or device-hours alone, but a later `choose` may.
    """
    budgets = {"both": {"params_m": 2.5, "latency_ms": 55}}
    sweep_record(sweep_teacher(costs={}), budgets=budgets).write(tmp_path / "sweep.json")
    for number, (key, score, latency, params, hours) in enumerate(
        [
            ("a", 10.0, 50.0, 3.0, 2.0),
            ("b", 20.0, 90.0, 4.0, 2.0),
            ("c", 9.0, 60.0, 2.0, 2.0),
            ("d", 8.0, 70.0, 5.0, 1.0),
            ("e", 7.0, 55.0, 2.5, 2.0),
            ("f", 6.0, 70.0, 5.0, 2.0),
        ]
    ):
        folder = make_trial(tmp_path, key, number, score)
        costs = {"latency_ms": latency, "params_m": params, "device_hours": hours}
        change_result(folder, metrics={"rouge2": score, **costs})
        np.savez(folder / "rows.npz", validation=np.full(20, score))
    assert [trial.key for trial in select_finalists(tmp_path)] == ["a", "b", "c", "d", "e"]
