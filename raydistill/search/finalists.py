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

from raydistill.cluster.exclusive import alone, tell_of_others
from raydistill.config.presets import teacher_preset
from raydistill.config.run import Run
from raydistill.config.space import DecodingSearch, Space, resolve
from raydistill.core.console import progress
from raydistill.core.files import CARD, damage_told, read_json, write_json_atomic
from raydistill.evaluation.latency import Hardware, Others, hardware, version_of
from raydistill.evaluation.serving import serve
from raydistill.inference.decoding import Beam, Engine
from raydistill.inference.engines import open_engine
from raydistill.models.loading import languages_of, load_config, locate, max_tokens
from raydistill.results.records import Trial, decoding_name, read_trials, rows_name
from raydistill.results.selection import finalists, outcome
from raydistill.results.served_students import SERVED, served_in
from raydistill.search.prepare import check_unchanged
from raydistill.training.run_folder import write_rows

AGAIN = "then delete the served.json files in the sweep's folder, and give the same command"


@dataclass(frozen=True)
class Unserved:
    """A checkpoint, the decodings that it was not served with yet, and the folder whose served.json lacks them."""

    folder: Path
    checkpoint: str
    beams: list[Beam]


def is_served(space: Space, sweep: Path, teacher: dict[str, Any]) -> bool:
    """Whether nothing is left for `serve_finalists` on this machine; looks at files only."""
    here = machine_here()
    return not (unserved(space, sweep, teacher, here) or untested(sweep, teacher)) and _served_last(sweep, here)


def serve_finalists(space: Space, sweep: Path, teacher: dict[str, Any], device: str) -> None:
    """Serve the teacher and every finalist with each decoding of the space; what was served so before is kept.

    `teacher` is the record of it in sweep.json. A sweep is judged by what one machine served: by this one's, once all
    is there. UserError where teacher or data are not those of the sweep any more.
    """
    machine = alone(hardware, device=device)
    missing = unserved(space, sweep, teacher, machine)
    if missing:
        run = _any_run(space, sweep)
        check_unchanged(run, teacher, sweep)
        progress(f"finalists: serving {len(missing)} checkpoints on real rows, one at a time, alone on the machine")
        others = []
        for one in missing:
            what = (one.folder, one.checkpoint, run, teacher["metric"], one.beams, "validation")
            served = alone(serve_checkpoint, *what, device=device, **_moves(*what))
            keep(one.folder, served)
            others += [entry["others"] for entry in served]
        tell_of_others(max(others), AGAIN)
    if (sweep / SERVED).is_file() and not _served_last(sweep, machine):
        write_json_atomic(sweep / SERVED, {**read_json(sweep / SERVED), "hardware": machine})
    score_on_test(space, sweep, teacher, device)


def machine_here() -> Hardware:
    """What is known, before Ray is started, of where it would serve; nothing where RAY_ADDRESS names a cluster."""
    if os.environ.get("RAY_ADDRESS"):
        return {}
    found = hardware("cuda" if torch.cuda.is_available() else "cpu")
    return {name: value for name, value in found.items() if name != "threads"}


def unserved(space: Space, sweep: Path, teacher: dict[str, Any], machine: Hardware) -> list[Unserved]:
    """The teacher and the finalists, as far as a decoding of theirs was not yet served on `machine` by this engine.

    `machine`: hardware as it is known; what it does not say is not compared.
    """
    chosen = [trial for trial in finalists(sweep) if trial.checkpoint]
    if not chosen:
        return []
    run, search = _any_run(space, sweep), space.search.decoding
    where = locate(str(run.teacher), run.dataset.name)
    wanted = [Unserved(sweep, where, decodings(Beam(**teacher["decoding"]), search))]
    for trial in chosen:
        own = Beam(**read_json(trial.folder / "best" / CARD)["decoding"])
        wanted.append(Unserved(trial.folder, str(trial.folder / "best"), decodings(own, search)))
    missing = []
    for one in wanted:
        known = {decoding_name(entry) for entry in served_in(one.folder) if _is_of(one.folder, entry, machine)}
        missing.append(replace(one, beams=[beam for beam in one.beams if decoding_name(asdict(beam)) not in known]))
    return [one for one in missing if one.beams]


def _is_of(folder: Path, entry: dict[str, Any], machine: Hardware) -> bool:
    """Whether what was served is of this machine, and of its engine as it is installed now."""
    with damage_told(folder / SERVED, "Delete this file to have it made again"):
        same = entry.get("version") == version_of(entry.get("engine", "none").split()[0])
        return same and machine.items() <= entry["hardware"].items()


def _served_last(sweep: Path, machine: Hardware) -> bool:
    """Whether the sweep is judged by what this machine served, if any did."""
    there = read_json(sweep / SERVED).get("hardware") or {} if (sweep / SERVED).is_file() else machine
    return machine.items() <= there.items()


def keep(folder: Path, added: list[dict[str, Any]]) -> None:
    """Add to what a folder's served.json tells, in the place of the same decodings on the same machine."""
    before = read_json(folder / SERVED) if (folder / SERVED).is_file() else {"hardware": added[0]["hardware"]}
    replaced = {(decoding_name(one), str(one["hardware"])) for one in added}
    kept = [
        one
        for one in before.get("decodings", [])
        if "hardware" in one and (decoding_name(one), str(one["hardware"])) not in replaced
    ]
    write_json_atomic(folder / SERVED, {**before, "decodings": [*kept, *added]})


def untested(sweep: Path, teacher: dict[str, Any]) -> list[Trial]:
    """The students as served that are on the front or chosen, and have no score on the test split, if there is one."""
    if "test" not in teacher["data"]:
        return []
    found = outcome(sweep)
    wanted = {*found.front, *(key for key in found.chosen.values() if key)}
    return [s for s in found.students if s.key in wanted and s.test is None and s.decoding and s.checkpoint]


def _any_run(space: Space, sweep: Path) -> Run:
    """A run of the sweep: teacher, data and evaluation are the same in all."""
    return next(resolve(space, trial.chosen, space.name) for trial in read_trials(sweep) if trial.scored)


def decodings(own: Beam, search: DecodingSearch) -> list[Beam]:
    """The checkpoint's own decoding, then every other of the search, once each; one beam has no length penalty."""
    found = [own]
    for beams in search.beams:
        for penalty in search.length_penalty if beams > 1 else [own.length_penalty]:
            beam = replace(own, beams=beams, length_penalty=penalty)
            if decoding_name(asdict(beam)) not in {decoding_name(asdict(one)) for one in found}:
                found.append(beam)
    return found


def score_on_test(space: Space, sweep: Path, teacher: dict[str, Any], device: str) -> None:
    """Score on the test split what is on the final front or chosen and was not yet: for reporting, not for choosing."""
    for student in untested(sweep, teacher):
        beam = Beam(**read_json(student.folder / "best" / CARD)["decoding"])
        beam = replace(beam, **(student.decoding or {}))
        what = (student.folder, str(student.folder / "best"), _any_run(space, sweep), teacher["metric"], [beam], "test")
        [tested] = alone(serve_checkpoint, *what, device=device, **_moves(*what))
        served = read_json(student.folder / SERVED)
        for one in served["decodings"]:  # also those of other machines: scores are no timings
            if decoding_name(one) == decoding_name(asdict(beam)):
                one["test"] = {**tested["metrics"], "interval": tested["interval"]}
        write_json_atomic(student.folder / SERVED, served)


def _moves(
    folder: Path, checkpoint: str, run: Run, metric: str, beams: Sequence[Beam], split: str
) -> dict[str, list[Path]]:
    """What `serve_checkpoint` reads and writes, for machines that share no folder."""
    return {"reads": [Path(checkpoint)], "writes": [folder / rows_name(split, asdict(beam)) for beam in beams]}


def serve_checkpoint(
    folder: Path,
    checkpoint: str,
    run: Run,
    metric: str,
    beams: Sequence[Beam],
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
        engine, limit = _open(checkpoint, run, device, threads, Path(scratch))
        by: dict[str, Any] = {"engine": f"{engine.name} {engine.precision}", "version": version_of(engine.name)}
        by["hardware"] = hardware(device, threads)
        found = []
        for beam in beams:
            others = Others()
            served = serve(engine, corpus.sources, corpus.targets, metric, beam, limit)
            decoding = {"beams": beam.beams, "length_penalty": beam.length_penalty}
            write_rows(folder / rows_name(split, decoding), {split: served.scored.rows})
            found.append({**decoding, **by, "rows": len(corpus), "others": others.cores(), **served.summary()})
    return found


def _open(checkpoint: str, run: Run, device: str, threads: int, scratch: Path) -> tuple[Engine, int]:
    """The engine that would serve a checkpoint, and how many source tokens it reads."""
    preset = teacher_preset(str(run.teacher), run.dataset.name)
    engine = open_engine(
        checkpoint,
        run.evaluation.engine,
        device=device,
        threads=threads,
        languages=languages_of(run.teacher, run.dataset),
        cache=scratch / "engine",
    )
    return engine, max_tokens("max_source_tokens", run.dataset, preset, load_config(checkpoint))
