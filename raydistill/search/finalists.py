"""After the search: its finalists as they would serve, each with several ways of decoding, timed on real rows.

Nothing is trained. Fewer beams often cost nothing, so decoding is part of the choice: the front that `choose` looks at
holds pairs of a checkpoint and a way of decoding.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from raydistill.cluster.exclusive import run_exclusive
from raydistill.config.presets import teacher_preset
from raydistill.config.run import Run
from raydistill.config.space import DecodingSearch, Space, make_run
from raydistill.core.console import print_progress
from raydistill.core.files import CHECKPOINT_METADATA, corrupt_file_error, read_json, write_json_atomic
from raydistill.evaluation.latency import BackgroundLoad, Hardware, engine_version, hardware, warn_background_load
from raydistill.evaluation.serving import benchmark_serving
from raydistill.inference.decoding import BeamSearchParams, Engine, EngineOptions
from raydistill.inference.engines import open_engine
from raydistill.models.loading import load_config, locate_checkpoint
from raydistill.models.tokenization import resolve_languages, resolve_max_tokens
from raydistill.results.records import Trial, decoding_key, read_trials, rows_filename
from raydistill.results.selection import load_selection, select_finalists
from raydistill.results.served_students import SERVED_FILE, read_served
from raydistill.search.prepare import check_unchanged
from raydistill.training.run_folder import write_row_statistics

REMEASURE_REMEDY = "then delete the served.json files in the sweep's folder, and give the same command"


@dataclass(frozen=True)
class PendingServing:
    """A checkpoint, the decodings that it was not served with yet, and the folder whose served.json lacks them."""

    folder: Path
    checkpoint: str
    beams: list[BeamSearchParams]


def all_served(space: Space, sweep: Path, teacher: dict[str, Any]) -> bool:
    """Whether nothing is left for `serve_finalists` on this machine; looks at files only."""
    here = local_hardware()
    return not (find_unserved(space, sweep, teacher, here) or find_untested(sweep, teacher)) and _is_reference_hardware(
        sweep, here
    )


def serve_finalists(space: Space, sweep: Path, teacher: dict[str, Any], device: str) -> None:
    """Serve the teacher and every finalist with each decoding of the space; what was served so before is kept.

    `teacher` is the record of it in sweep.json. A sweep is judged by what one machine served: by this one's, once all
    is there. UserError where teacher or data are not those of the sweep any more.
    """
    machine = run_exclusive(hardware, device=device)
    missing = find_unserved(space, sweep, teacher, machine)
    if missing:
        run = _representative_run(space, sweep)
        check_unchanged(run, teacher, sweep)
        print_progress(
            f"finalists: serving {len(missing)} checkpoints on real rows, one at a time, alone on the machine"
        )
        others = []
        for one in missing:
            what = (one.folder, one.checkpoint, run, teacher["metric"], one.beams, "validation")
            served = run_exclusive(serve_checkpoint, *what, device=device, **_sync_paths(*what))
            merge_served(one.folder, served)
            others += [entry["others"] for entry in served]
        warn_background_load(max(others), REMEASURE_REMEDY)
    if (sweep / SERVED_FILE).is_file() and not _is_reference_hardware(sweep, machine):
        write_json_atomic(sweep / SERVED_FILE, {**read_json(sweep / SERVED_FILE), "hardware": machine})
    score_on_test(space, sweep, teacher, device)


def local_hardware() -> Hardware:
    """What is known, before Ray is started, of where it would serve; nothing where RAY_ADDRESS names a cluster."""
    if os.environ.get("RAY_ADDRESS"):
        return {}
    found = hardware("cuda" if torch.cuda.is_available() else "cpu")
    return {name: value for name, value in found.items() if name != "threads"}


def find_unserved(space: Space, sweep: Path, teacher: dict[str, Any], machine: Hardware) -> list[PendingServing]:
    """The teacher and the finalists, as far as a decoding of theirs was not yet served on `machine` by this engine.

    `machine`: hardware as it is known; what it does not say is not compared.
    """
    chosen = [trial for trial in select_finalists(sweep) if trial.checkpoint]
    if not chosen:
        return []
    run, search = _representative_run(space, sweep), space.search.decoding
    where = locate_checkpoint(str(run.teacher), run.dataset.name)
    wanted = [PendingServing(sweep, where, decoding_grid(BeamSearchParams(**teacher["decoding"]), search))]
    for trial in chosen:
        own = BeamSearchParams(**read_json(trial.folder / "best" / CHECKPOINT_METADATA)["decoding"])
        wanted.append(PendingServing(trial.folder, str(trial.folder / "best"), decoding_grid(own, search)))
    missing = []
    for one in wanted:
        known = {decoding_key(entry) for entry in read_served(one.folder) if _is_current(one.folder, entry, machine)}
        missing.append(replace(one, beams=[beam for beam in one.beams if decoding_key(asdict(beam)) not in known]))
    return [one for one in missing if one.beams]


def _is_current(folder: Path, entry: dict[str, Any], machine: Hardware) -> bool:
    """Whether what was served is of this machine, and of its engine as it is installed now."""
    with corrupt_file_error(folder / SERVED_FILE, "Delete this file to have it made again"):
        same = entry.get("version") == engine_version(entry.get("engine", "none").split()[0])
        return same and machine.items() <= entry["hardware"].items()


def _is_reference_hardware(sweep: Path, machine: Hardware) -> bool:
    """Whether the sweep is judged by what this machine served, if any did."""
    there = read_json(sweep / SERVED_FILE).get("hardware") or {} if (sweep / SERVED_FILE).is_file() else machine
    return machine.items() <= there.items()


def merge_served(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Add to what a folder's served.json tells, in the place of the same decodings on the same machine."""
    before = (
        read_json(folder / SERVED_FILE) if (folder / SERVED_FILE).is_file() else {"hardware": entries[0]["hardware"]}
    )
    replaced = {(decoding_key(one), str(one["hardware"])) for one in entries}
    kept = [
        one
        for one in before.get("decodings", [])
        if "hardware" in one and (decoding_key(one), str(one["hardware"])) not in replaced
    ]
    write_json_atomic(folder / SERVED_FILE, {**before, "decodings": [*kept, *entries]})


def find_untested(sweep: Path, teacher: dict[str, Any]) -> list[Trial]:
    """The students as served that are on the front or chosen, and have no score on the test split, if there is one."""
    if "test" not in teacher["data"]:
        return []
    found = load_selection(sweep)
    wanted = {*found.front_keys, *(key for key in found.chosen_keys.values() if key)}
    return [s for s in found.students if s.key in wanted and s.test is None and s.decoding and s.checkpoint]


def _representative_run(space: Space, sweep: Path) -> Run:
    """A run of the sweep: teacher, data and evaluation are the same in all."""
    return next(make_run(space, trial.chosen, space.name) for trial in read_trials(sweep) if trial.scored)


def decoding_grid(default: BeamSearchParams, search: DecodingSearch) -> list[BeamSearchParams]:
    """The checkpoint's own decoding, then every other of the search, once each; one beam has no length penalty."""
    found = [default]
    for beams in search.beams:
        for penalty in search.length_penalty if beams > 1 else [default.length_penalty]:
            beam = replace(default, beams=beams, length_penalty=penalty)
            if decoding_key(asdict(beam)) not in {decoding_key(asdict(one)) for one in found}:
                found.append(beam)
    return found


def score_on_test(space: Space, sweep: Path, teacher: dict[str, Any], device: str) -> None:
    """Score on the test split what is on the final front or chosen and was not yet: for reporting, not for choosing."""
    for student in find_untested(sweep, teacher):
        beam = BeamSearchParams(**read_json(student.folder / "best" / CHECKPOINT_METADATA)["decoding"])
        beam = replace(beam, **(student.decoding or {}))
        what = (
            student.folder,
            str(student.folder / "best"),
            _representative_run(space, sweep),
            teacher["metric"],
            [beam],
            "test",
        )
        [tested] = run_exclusive(serve_checkpoint, *what, device=device, **_sync_paths(*what))
        served = read_json(student.folder / SERVED_FILE)
        for one in served["decodings"]:  # also those of other machines: scores are no timings
            if decoding_key(one) == decoding_key(asdict(beam)):
                one["test"] = {**tested["metrics"], "interval": tested["interval"]}
        write_json_atomic(student.folder / SERVED_FILE, served)


def _sync_paths(
    folder: Path, checkpoint: str, run: Run, metric: str, beams: Sequence[BeamSearchParams], split: str
) -> dict[str, list[Path]]:
    """What `serve_checkpoint` reads and writes, for machines that share no folder."""
    return {"reads": [Path(checkpoint)], "writes": [folder / rows_filename(split, asdict(beam)) for beam in beams]}


def serve_checkpoint(
    folder: Path,
    checkpoint: str,
    run: Run,
    metric: str,
    beams: Sequence[BeamSearchParams],
    split: str,
    device: str,
    threads: int,
) -> list[dict[str, Any]]:
    """Scores and timings of a checkpoint with each decoding on a split, and by what; to be called `alone`.

    Per-row statistics go into `folder`, a file per decoding.
    """
    from raydistill.training.tokenized_data import read_split

    corpus = read_split(run.dataset, split)
    assert corpus is not None, split
    with tempfile.TemporaryDirectory(prefix="raydistill-serve-") as scratch:
        engine, limit = _open_serving_engine(checkpoint, run, device, threads, Path(scratch))
        by: dict[str, Any] = {"engine": f"{engine.name} {engine.precision}", "version": engine_version(engine.name)}
        by["hardware"] = hardware(device, threads)
        found = []
        for beam in beams:
            others = BackgroundLoad()
            served = benchmark_serving(engine, corpus, metric, beam, limit)
            decoding = {"beams": beam.beams, "length_penalty": beam.length_penalty}
            write_row_statistics(folder / rows_filename(split, decoding), {split: served.scores.row_stats})
            found.append({**decoding, **by, "rows": len(corpus), "others": others.mean_cores(), **served.summary()})
    return found


def _open_serving_engine(checkpoint: str, run: Run, device: str, threads: int, scratch: Path) -> tuple[Engine, int]:
    """The engine that would serve a checkpoint, and how many source tokens it reads."""
    preset = teacher_preset(str(run.teacher), run.dataset.name)
    engine = open_engine(
        checkpoint,
        run.evaluation.engine,
        EngineOptions(
            device=device,
            threads=threads,
            languages=resolve_languages(run.teacher, run.dataset),
            cache_dir=scratch / "engine",
        ),
    )
    return engine, resolve_max_tokens("max_source_tokens", run.dataset, preset, load_config(checkpoint))
