"""The search's study on disk, without Ray's actors: what is proposed, what is taken up after a kill."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from raydistill.config.run import Run
from raydistill.config.space import Search, Space, make_run, read_space
from raydistill.models.loading import load_config
from raydistill.search.dry_run import describe_stopping, estimate_infeasible_sizes
from raydistill.search.prepare import PreparedSweep
from raydistill.search.progress import ProgressCallback
from raydistill.search.shape_latency import count_params_m
from raydistill.search.study import StopReason, StudySearch, final_report, trial_key
from raydistill.search.trial import early_stop_reason
from raydistill.search.tune_search import find_infeasible_sizes
from tests.factories.models import save_tiny
from tests.factories.sweeps import RUN, make_trial

ROOT = Path(__file__).parents[2]
DONE = {"finished": True, "status": "done", "score": 10.0, "latency_ms": 5.0}


def space(**search):
    return Space.model_validate({"name": "s", "run": RUN, "search": {"sampler": "grid", "trials": 6, **search}})


def everything(searcher, prefix="a"):
    proposals = []
    for n in range(50):
        proposal = searcher.suggest(f"{prefix}{n}")
        if not isinstance(proposal, dict):
            return proposals
        proposals.append(proposal)
    raise AssertionError("the search does not end")


def test_a_grid_is_every_combination_once_and_no_more(tmp_path):
    found = [tuple(sorted(p["chosen"].items())) for p in everything(StudySearch(space(), tmp_path))]
    sizes = ("2-3", "2-1")
    wanted = [(("method", "sft"), ("student.size", s)) for s in sizes]
    wanted += [(("loss.alpha_hidden", a), ("method", "kd"), ("student.size", s)) for s in sizes for a in (1, 3)]
    assert sorted(found) == sorted(wanted)


def test_the_same_settings_are_not_tried_twice_and_a_small_space_ends(tmp_path):
    keys = [p["key"] for p in everything(StudySearch(space(sampler="tpe"), tmp_path))]
    assert sorted(keys) == sorted(set(keys))
    assert len(keys) == 6


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_sampler_that_is_stuck_goes_on_by_chance_to_the_last_combination(tmp_path, sampler):
    """Scores are made up: the sampler's favourites are soon all tried, and it would propose nothing else."""
    asked = read_space(ROOT / "benchmarks" / "spaces" / "search_demo.yaml")
    asked = asked.model_copy(update={"search": Search(trials=99, sampler=sampler, seed=3)})

    def proposals(folder):
        folder.mkdir()
        searcher = StudySearch(asked, folder)
        found = []
        while isinstance(proposal := searcher.suggest(str(len(found))), dict):
            at = proposal["chosen"]
            score = 10.0 + 5 * (at["training.learning_rate"] == 1e-3) + len(at["method"])
            costs = {"score": score, "latency_ms": float(at["student.size"][-1])}
            searcher.on_trial_complete(str(len(found)), {**DONE, **costs})
            found.append(proposal["key"])
        assert searcher.ended == StopReason("every combination of the space has had its trial", exhausted=True)
        return found

    found = proposals(tmp_path / "a")
    assert len(found) == len(set(found)) == (1 + 2 + 1) * 3 * 2 * 5  # sft, kd with either coefficient, pl
    assert proposals(tmp_path / "b") == found


def test_a_grid_passes_over_any_number_of_barred_combinations(tmp_path, monkeypatch):
    monkeypatch.setattr("raydistill.search.study.MAX_DUPLICATES", 1)
    monkeypatch.setattr("raydistill.search.study.MAX_REJECTIONS", 1)
    assert len(everything(StudySearch(space(), tmp_path, infeasible_sizes={"2-3"}))) == 3


def test_the_study_on_disk_is_optunas_own(tmp_path):
    """What optuna-dashboard reads: directions, what was chosen, scores and costs, without a line of ours."""
    searcher = StudySearch(space(), tmp_path)
    asked = searcher.suggest("a")
    searcher.on_trial_complete("a", {**DONE, "score": 12.5, "latency_ms": 40.0})
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    study = optuna.load_study(study_name=space().name, storage=storage)
    (trial,) = study.get_trials(states=[TrialState.COMPLETE])
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert (trial.values, trial.user_attrs["key"]) == ([12.5, 40.0], asked["key"])
    assert trial.params["method"] == asked["chosen"]["method"]


def test_first_points_come_first(tmp_path):
    asked = Space.model_validate(
        {"name": "s", "run": RUN, "points": [{"method": "kd", "student.size": "2-1", "loss.alpha_hidden": 3}]}
    )
    first = StudySearch(asked, tmp_path).suggest("a")
    assert first["chosen"] == {"method": "kd", "student.size": "2-1", "loss.alpha_hidden": 3}


def test_a_fixed_seed_proposes_the_same_when_trials_run_one_at_a_time(tmp_path):
    run = {**RUN, "training": {"learning_rate": {"log_uniform": [1e-5, 1e-2]}}}

    def proposals(folder, seed):
        folder.mkdir()
        searcher = StudySearch(
            Space.model_validate({"name": "s", "run": run, "search": {"seed": seed, "trials": 14}}), folder
        )
        found = []
        for n in range(14):  # the sampler draws at random for ten trials, then models
            proposal = searcher.suggest(str(n))
            found.append(proposal["chosen"])
            searcher.on_trial_complete(str(n), {**DONE, "score": n % 5})
        return found

    assert proposals(tmp_path / "a", 1) == proposals(tmp_path / "b", 1)
    assert proposals(tmp_path / "c", 2) != proposals(tmp_path / "d", 1)


def test_after_a_kill_finished_trials_are_not_proposed_again_and_those_under_way_are(tmp_path):
    first = StudySearch(space(), tmp_path)
    done, under_way, finished_unseen = (first.suggest(f"a{n}") for n in range(3))
    first.on_trial_complete("a0", DONE)
    # The third had written its result when everything was killed; nobody had told the search.
    folder = tmp_path / "trials" / finished_unseen["key"]
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"status": "done", "metrics": {"score": 7.0, "latency_ms": 3.0}}))

    second = StudySearch(space(), tmp_path)
    assert second.finished == 2
    proposals = everything(second, "b")
    keys = [p["key"] for p in proposals]
    assert done["key"] not in keys
    assert finished_unseen["key"] not in keys
    assert under_way["key"] in keys
    assert len(keys) == 4
    assert next(p for p in proposals if p["key"] == under_way["key"])["number"] == under_way["number"]
    assert len({p["number"] for p in proposals} | {done["number"], finished_unseen["number"]}) == 6
    for n in range(4):
        second.on_trial_complete(f"b{n}", DONE)
    third = StudySearch(space(), tmp_path)
    assert third.finished == 6
    assert everything(third, "c") == []


def test_killed_again_and_again_before_anything_is_done_nothing_is_lost_or_doubled(tmp_path):
    for attempt in range(3):
        searcher = StudySearch(space(), tmp_path)
        for n in range(2):
            assert isinstance(searcher.suggest(f"{attempt}-{n}"), dict)
    keys = [p["key"] for p in everything(StudySearch(space(), tmp_path), "z")]
    assert len(keys) == len(set(keys)) == 6


def test_a_trial_that_died_is_taken_up_by_the_next_command(tmp_path):
    first = StudySearch(space(), tmp_path)
    died = first.suggest("a")
    first.on_trial_complete("a", None, error=True)
    rest = everything(first, "b")
    for n in range(len(rest)):
        first.on_trial_complete(f"b{n}", DONE)
    assert [p["key"] for p in everything(StudySearch(space(), tmp_path), "c")] == [died["key"]]


def test_a_stopped_trial_is_over_with_the_score_that_it_had(tmp_path):
    searcher = StudySearch(space(), tmp_path)
    searcher.suggest("a")
    stopped = {"status": "stopped", "metrics": {"score": 4.0, "latency_ms": 5.0}}
    searcher.on_trial_complete("a", final_report(stopped, "latency_ms"))
    assert StudySearch(space(), tmp_path).finished == 1
    assert [trial.values for trial in searcher._ot_study.best_trials] == [[4.0, 5.0]]


@pytest.mark.parametrize("sampler", ["tpe", "grid", "random"])
def test_a_shape_that_no_budget_admits_is_never_started(tmp_path, sampler):
    """Also while the sampler models: with two objectives it must bear trials that are pruned without values."""
    endless = {"training": {"learning_rate": {"log_uniform": [1e-5, 1e-2]}}} if sampler != "grid" else {}
    run = {**RUN, **endless}
    asked = Space.model_validate({"name": "s", "run": run, "search": {"sampler": sampler, "trials": 20}})
    searcher = StudySearch(asked, tmp_path, infeasible_sizes={"2-3"})
    found = []
    for n in range(20):
        proposal = searcher.suggest(str(n))
        if not isinstance(proposal, dict):
            break
        found.append(proposal["chosen"]["student.size"])
        searcher.on_trial_complete(str(n), {**DONE, "score": n % 5})
    assert set(found) == {"2-1"}
    assert len(found) == (3 if sampler == "grid" else 20)
    assert searcher.finished == len(found)


def test_no_trial_starts_once_the_time_or_the_device_hours_are_used_up(tmp_path):
    late, sweep = tmp_path / "late", tmp_path / "dear"
    late.mkdir()
    sweep.mkdir()
    assert StudySearch(space(max_hours=1e-9), late).suggest("a") == "FINISHED"
    begun = time.monotonic() - 3601  # the command, whose preparation took an hour
    assert StudySearch(space(max_hours=1), late, start_time=begun).suggest("a") == "FINISHED"
    asked = space(max_device_hours=1.0)
    searcher = StudySearch(asked, sweep)
    (sweep / "sweep.json").write_text(json.dumps({"teacher_gpu_hours": 0.25}))
    for number, hours in enumerate((0.5, 0.5)):
        assert isinstance(searcher.suggest(str(number)), dict)
        folder = sweep / "trials" / f"t{number}"
        folder.mkdir(parents=True)
        result = {"status": "failed" if number else "done", "metrics": {"gpu_hours": hours}}
        (folder / "result.json").write_text(json.dumps(result))
    assert searcher.suggest("2") == "FINISHED"  # 0.25 + 0.5 + 0.5, the failed one charged too


def test_a_failed_run_is_over_and_never_on_the_studys_front(tmp_path):
    searcher = StudySearch(space(), tmp_path)
    failed = searcher.suggest("a")
    searcher.on_trial_complete("a", final_report({"status": "failed", "metrics": {}}, "latency_ms"))
    again = StudySearch(space(), tmp_path)
    assert again.finished == 1
    assert failed["key"] not in [p["key"] for p in everything(again, "b")]
    again.on_trial_complete("b0", DONE)
    assert [trial.values for trial in again._ot_study.best_trials] == [[10.0, 5.0]]


def test_a_point_taken_but_not_yet_named_when_the_kill_came_is_proposed_again(tmp_path):
    StudySearch(space(), tmp_path)._ot_study.ask()
    assert len(everything(StudySearch(space(), tmp_path))) == 6


def test_points_that_a_kill_kept_from_being_enqueued_are_enqueued_by_the_next_command(tmp_path, monkeypatch):
    import optuna

    enqueue = optuna.Study.enqueue_trial
    calls = []

    def dies(self, values, *more, **named):
        calls.append(values)
        if len(calls) == 3:
            raise KeyboardInterrupt
        enqueue(self, values, *more, **named)

    monkeypatch.setattr(optuna.Study, "enqueue_trial", dies)
    with pytest.raises(KeyboardInterrupt):
        StudySearch(space(), tmp_path)
    monkeypatch.undo()
    assert len(everything(StudySearch(space(), tmp_path))) == 6


def test_the_key_is_of_the_settings_and_not_of_the_name():
    chosen = {"method": "sft", "student.size": "2-3"}
    a, b = make_run(space(), chosen, "one"), make_run(space(), chosen, "two")
    assert trial_key(a) == trial_key(b)
    assert trial_key(a) != trial_key(make_run(space(), {**chosen, "student.size": "2-1"}, "one"))


def leave_trial(sweep, key, size, status, **metrics):
    folder = sweep / "trials" / key
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"status": status, "size": size, "metrics": metrics}))


def test_the_watch_tells_where_the_search_stands(capsys, tmp_path):
    """One trial was over before, and the teacher's passes took a quarter of an hour."""
    (tmp_path / "sweep.json").write_text(json.dumps({"teacher_gpu_hours": 0.25}))
    leave_trial(tmp_path, "before", "2-2", "done", rouge2=15.0, gpu_hours=1.0)
    watch = ProgressCallback(tmp_path, Search(trials=6), "rouge2")
    watch.begun = time.monotonic() - 240
    for number, (size, score) in enumerate([("2-3", 20.0), ("2-1", 9.0), ("2-3", 18.0)]):
        trial = SimpleNamespace(trial_id=str(number), config={"number": number, "key": f"k{number}", "size": size})
        watch.on_trial_start(0, [], trial)
        watch.on_trial_result(0, [], trial, {"step": 5, "score": score - 1})
        leave_trial(tmp_path, f"k{number}", size, "done", rouge2=score, gpu_hours=0.5)
        watch.on_trial_result(0, [], trial, {"finished": True, "status": "done", "score": score, "gpu_hours": 0.5})
    failed = SimpleNamespace(trial_id="9", config={"number": 9, "key": "k9", "size": "2-1"})
    watch.on_trial_start(0, [], failed)
    leave_trial(tmp_path, "k9", "2-1", "failed", gpu_hours=0.25)
    watch.on_trial_result(0, [], failed, {"finished": True, "status": "failed", "gpu_hours": 0.25})
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == "trial 9 k9 is over after 0 s: failed"
    # four trials in four minutes, one left
    assert lines[-1] == (
        "  5 of 6 trials over; 3.000 device-hours; about 1 min left; best so far: 2-1 9.00, 2-2 15.00, 2-3 20.00"
    )


def test_the_time_left_respects_the_searchs_limits(tmp_path):
    """Ten of twenty trials in an hour, for two device-hours: another hour, if nothing ends it before."""
    (tmp_path / "sweep.json").write_text(json.dumps({"teacher_gpu_hours": 1.0}))

    def left(**limits):
        watch = ProgressCallback(tmp_path, Search(trials=20, **limits), "rouge2", setup_s=300)
        return watch.estimate_minutes_left(3600, num_finished=10, hours=3.0)

    assert left() == 60
    assert left(max_hours=1.5) == 25
    assert left(max_device_hours=3.5) == 15  # of which one was the teacher's
    assert left(max_hours=1.2, max_device_hours=3.5) == pytest.approx(7)
    assert left(max_device_hours=2.5) == 0


def test_a_shape_is_barred_only_if_it_is_over_the_budget_with_the_fewest_beams_too():
    shapes = {"2-3": {"latency_ms": 90.0}, "2-1": {"latency_ms": 50.0}}
    fewest = {"2-3": {"latency_ms": 45.0}, "2-1": {"latency_ms": 30.0}}
    prepared = PreparedSweep({"size": "2-3", "costs": shapes["2-3"]}, shapes, fewest)
    for bound, barred in ((90, set()), (45, set()), ("50%", set()), (44, {"2-3"}), ("40%", {"2-3"})):
        asked = space().model_copy(update={"budgets": {"fast": {"latency_ms": bound}}})
        assert find_infeasible_sizes(asked, prepared) == barred


@pytest.mark.parametrize("trials", [1, 4])
def test_the_study_counts_what_is_over(tmp_path, trials):
    searcher = StudySearch(space(), tmp_path)
    for n in range(trials):
        searcher.suggest(str(n))
        searcher.on_trial_complete(str(n), DONE)
    assert searcher.finished == trials


def test_the_plan_says_which_shapes_are_not_trained_and_when_trials_stop(tmp_path):
    teacher = save_tiny("bart", tmp_path / "teacher")
    config = load_config(teacher)
    between = (count_params_m(config, "2-1") + count_params_m(config, "2-3")) / 2
    asked = space(sampler="tpe", max_device_hours=3)
    budgets = {"small": {"params_m": between}, "share": {"params_m": "1%"}}
    asked = asked.model_copy(update={"budgets": budgets})
    barred, remark = estimate_infeasible_sizes(asked, ["2-1", "2-3", "full"], config, tmp_path)
    assert barred == ["2-3", "full"]  # the teacher has 2-3 layers
    assert "by their parameters" in remark
    shapes = {"2-1": {"latency_ms": 50.0}, "2-3": {"latency_ms": 90.0}}
    fewest = {"2-1": {"latency_ms": 30.0}, "2-3": {"latency_ms": 55.0}}
    (tmp_path / "sweep.json").write_text(json.dumps({"shapes": shapes, "shapes_fewest_beams": fewest}))
    fast = asked.model_copy(update={"budgets": {"fast": {"latency_ms": "60%"}}})
    assert estimate_infeasible_sizes(fast, ["2-1", "2-3"], config, tmp_path) == (["2-3"], "")  # 60 % of 90 ms is 54 ms
    assert estimate_infeasible_sizes(fast, ["2-1"], config, tmp_path) == ([], "")
    plan = describe_stopping(asked)
    assert "from 12.5% of its steps on, where it is not in the better 1/3 of its shape" in plan
    assert "no trial starts after 3 device-hours" in plan
    assert describe_stopping(space()) == "every trial runs to its end"  # a grid's table is to be whole


def test_no_trial_is_stopped_for_what_it_scored_in_its_warm_up(tmp_path):
    """100 steps, compared with another that leads from the first validation on."""
    for key, scores in {"behind": (1.0, 2.0, 3.0), "ahead": (5.0, 6.0, 7.0, 8.0)}.items():
        folder = make_trial(tmp_path, key, 0, 8.0, status=None)
        lines = [{"step": 25 * i, "progress": i / 4, "score": score} for i, score in enumerate(scores, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    behind = tmp_path / "trials" / "behind"
    run = json.loads((behind / "run.json").read_text())
    told = {}
    for steps in (0, 40, 500):
        run["training"]["warmup_steps"] = steps
        (behind / "run.json").write_text(json.dumps(run))
        told[steps] = str(early_stop_reason(behind, Search(grace=0.3, reduction=2)))
    assert "after 60% of the steps" in told[0]  # the rungs are 30 % and 60 %
    assert "after 40% of the steps" in told[40]
    assert "after 50% of the steps" in told[500]
    run["training"]["warmup_steps"] = 500
    lines = (behind / "metrics.jsonl").read_text().splitlines(keepends=True)
    (behind / "metrics.jsonl").write_text(lines[0])
    assert early_stop_reason(behind, Search(grace=0.1)) is None  # a quarter is done, of which all is warm-up
    run["training"]["warmup_steps"] = 0
    (behind / "run.json").write_text(json.dumps(run))
    assert early_stop_reason(behind, Search(grace=0.1)) is not None


def test_a_setting_at_its_default_makes_no_other_trial():
    """So a setting that a later release adds leaves the keys of a sweep that was begun before as they are."""
    run = {"name": "s", "teacher": "t", "dataset": "d"}
    told = {**run, "evaluation": {"validation_length_penalty": None}, "training": {"epochs": 5}}
    assert trial_key(Run.model_validate(run)) == trial_key(Run.model_validate(told))
    assert trial_key(Run.model_validate(run)) != trial_key(Run.model_validate({**run, "training": {"epochs": 4}}))


def test_a_journal_with_a_damaged_end_is_cut_there_and_finished_trials_are_known_by_their_folders(tmp_path):
    """As a full disk leaves it: half a line, and the next one written behind it in the same line."""
    first = StudySearch(space(), tmp_path)
    journal = tmp_path / "study.log"
    keys, lengths = [], []
    for name in ("a", "b"):
        keys.append(first.suggest(name)["key"])
        lengths.append(journal.stat().st_size)
        first.on_trial_complete(name, {**DONE, "score": 10.0, "latency_ms": 5.0})
        folder = tmp_path / "trials" / keys[-1]
        folder.mkdir(parents=True)
        result = {"status": "done", "number": len(keys) - 1, "metrics": {"score": 10.0, "latency_ms": 5.0}}
        (folder / "result.json").write_text(json.dumps(result))
    whole = journal.read_bytes()
    at = whole.index(b"\n", lengths[0]) + 10  # in the second line after the first proposal
    journal.write_bytes(whole[:at] + whole[-30:])

    again = StudySearch(space(), tmp_path)
    assert journal.with_suffix(".damaged").read_bytes() == whole[:at] + whole[-30:]
    for line in journal.read_bytes().splitlines():
        json.loads(line)
    assert again.finished == 1, "the first, by its result"
    proposals = everything(again)
    assert sorted(p["key"] for p in proposals if p["key"] == keys[1]) == [keys[1]]
    assert len({p["key"] for p in proposals} | {keys[0]}) == 6
    numbers = {p["key"]: p["number"] for p in proposals}
    assert numbers[keys[1]] == 1
    assert sorted(n for key, n in numbers.items() if key != keys[1]) == [2, 3, 4, 5]
