"""The Optuna study of a sweep, on disk and without Ray: what is proposed, and what is resumed after a kill."""

import json
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from raydistill.config.run import Run
from raydistill.config.space import Search, Space, make_run, read_space
from raydistill.core.errors import UserError
from raydistill.core.files import SCHEMA_VERSION
from raydistill.search.study import Proposal, StopReason, SweepStudy, final_report, trial_key
from raydistill.training.records import RunResult
from tests.factories.sweeps import RUN, make_space, write_result

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
def test_a_sampler_without_new_proposals_is_replaced_by_random_ones_until_the_last_combination(tmp_path, sampler):
    """Scores are invented: the sampler's favourites are soon exhausted, and it would propose nothing else."""
    space = read_space(ROOT / "benchmarks" / "spaces" / "search_demo.yaml")
    space = space.model_copy(update={"search": Search(trials=99, sampler=sampler, seed=3)})

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
    assert len(keys) == len(set(keys)) == (1 + 2 + 1) * 3 * 2 * 5  # sft, kd with either coefficient, pl
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
    finished, running, unreported = (first.propose(f"a{n}") for n in range(3))
    first.report("a0", DONE)
    # The third trial had written its result when everything was killed, but was not reported
    folder = tmp_path / "trials" / unreported.key
    write_result(folder, metrics={"score": 7.0, "latency_ms": 3.0})

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
        first.report(f"b{n}", DONE)
    assert [p.key for p in propose_all(SweepStudy(make_space(), tmp_path), "c")] == [lost.key]


def test_a_stopped_trial_is_finished_with_its_score(tmp_path):
    study = SweepStudy(make_space(), tmp_path)
    study.propose("a")
    stopped = RunResult(key="a", status="stopped", metrics={"score": 4.0, "latency_ms": 5.0})
    study.report("a", final_report(stopped, "latency_ms"))
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
    assert study.stop_reason == StopReason("the 1 hours of this run of the command are used up")


def test_no_trial_starts_after_max_device_hours(tmp_path):
    """The teacher's passes count, and failed trials too."""
    study = SweepStudy(make_space(max_device_hours=1.0), tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps({"schema": SCHEMA_VERSION, "teacher_gpu_hours": 0.25}))
    for number, hours in enumerate((0.5, 0.5)):
        assert study.propose(str(number)) is not None
        status = "failed" if number else "done"
        write_result(tmp_path / "trials" / f"t{number}", status=status, metrics={"gpu_hours": hours})
    assert study.propose("2") is None
    assert "device-hours are used up" in study.stop_reason.message


def test_a_failed_run_is_finished_and_never_on_the_studys_front(tmp_path):
    study = SweepStudy(make_space(), tmp_path)
    failed = study.propose("a")
    study.report("a", final_report(RunResult(key="a", status="failed"), "latency_ms"))
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


def test_a_point_without_a_key_at_the_kill_is_proposed_again(tmp_path):
    SweepStudy(make_space(), tmp_path)
    load_optuna_study(tmp_path).ask()  # the kill comes before the key is set
    assert len(propose_all(SweepStudy(make_space(), tmp_path))) == 6


def test_points_that_a_kill_left_out_of_the_queue_are_enqueued_by_the_next_command(tmp_path, monkeypatch):
    enqueue = optuna.Study.enqueue_trial
    calls = []

    def killed_at_the_third(self, values, *args, **kwargs):
        calls.append(values)
        if len(calls) == 3:
            raise KeyboardInterrupt
        enqueue(self, values, *args, **kwargs)

    monkeypatch.setattr(optuna.Study, "enqueue_trial", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        SweepStudy(make_space(), tmp_path)
    monkeypatch.undo()
    assert len(propose_all(SweepStudy(make_space(), tmp_path))) == 6


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


def test_a_damaged_end_of_the_journal_is_cut_and_finished_trials_are_recognised_by_their_folders(tmp_path):
    """A full disk leaves half a line, and the next line is appended to the same line."""
    first = SweepStudy(make_space(), tmp_path)
    journal = tmp_path / "study.log"
    keys, lengths = [], []
    for name in ("a", "b"):
        keys.append(first.propose(name).key)
        lengths.append(journal.stat().st_size)
        first.report(name, DONE)
        folder = tmp_path / "trials" / keys[-1]
        write_result(folder, number=len(keys) - 1, metrics={"score": 10.0, "latency_ms": 5.0})
    content = journal.read_bytes()
    cut = content.index(b"\n", lengths[0]) + 10  # in the second line after the first proposal
    damaged = content[:cut] + content[-30:]
    journal.write_bytes(damaged)

    second = SweepStudy(make_space(), tmp_path)
    assert journal.with_suffix(".damaged").read_bytes() == damaged
    for line in journal.read_bytes().splitlines():
        json.loads(line)
    assert second.num_finished == 1, "the first trial, by its result"
    proposals = propose_all(second)
    assert sorted(p.key for p in proposals if p.key == keys[1]) == [keys[1]]
    assert len({p.key for p in proposals} | {keys[0]}) == 6
    numbers = {p.key: p.number for p in proposals}
    assert numbers[keys[1]] == 1
    assert sorted(n for key, n in numbers.items() if key != keys[1]) == [2, 3, 4, 5]


def test_a_journal_that_optuna_cannot_read_is_named_with_a_remedy(tmp_path):
    (tmp_path / "study.log").write_text('{"op_code": 99}\n')
    with pytest.raises(UserError, match=r"study\.log.*Delete this file to start a new study"):
        SweepStudy(make_space(), tmp_path)
