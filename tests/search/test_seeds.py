"""Further seeds of the chosen students and their nearest rivals: which runs, their scores and costs."""

import shutil
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from raydistill.config.run import Run
from raydistill.config.space import Space, check_run_space
from raydistill.core.errors import UserError
from raydistill.evaluation.metrics import corpus_score
from raydistill.evaluation.paired_latency import StoppingRule
from raydistill.results.records import read_trials, seed_run_folder
from raydistill.results.selection import load_selection
from raydistill.results.tables import method_table, result_tables
from raydistill.results.trial_index import trial_index
from raydistill.search import finalists, prepare, seeds, serving_timing, shape_latency
from raydistill.search.finalists import unserved_repeats
from raydistill.search.prepare import PreparedSweep
from raydistill.search.seeds import SeedQueue, all_repeated, contenders, missing_repeats, repeat_with_seeds
from raydistill.search.summary import summary_record
from raydistill.search.sweep_folder import write_sweep_record
from raydistill.search.trial import TrialContext
from raydistill.training.run import train
from tests.factories.sweeps import (
    RUN,
    change_result,
    make_repeat,
    make_space,
    make_trial,
    serve_trial,
    shape_table,
    sweep_record,
    sweep_teacher,
    write_kill_space,
)
from tests.factories.workspace import command, last_json, make_world

SHORT = StoppingRule(min_pairs=2, max_seconds=0.2)
NOISE = np.random.default_rng(0).normal(0, 2, size=50)


def scored_rows(score: float) -> np.ndarray:
    """Fifty rows with this mean and the same noise for every student."""
    return score + NOISE - NOISE.mean()


@pytest.fixture
def sweep(tmp_path):
    """Three served trials within one budget: "best" is chosen, "near" is its rival, and "far" is much worse."""
    sweep_record(budgets={"any": {"latency_ms": 1000}}).write(tmp_path / "sweep.json")
    trials = {"best": (21.0, "4-3", 200.0), "near": (20.0, "4-2", 150.0), "far": (10.0, "4-1", 100.0)}
    for number, (key, (score, size, latency_ms)) in enumerate(trials.items()):
        folder = make_trial(tmp_path, key, number, score)
        change_result(folder, size=size, metrics={"rouge2": score, "latency_ms": latency_ms, "device_hours": 1.0})
        serve_trial(folder, score, scored_rows(score), latency_ms)
    return tmp_path


def test_the_chosen_student_and_its_nearest_rival_are_trained_with_further_seeds(sweep):
    space = make_space(seeds=3)
    selection = load_selection(sweep)
    assert selection.trial_key(str(selection.chosen_keys["any"])) == "best"
    assert [trial.key for trial in contenders(space, selection)] == ["best", "near"]
    missing = [(proposal.key, proposal.seed) for proposal in missing_repeats(space, selection)]
    assert missing == [("best", 1), ("best", 2), ("near", 1), ("near", 2)]
    make_repeat(sweep, "best", 1, 21.0)
    missing = [(proposal.key, proposal.seed) for proposal in missing_repeats(space, load_selection(sweep))]
    assert missing == [("best", 2), ("near", 1), ("near", 2)]
    assert missing_repeats(make_space(), selection) == []  # one seed is the search's own
    assert all_repeated(make_space(), sweep)
    assert not all_repeated(space, sweep)


def test_scores_are_means_over_seeds_and_may_choose_another_student(sweep):
    """The first seed of "best" was a lucky one. The student that is then chosen gets further seeds too."""
    before = load_selection(sweep)
    for seed, score in ((1, 17.0), (2, 16.0)):
        make_repeat(sweep, "best", seed, score, scored_rows(score))
    for seed, score in ((1, 20.4), (2, 19.6)):
        make_repeat(sweep, "near", seed, score, scored_rows(score))
    selection = load_selection(sweep)
    students = {selection.trial_key(student.key): student for student in selection.students}
    assert students["best"].score("rouge2") == pytest.approx(18.0)
    assert students["near"].score("rouge2") == pytest.approx(20.0)
    assert [student.num_seeds for student in students.values()] == [3, 3, 1]
    low, high = students["best"].interval
    assert low < 17 < 20 < high  # seeds of 16 to 21 points
    assert students["near"].interval[1] - students["near"].interval[0] < high - low
    assert selection.trial_key(str(selection.chosen_keys["any"])) == "near"
    assert "mean of 3 seeds" in selection.choices["any"].reason
    assert "mean of 3 seeds" not in before.choices["any"].reason
    assert students["best"].metrics["latency_ms"] == pytest.approx(200.0)
    assert students["best"].metrics["device_hours"] == 1.0
    assert all_repeated(make_space(seeds=3), sweep)


def test_seeds_count_in_device_hours_tables_and_json(sweep):
    assert trial_index(sweep).device_hours() == pytest.approx(3.0)
    for seed, score in ((1, 21.0), (2, 20.0)):
        make_repeat(sweep, "best", seed, score, scored_rows(score))
    assert trial_index(sweep).device_hours() == pytest.approx(4.0)
    assert {trial.key: trial.num_seeds for trial in read_trials(sweep)} == {"best": 3, "near": 1, "far": 1}
    selection = load_selection(sweep)
    _, rows = method_table(selection)
    assert [row[2] for row in rows] == ["4.000"]
    header, rows = result_tables(selection)[1]
    assert [row[header.index("seeds")] for row in rows] == ["1", "1", "3"]  # by latency
    finalists = {entry["key"]: entry["seeds"] for entry in summary_record(selection)["finalists"]}
    assert finalists["near"] == pytest.approx({"0": 20.0})
    assert finalists["best"] == pytest.approx({"0": 21.0, "1": 21.0, "2": 20.0})


def test_a_repeat_counts_once_it_is_served_like_its_trial(sweep):
    make_repeat(sweep, "best", 1, 11.0)
    selection = load_selection(sweep)
    [student] = [student for student in selection.students if student.folder.name == "best"]
    assert student.score("rouge2") == pytest.approx(21.0)
    [best] = [trial for trial in selection.trials if trial.key == "best"]
    [(repeat, configs)] = unserved_repeats(best)
    assert repeat.seed == 1
    assert [config.beams for config in configs] == [4]
    serve_trial(repeat.folder, 11.0, scored_rows(11.0), 200.0)
    [student] = [student for student in load_selection(sweep).students if student.folder.name == "best"]
    assert student.score("rouge2") == pytest.approx(16.0)


def test_a_failed_repeat_is_not_run_again_and_counts_in_no_mean(sweep):
    change_result(make_repeat(sweep, "best", 1, 1.0), status="failed", metrics={"device_hours": 0.5})
    selection = load_selection(sweep)
    missing = [(p.key, p.seed) for p in missing_repeats(make_space(seeds=2), selection)]
    assert missing == [("near", 1)]
    [student] = [student for student in selection.students if student.folder.name == "best"]
    assert student.score("rouge2") == pytest.approx(21.0)
    assert trial_index(sweep).device_hours() == pytest.approx(3.5)


def test_no_repeat_starts_at_the_limit_of_device_hours(sweep):
    proposals = missing_repeats(make_space(seeds=3), load_selection(sweep))
    queue = SeedQueue(make_space(seeds=3, max_device_hours=3.2), sweep, proposals)
    assert queue.num_remaining == 4
    assert queue.propose("a") == proposals[0]
    assert (queue.num_running, queue.num_remaining) == (1, 3)
    make_repeat(sweep, "best", 1, 21.0)
    assert queue.propose("b") is None
    queue.report("a", None)
    assert queue.num_running == 0


def test_the_run_of_a_repeat_differs_in_its_seed_and_is_not_stopped_early(tmp_path):
    space = make_space(sampler="tpe", seeds=2)
    shapes = shape_table({"4-4": {"latency_ms": 9.0}, "2-3": {"latency_ms": 5.0}})
    context = TrialContext(space, tmp_path, PreparedSweep(sweep_teacher(), shapes), "cpu")
    config = {"key": "sft-2-3-x", "number": 5, "params": {"method": "sft", "student.size": "2-3"}}
    job, repeat = context.make_job(config), context.make_job({**config, "seed": 7})
    assert job.check_stop is not None
    assert repeat.check_stop is None
    assert repeat.folder == seed_run_folder(tmp_path, "sft-2-3-x", 7)
    own, other = (run.run.model_dump() for run in (job, repeat))
    assert other["training"].pop("seed") == 7
    assert own["training"].pop("seed") == 0
    assert own == other
    assert (repeat.inputs.number, repeat.inputs.params) == (5, config["params"])


def test_further_seeds_need_a_budget_and_exclude_a_search_over_seeds():
    run = {**RUN, "training": {"seed": {"choice": [0, 1]}}}
    space = Space.model_validate({"name": "s", "run": run, "search": {"seeds": 2}})
    with pytest.raises(UserError, match=r"search\.seeds.*training\.seed"):
        check_run_space(space, "space.yaml", {})
    with pytest.raises(UserError, match=r"search\.seeds.*budget"):
        check_run_space(make_space(seeds=2), "space.yaml", {})


# The whole step on tiny real models, without Ray


class DirectTuner:
    """`TrialTuner` that runs the trials of a queue in this process; `trained` has their keys and seeds."""

    trained: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, context: TrialContext, runs: list[Run], callbacks: list[Any]) -> None:
        self.context = context

    def run(self, queue: SeedQueue) -> None:
        while proposal := queue.propose("id"):
            train_here(self.context, proposal.model_dump())
            queue.report("id", None)
            self.trained.append((proposal.key, proposal.seed))


def train_here(context: TrialContext, config: dict[str, Any]) -> None:
    job = context.make_job(config)
    job.folder.mkdir(parents=True, exist_ok=True)
    train(job.run, job.folder, lambda metrics, folder: None, job.inputs)


def run_here(function: Callable[..., Any], *args: Any, device: str, **_: Any) -> Any:
    """`run_exclusive` in this process, with one thread."""
    return function(*args, device, 1)


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """The context of a sweep with one trained and served trial, whose search asks for three seeds."""
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    for module in (prepare, finalists):
        monkeypatch.setattr(module, "run_exclusive", run_here)
    for name in ("BOUNDED_RULE", "REPORTED_RULE"):
        monkeypatch.setattr(serving_timing, name, SHORT)
    for name in ("SEARCH_RULE", "EXCLUSION_RULE"):
        monkeypatch.setattr(shape_latency, name, SHORT)
    monkeypatch.setattr(seeds, "TrialTuner", DirectTuner)
    monkeypatch.setattr(DirectTuner, "trained", [])
    teacher, data = make_world(tmp_path)
    run = {
        "teacher": str(teacher),
        "dataset": {"name": str(data), "max_source_tokens": 32, "max_target_tokens": 16, "selection_share": 0},
        "student": {"size": "2-3"},
        "training": {"teacher_cache": "off", "max_steps": 2, "warmup_steps": 1, "learning_rate": 1e-5},
        "decoding": {"beams": 2, "max_length": 12},
    }
    space = Space.model_validate(
        {"name": "s", "run": run, "search": {"trials": 1, "seeds": 3}, "budgets": {"any": {"params_m": 100}}}
        | {"serving": {"beams": [1], "precision": ["fp32"]}}
    )
    sweep = tmp_path / "home" / "sweeps" / "s"
    sweep.mkdir(parents=True)
    prepared = prepare.prepare(space, sweep, "cpu")
    write_sweep_record(space, sweep, prepared, "running")
    context = TrialContext(space, sweep, prepared, "cpu")
    train_here(context, {"key": "sft-2-3-x", "number": 0, "params": {}})
    finalists.serve_finalists(space, sweep, prepared.teacher, "cpu")
    return context


@pytest.mark.slow
def test_missing_seeds_are_trained_served_and_averaged(searched):
    space, sweep = searched.space, searched.sweep
    assert not all_repeated(space, sweep)
    repeat_with_seeds(searched)
    assert DirectTuner.trained == [("sft-2-3-x", 1), ("sft-2-3-x", 2)]
    assert all_repeated(space, sweep)
    assert finalists.all_served(space, sweep, searched.prepared.teacher)
    selection = load_selection(sweep)
    assert [student.num_seeds for student in selection.students] == [3] * len(selection.students)
    for student in selection.students:
        own = [run.score("rouge2") for run in student.repeats]
        scores = corpus_score("rouge2", student.row_statistics()), *own
        assert student.score("rouge2") == pytest.approx(sum(scores) / 3)
        assert student.interval[0] <= student.score("rouge2") <= student.interval[1]
    chosen = selection.student(str(selection.chosen_keys["any"]))
    assert chosen.test is not None
    assert "mean of 3 seeds" in chosen.label

    shutil.rmtree(seed_run_folder(sweep, "sft-2-3-x", 2))
    assert not all_repeated(space, sweep)
    repeat_with_seeds(searched)
    assert DirectTuner.trained[2:] == [("sft-2-3-x", 2)]
    assert load_selection(sweep).chosen_keys == selection.chosen_keys


@pytest.mark.slow
def test_a_sweep_trains_further_seeds_and_repeats_only_what_is_missing(tmp_path):
    home = tmp_path / "outputs"
    search = {"trials": 2, "sampler": "grid", "concurrent": 1}
    space = write_kill_space(tmp_path, search=search)
    first = last_json(command(home, "sweep", space, "--set", "run.method=sft", "--json"))
    assert all(len(entry["seeds"]) == 1 for entry in first["finalists"])
    options = ["--set", "run.method=sft", "--set", "search.seeds=2", "--json"]
    second = last_json(command(home, "sweep", space, *options))
    assert second["complete"]
    assert len(second["trials"]) == 2
    chosen = [entry for entry in second["finalists"] if entry["key"] == second["choices"]["any"]]
    assert all(list(entry["seeds"]) == ["0", "1"] for entry in chosen)
    scores = [sum(entry["seeds"].values()) / 2 for entry in chosen]
    assert [entry["metrics"]["rouge2"] for entry in chosen] == pytest.approx(scores)
    folders = sorted((home / "sweeps" / "killed" / "seeds").glob("*/"))
    assert folders
    times = {folder.name: (folder / "result.json").stat().st_mtime_ns for folder in folders}
    shutil.rmtree(folders[0])
    done = command(home, "sweep", space, *options)
    assert last_json(done)["choices"] == second["choices"]
    for folder in folders[1:]:
        assert (folder / "result.json").stat().st_mtime_ns == times[folder.name]
    assert (folders[0] / "result.json").is_file()
    again = command(home, "sweep", space, *options)
    assert "starts" not in again.stderr  # nothing is missing
