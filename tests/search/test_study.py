"""The Optuna study of a sweep, on disk and without Ray: what is proposed, and what is resumed after a kill."""

import itertools
import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from raydistill.cluster import snapshots, sync
from raydistill.config.run import Run
from raydistill.config.space import Search, Space, make_run, read_space
from raydistill.core.errors import TransientError, UserError
from raydistill.results.sweep_record import StopReason, TeacherPasses
from raydistill.search import study as study_module
from raydistill.search.study import (
    Proposal,
    ProposalLog,
    SweepStudy,
    final_report,
    has_deleted_trials,
    read_proposals,
    trial_key,
)
from raydistill.training.records import RunResult
from tests.factories.sweeps import RUN, make_space, sweep_record, sweep_teacher, write_result

ROOT = Path(__file__).parents[2]
DONE = {"finished": True, "status": "done", "score": 10.0, "latency_ms": 5.0}


def propose_all(study: SweepStudy, prefix: str = "a") -> list[Proposal]:
    """All proposals until the search is over, without reports."""
    proposals: list[Proposal] = []
    for n in range(50):
        proposal = study.propose(f"{prefix}{n}")
        if proposal is None:
            return proposals
        proposals.append(proposal)
    raise AssertionError("the search does not end")


def write_trial(sweep: Path, proposal: Proposal, status: str = "done", **metrics: float) -> RunResult:
    """Write the result of a trial, as training does."""
    folder = sweep / "trials" / proposal.key
    write_result(folder, status=status, number=proposal.number, params=proposal.params, metrics=metrics)
    return RunResult.read(folder / "result.json")


def run_trial(study: SweepStudy, trial_id: str, status: str = "done", score: float = 10.0) -> Proposal:
    """Propose a trial, write its result and report the result."""
    proposal = study.propose(trial_id)
    assert proposal is not None
    metrics = {"score": score, "latency_ms": 5.0} if status != "failed" else {}
    study.report(trial_id, final_report(write_trial(study.sweep, proposal, status, **metrics), "latency_ms"))
    return proposal


def load_optuna_study(sweep: Path) -> optuna.Study:
    """The study as other programs read it from the journal."""
    storage = JournalStorage(JournalFileBackend(str(sweep / "study.log")))
    return optuna.load_study(study_name=make_space().name, storage=storage)


def test_a_grid_proposes_every_combination_once(tmp_path):
    proposed = [tuple(sorted(p.params.items())) for p in propose_all(SweepStudy(make_space(), tmp_path))]
    sizes = ("2-3", "2-1")
    expected = [(("method", "sft"), ("student.size", s)) for s in sizes]
    expected += [(("loss.alpha_hidden", a), ("method", "kd"), ("student.size", s)) for s in sizes for a in (1, 3)]
    assert sorted(proposed) == sorted(expected)


def test_tpe_proposes_no_settings_twice_and_a_small_space_ends(tmp_path):
    keys = [p.key for p in propose_all(SweepStudy(make_space(sampler="tpe"), tmp_path))]
    assert sorted(keys) == sorted(set(keys))
    assert len(keys) == 6


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_sampler_without_new_proposals_is_replaced_by_random_ones_until_the_last_combination(
    tmp_path, sampler, monkeypatch
):
    """Scores are invented: the sampler's favourites are soon exhausted, and it would propose nothing else."""
    monkeypatch.setattr("raydistill.search.study.MAX_REJECTIONS", 30)
    space = read_space(ROOT / "benchmarks" / "spaces" / "search_demo.yaml")
    run = {**space.run, "training": {"learning_rate": {"choice": [3e-4, 1e-3]}}}
    run["student"] = {**run["student"], "size": {"choice": ["2-3", "2-1"]}}
    space = space.model_copy(update={"run": run, "search": Search(trials=99, sampler=sampler, seed=3)})

    def proposed_keys(folder: Path) -> list[str]:
        folder.mkdir()
        study = SweepStudy(space, folder)
        keys: list[str] = []
        while proposal := study.propose(str(len(keys))):
            params = proposal.params
            score = 10.0 + 5 * (params["training.learning_rate"] == 1e-3) + len(params["method"])
            latency = float(params["student.size"][-1])
            study.report(str(len(keys)), {**DONE, "score": score, "latency_ms": latency})
            keys.append(proposal.key)
        assert study.stop_reason == StopReason("every combination of the space has had its trial", exhausted=True)
        return keys

    keys = proposed_keys(tmp_path / "a")
    assert len(keys) == len(set(keys)) == (1 + 2 + 1) * 2 * 2 * 2  # sft, kd with either coefficient, pl
    assert proposed_keys(tmp_path / "b") == keys


def test_a_grid_skips_any_number_of_infeasible_combinations(tmp_path, monkeypatch):
    monkeypatch.setattr("raydistill.search.study.MAX_DUPLICATES", 1)
    monkeypatch.setattr("raydistill.search.study.MAX_REJECTIONS", 1)
    assert len(propose_all(SweepStudy(make_space(), tmp_path, infeasible_sizes={"2-3"}))) == 3


def test_the_journal_is_a_plain_optuna_study(tmp_path):
    """What optuna-dashboard reads: directions, parameters, scores and costs, without code of this package."""
    study = SweepStudy(make_space(), tmp_path)
    proposal = study.propose("a")
    study.report("a", {**DONE, "score": 12.5, "latency_ms": 40.0})
    optuna_study = load_optuna_study(tmp_path)
    (trial,) = optuna_study.get_trials(states=[TrialState.COMPLETE])
    assert [direction.name for direction in optuna_study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert (trial.values, trial.user_attrs["key"]) == ([12.5, 40.0], proposal.key)
    assert trial.params["method"] == proposal.params["method"]


def test_points_of_the_space_are_proposed_first(tmp_path):
    point = {"method": "kd", "student.size": "2-1", "loss.alpha_hidden": 3}
    space = Space.model_validate({"name": "s", "run": RUN, "points": [point]})
    assert SweepStudy(space, tmp_path).propose("a").params == point


def test_a_fixed_seed_gives_the_same_proposals_when_trials_run_one_at_a_time(tmp_path):
    run = {**RUN, "training": {"learning_rate": {"log_uniform": [1e-5, 1e-2]}}}

    def proposed_params(folder: Path, seed: int) -> list[dict]:
        folder.mkdir()
        study = SweepStudy(
            Space.model_validate({"name": "s", "run": run, "search": {"seed": seed, "trials": 14}}), folder
        )
        params = []
        for n in range(14):  # the sampler draws at random for ten trials, then models
            proposal = study.propose(str(n))
            assert proposal is not None
            params.append(proposal.params)
            study.report(str(n), {**DONE, "score": n % 5})
        return params

    assert proposed_params(tmp_path / "a", 1) == proposed_params(tmp_path / "b", 1)
    assert proposed_params(tmp_path / "c", 2) != proposed_params(tmp_path / "d", 1)


def test_after_a_kill_running_trials_are_proposed_again_and_finished_ones_are_not(tmp_path):
    first = SweepStudy(make_space(), tmp_path)
    finished = run_trial(first, "a0")
    running, unreported = (first.propose(f"a{n}") for n in range(1, 3))
    # The third trial had written its result when everything was killed, but was not reported
    write_trial(tmp_path, unreported, score=7.0, latency_ms=3.0)

    second = SweepStudy(make_space(), tmp_path)
    assert second.num_finished == 2
    proposals = propose_all(second, "b")
    keys = [p.key for p in proposals]
    assert finished.key not in keys
    assert unreported.key not in keys
    assert running.key in keys
    assert len(keys) == 4
    assert next(p for p in proposals if p.key == running.key).number == running.number
    assert len({p.number for p in proposals} | {finished.number, unreported.number}) == 6
    for n in range(4):
        write_trial(tmp_path, proposals[n], score=1.0, latency_ms=3.0)
        second.report(f"b{n}", DONE)
    third = SweepStudy(make_space(), tmp_path)
    assert third.num_finished == 6
    assert propose_all(third, "c") == []


def test_repeated_kills_before_any_result_lose_and_repeat_nothing(tmp_path):
    for attempt in range(3):
        study = SweepStudy(make_space(), tmp_path)
        for n in range(2):
            assert study.propose(f"{attempt}-{n}") is not None
    keys = [p.key for p in propose_all(SweepStudy(make_space(), tmp_path), "z")]
    assert len(keys) == len(set(keys)) == 6


def test_a_lost_trial_is_retried_by_the_next_command(tmp_path):
    first = SweepStudy(make_space(), tmp_path)
    lost = first.propose("a")
    first.report("a", None)
    assert first.failed_keys == {lost.key}
    rest = propose_all(first, "b")
    for n in range(len(rest)):
        write_trial(tmp_path, rest[n], score=1.0, latency_ms=3.0)
        first.report(f"b{n}", DONE)
    assert [p.key for p in propose_all(SweepStudy(make_space(), tmp_path), "c")] == [lost.key]


def test_a_stopped_trial_is_finished_with_its_score(tmp_path):
    study = SweepStudy(make_space(), tmp_path)
    run_trial(study, "a", "stopped", score=4.0)
    assert SweepStudy(make_space(), tmp_path).num_finished == 1
    assert [trial.values for trial in load_optuna_study(tmp_path).best_trials] == [[4.0, 5.0]]


@pytest.mark.parametrize("sampler", ["tpe", "grid", "random"])
def test_an_infeasible_size_is_never_proposed(tmp_path, sampler):
    """Also while the sampler models: with two objectives it must accept trials that are pruned without values."""
    endless = {"training": {"learning_rate": {"log_uniform": [1e-5, 1e-2]}}} if sampler != "grid" else {}
    run = {**RUN, **endless}
    space = Space.model_validate({"name": "s", "run": run, "search": {"sampler": sampler, "trials": 20}})
    study = SweepStudy(space, tmp_path, infeasible_sizes={"2-3"})
    sizes = []
    for n in range(20):
        proposal = study.propose(str(n))
        if proposal is None:
            break
        sizes.append(proposal.params["student.size"])
        study.report(str(n), {**DONE, "score": n % 5})
    assert set(sizes) == {"2-1"}
    assert len(sizes) == (3 if sampler == "grid" else 20)
    assert study.num_finished == len(sizes)


def test_no_trial_starts_after_max_hours(tmp_path):
    assert SweepStudy(make_space(max_hours=1e-9), tmp_path).propose("a") is None
    start_time = time.monotonic() - 3601  # the command's preparation took an hour
    study = SweepStudy(make_space(max_hours=1), tmp_path, start_time=start_time)
    assert study.propose("a") is None
    assert study.stop_reason == StopReason("the time limit of this command is reached (search.max_hours = 1)")


def test_no_trial_starts_after_max_device_hours(tmp_path):
    """The teacher's passes count, and failed trials too."""
    study = SweepStudy(make_space(max_device_hours=1.0), tmp_path)
    passes = TeacherPasses(stores={"encoder-1/states": 0.25})
    sweep_record(sweep_teacher(passes=passes)).write(tmp_path / "sweep.json")
    for number, hours in enumerate((0.5, 0.5)):
        assert study.propose(str(number)) is not None
        status = "failed" if number else "done"
        write_result(tmp_path / "trials" / f"t{number}", status=status, metrics={"device_hours": hours})
    assert study.propose("2") is None
    assert "device-hours is reached" in study.stop_reason.message


def test_a_failed_run_is_finished_and_never_on_the_studys_front(tmp_path):
    study = SweepStudy(make_space(), tmp_path)
    failed = run_trial(study, "a", "failed")
    second = SweepStudy(make_space(), tmp_path)
    assert second.num_finished == 1
    assert failed.key not in [p.key for p in propose_all(second, "b")]
    second.report("b0", DONE)
    assert [trial.values for trial in load_optuna_study(tmp_path).best_trials] == [[10.0, 5.0]]


def test_a_second_report_of_a_trial_is_ignored(tmp_path):
    study = SweepStudy(make_space(), tmp_path)
    study.propose("a")
    study.report("a", DONE)
    study.report("a", None)
    assert (study.num_finished, study.num_running, study.failed_keys) == (1, 0, set())


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
@pytest.mark.parametrize(
    ("owner", "method"), [(optuna.Study, "ask"), (ProposalLog, "write"), (optuna.Trial, "set_user_attr")]
)
def test_a_kill_within_a_proposal_loses_and_repeats_nothing(tmp_path, monkeypatch, owner, method, sampler):
    call = getattr(owner, method)
    calls = []

    def killed_at_the_third(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        propose_all(SweepStudy(make_space(sampler=sampler), tmp_path))
    monkeypatch.undo()
    keys = [p.key for p in propose_all(SweepStudy(make_space(sampler=sampler), tmp_path))]
    assert len(keys) == len(set(keys)) == 6


def run_search(space: Space, sweep: Path) -> None:
    """What a command does with a study: two trials at a time, each of which writes its result if that is missing."""
    study = SweepStudy(space, sweep)
    running: dict[str, Proposal] = {}
    for number in itertools.count():
        if len(running) < 2 and len(running) < study.num_remaining:
            proposal = study.propose(str(number))
            assert proposal is not None
            running[str(number)] = proposal
        elif running:
            trial_id = next(iter(running))
            proposal = running.pop(trial_id)
            result = RunResult.read_if_present(sweep / "trials" / proposal.key / "result.json")
            result = result or write_trial(sweep, proposal, score=proposal.number % 5, latency_ms=5.0)
            study.report(trial_id, final_report(result, "latency_ms"))
        else:
            return


@pytest.mark.parametrize("sampler", ["tpe", "grid", "random"])
def test_kills_at_random_moments_lose_and_repeat_no_trial(tmp_path, sampler):
    """After at least twenty kills in the middle of searches, the trials are those of an uninterrupted search."""
    rng = random.Random(7)
    rates = {"choice": [1e-4, 3e-4, 1e-3, 3e-3]} if sampler == "grid" else {"log_uniform": [1e-5, 1e-2]}
    run = {**RUN, "training": {"learning_rate": rates}}
    space = Space.model_validate({"name": "s", "run": run, "search": {"sampler": sampler, "trials": 18}})
    kills = 0
    for round_number in itertools.count():
        sweep = tmp_path / str(round_number)
        sweep.mkdir()
        finished: dict[Path, int] = {}
        proposals: dict[str, Proposal] = {}
        process = None
        while process is None or process.exitcode != 0:
            process = multiprocessing.get_context("fork").Process(target=run_search, args=(space, sweep))
            process.start()
            process.join(rng.uniform(0.01, 0.2) if kills < 20 else 120)
            kills += process.is_alive() and bool(read_proposals(sweep))
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            now = {path: path.stat().st_mtime_ns for path in sweep.glob("trials/*/result.json")}
            assert {path: now.get(path) for path in finished} == finished
            assert proposals.items() <= read_proposals(sweep).items()
            finished, proposals = now, read_proposals(sweep)
        results = [RunResult.read(path) for path in finished]
        assert sorted(result.number for result in results) == list(range(18))
        assert {result.key for result in results} == proposals.keys()
        assert len(load_optuna_study(sweep).get_trials(states=[TrialState.COMPLETE])) == 18
        if kills >= 20:
            return


@pytest.mark.parametrize("sampler", ["tpe", "grid", "random"])
def test_a_trial_whose_folder_was_deleted_is_proposed_again(tmp_path, sampler):
    study = SweepStudy(make_space(sampler=sampler), tmp_path)
    proposals = [run_trial(study, str(n)) for n in range(3)]
    assert not has_deleted_trials(tmp_path)
    shutil.rmtree(tmp_path / "trials" / proposals[1].key)
    assert has_deleted_trials(tmp_path)
    second = SweepStudy(make_space(sampler=sampler), tmp_path)
    assert second.num_finished == 2
    assert second.propose("a") == proposals[1]


@pytest.mark.parametrize("status", ["done", "stopped"])
def test_a_trial_without_its_cost_is_an_error_and_not_a_student_that_costs_nothing(tmp_path, status):
    proposal = SweepStudy(make_space(), tmp_path).propose("a")
    result = write_trial(tmp_path, proposal, status, score=4.0)
    with pytest.raises(LookupError, match="latency_ms"):
        final_report(result, "latency_ms")
    with pytest.raises(UserError, match=r"result\.json: damaged: .*latency_ms.*Delete .* and run the sweep again"):
        SweepStudy(make_space(), tmp_path)


def test_a_study_that_is_rebuilt_from_results_equals_the_study_that_ran_the_trials(tmp_path):
    run = {**RUN, "training": {"learning_rate": {"log_uniform": [1e-5, 1e-2]}}}
    space = Space.model_validate({"name": "s", "run": run, "search": {"trials": 40}})
    study = SweepStudy(space, tmp_path)
    for n in range(12):
        run_trial(study, str(n), "failed" if n % 4 == 0 else "done", score=n % 5)
    before = load_optuna_study(tmp_path).trials
    SweepStudy(space, tmp_path)
    after = load_optuna_study(tmp_path).trials
    for name in ("number", "state", "values", "params", "distributions", "user_attrs"):
        assert [getattr(trial, name) for trial in after] == [getattr(trial, name) for trial in before]


def test_a_trial_key_depends_on_the_settings_and_not_on_the_name():
    params = {"method": "sft", "student.size": "2-3"}
    a, b = make_run(make_space(), params, "one"), make_run(make_space(), params, "two")
    assert trial_key(a) == trial_key(b)
    assert trial_key(a) != trial_key(make_run(make_space(), {**params, "student.size": "2-1"}, "one"))


def test_a_setting_at_its_default_does_not_change_the_trial_key():
    """So settings that a later release adds do not change the keys of a sweep that was started before."""
    run = {"name": "s", "teacher": "t", "dataset": "d"}
    explicit = {**run, "evaluation": {"validation_length_penalty": None}, "training": {"epochs": 5}}
    assert trial_key(Run.model_validate(run)) == trial_key(Run.model_validate(explicit))
    assert trial_key(Run.model_validate(run)) != trial_key(Run.model_validate({**run, "training": {"epochs": 4}}))


@pytest.mark.parametrize("trials", [1, 4])
def test_finished_trials_are_counted(tmp_path, trials):
    study = SweepStudy(make_space(), tmp_path)
    for n in range(trials):
        study.propose(str(n))
        study.report(str(n), DONE)
    assert study.num_finished == trials
    assert study.num_remaining == 6 - trials


@pytest.mark.parametrize("lost", ["study.log", "proposals.json"])
def test_finished_trials_are_recognised_by_their_folders(tmp_path, lost):
    first = SweepStudy(make_space(), tmp_path)
    finished = [run_trial(first, name) for name in ("a", "b")]
    running = first.propose("c")
    (tmp_path / lost).unlink()
    second = SweepStudy(make_space(), tmp_path)
    assert second.num_finished == 2
    proposals = propose_all(second)
    assert sorted(p.number for p in proposals) == [2, 3, 4, 5]
    assert len({p.key for p in [*proposals, *finished]}) == 6
    assert running.key in {p.key for p in proposals}


@pytest.mark.parametrize("content", ['{"op_code": 99}\n', '{"op_code": 0, "stu', "\0"])
def test_a_damaged_journal_and_the_lock_of_a_killed_process_are_replaced(tmp_path, monkeypatch, content):
    """A full disk leaves half a line, and Optuna would append the next line to the same line."""
    run_trial(SweepStudy(make_space(), tmp_path), "a")
    (tmp_path / "study.log").write_text(content)
    (tmp_path / "study.log.lock").symlink_to(tmp_path / "study.log")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("Optuna waits for a lock"))
    assert SweepStudy(make_space(), tmp_path).num_finished == 1
    assert len(load_optuna_study(tmp_path).trials) == 1


@pytest.mark.parametrize(
    "params", [{"method": "sft"}, {"method": "none", "student.size": "2-3"}, {"method": "sft", "loss.beta": 1}]
)
def test_damaged_proposals_are_named_with_a_remedy(tmp_path, params):
    SweepStudy(make_space(), tmp_path).propose("a")
    path = tmp_path / "proposals.json"
    record = json.loads(path.read_text())
    record["proposals"][0]["params"] = params if len(params) > 1 else None
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"proposals\.json: damaged.*Delete this file: finished trials are recognised"):
        SweepStudy(make_space(), tmp_path)


def test_units_are_searched_and_name_the_trials(tmp_path):
    student = {"size": "2-1", "decoder_ffn": {"choice": [None, 0.5]}}
    run = {"teacher": "t", "dataset": "d", "method": "kd", "student": student}
    space = Space.model_validate({"name": "s", "run": run, "search": {"sampler": "grid", "trials": 2}})
    keys = [proposal.key for proposal in propose_all(SweepStudy(space, tmp_path))]
    assert [key.rpartition("-")[0] for key in keys] == ["kd-2-1", "kd-2-1-ffn1-0.5"]
    (tmp_path / "b").mkdir()
    feasible = propose_all(SweepStudy(space, tmp_path / "b", infeasible_sizes={"2-1-ffn1-0.5"}))
    assert [proposal.params for proposal in feasible] == [{"student.decoder_ffn": None}]
    assert trial_key(make_run(space, {"student.decoder_ffn": 1.0}, "r")) == keys[0]


def test_an_outage_of_the_storage_does_not_end_the_search_but_another_command_does(tmp_path, monkeypatch, capsys):
    home, storage = tmp_path / "home", tmp_path / "storage"
    storage.mkdir()
    monkeypatch.setenv("RAYDISTILL_HOME", str(home))
    monkeypatch.setenv(sync.STORAGE_ENV, f"file://{storage}")
    sweep = home / "sweeps" / "s"
    sweep.mkdir(parents=True)
    (sweep / "space.yaml").touch()
    with snapshots.writer(sweep):
        study = SweepStudy(make_space(), sweep)
        with monkeypatch.context() as patch:
            patch.setattr(sync.Storage, "list_objects", lambda *_, **__: (_ for _ in ()).throw(OSError("no answer")))
            assert study.propose("a") is not None
        assert "the search continues without a copy of its proposals in the storage: no answer" in (
            capsys.readouterr().err
        )
        proposals = [study.propose(name) for name in "bc"]
        assert None not in proposals
        monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "other"))
        with snapshots.writer(tmp_path / "other" / "sweeps" / "s"):
            assert len(read_proposals(tmp_path / "other" / "sweeps" / "s")) == 3
            monkeypatch.setenv("RAYDISTILL_HOME", str(home))
            with pytest.raises(TransientError, match="another worker has taken over"):
                study.propose("d")


def test_the_sampler_learns_from_the_front_and_the_latest_trials_of_a_long_search(tmp_path, monkeypatch):
    """Trials that run while the study is replaced are counted too, and no trial is proposed twice."""
    monkeypatch.setattr(study_module, "MAX_SAMPLER_TRIALS", 12)
    space = make_space(sampler="tpe", trials=99)
    rates = {"training": {"learning_rate": {"log_uniform": [1e-5, 1e-2]}}}
    space = space.model_copy(update={"run": {**space.run, **rates}})
    study = SweepStudy(space, tmp_path)
    keys, values = [], {}
    for number in range(60):
        proposal = study.propose(str(number))
        keys.append(proposal.key)
        if number >= 2:  # three trials run at a time; an early one is the best and the cheapest
            reported = number - 2
            values[reported] = (100.0, 1.0) if reported == 4 else (10.0 + reported % 7, 5.0 + reported % 3)
            score, latency_ms = values[reported]
            study.report(str(reported), {**DONE, "score": score, "latency_ms": latency_ms})
    assert len(set(keys)) == 60
    assert study.num_finished == 58
    remembered = study._study.get_trials(states=[TrialState.COMPLETE])
    assert 12 <= len(remembered) <= 15
    assert study._study.best_trials[0].values == [100.0, 1.0]
    latest = {key for number, key in enumerate(keys[:58]) if number > 58 - 9}
    assert latest <= {trial.user_attrs["key"] for trial in remembered}
    whole = load_optuna_study(tmp_path).get_trials(states=[TrialState.COMPLETE])
    assert sorted(tuple(trial.values) for trial in whole) == sorted(values.values())
