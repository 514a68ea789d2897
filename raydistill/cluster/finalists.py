"""After the search: its finalists as they would serve, each with several ways of decoding, timed on real rows.

Nothing is trained. Fewer beams often cost nothing, so decoding is part of the choice: the front that `choose` looks at
holds pairs of a checkpoint and a way of decoding.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from raydistill.cluster.alone import alone
from raydistill.cluster.prepare import Prepared
from raydistill.config.console import progress
from raydistill.config.files import CARD, read_json, write_json_atomic
from raydistill.config.presets import teacher_preset
from raydistill.config.run import Run
from raydistill.config.space import DecodingSearch, Space, resolve
from raydistill.evaluation.latency import hardware
from raydistill.evaluation.serving import serve
from raydistill.model.decoding import Beam, Engine
from raydistill.model.generate import open_engine
from raydistill.model.teachers import load_config, locate, max_tokens
from raydistill.results.records import (
    SERVED,
    decoding_name,
    finalists,
    outcome,
    read_trials,
)
from raydistill.training.record import write_rows


def serve_finalists(space: Space, sweep: Path, prepared: Prepared, device: str) -> None:
    """Serve the teacher once and every finalist with each decoding of the space; what is there already is kept."""
    teacher = prepared.teacher
    run = next(resolve(space, trial.chosen, space.name) for trial in read_trials(sweep) if trial.scored)
    chosen = finalists(sweep)
    progress(f"finalists: {len(chosen)} students and the teacher on real rows, one at a time, alone on the machine")
    own = Beam(**teacher["decoding"])
    where = locate(str(run.teacher), run.dataset.name)
    serve_missing(sweep, where, run, teacher["metric"], [own], device)
    for trial in chosen:
        beams = decodings(Beam(**read_json(trial.folder / "best" / CARD)["decoding"]), space.search.decoding)
        serve_missing(trial.folder, str(trial.folder / "best"), run, teacher["metric"], beams, device)
    score_on_test(sweep, run, teacher["metric"], device)


def decodings(own: Beam, search: DecodingSearch) -> list[Beam]:
    """The checkpoint's own decoding, then every other of the search, once each; one beam has no length penalty."""
    found = [own]
    for beams in search.beams:
        for penalty in search.length_penalty if beams > 1 else [own.length_penalty]:
            beam = replace(own, beams=beams, length_penalty=penalty)
            if decoding_name(asdict(beam)) not in {decoding_name(asdict(one)) for one in found}:
                found.append(beam)
    return found


def serve_missing(folder: Path, checkpoint: str, run: Run, metric: str, beams: Sequence[Beam], device: str) -> None:
    """Serve a checkpoint with those decodings that `folder` does not tell of yet."""
    there = read_json(folder / SERVED)["decodings"] if (folder / SERVED).is_file() else []
    known = {decoding_name(one) for one in there}
    missing = [beam for beam in beams if decoding_name(asdict(beam)) not in known]
    if missing:
        added = alone(serve_checkpoint, folder, checkpoint, run, metric, missing, "validation", device=device)
        write_json_atomic(folder / SERVED, {**added, "decodings": [*there, *added["decodings"]]})


def score_on_test(sweep: Path, run: Run, metric: str, device: str) -> None:
    """Score on the test split what is on the final front or chosen and was not yet: for reporting, not for choosing."""
    found = outcome(sweep)
    wanted = {*found.front, *(key for key in found.chosen.values() if key)}
    for student in found.students:
        if student.key not in wanted or student.test is not None or student.decoding is None:
            continue
        beam = Beam(**read_json(student.folder / "best" / CARD)["decoding"])
        beam = replace(beam, **student.decoding)
        tested = alone(
            serve_checkpoint, student.folder, str(student.folder / "best"), run, metric, [beam], "test", device=device
        )
        if not tested["decodings"]:
            return  # there is no test split
        served = read_json(student.folder / SERVED)
        for one in served["decodings"]:
            if decoding_name(one) == decoding_name(asdict(beam)):
                one["test"] = {**tested["decodings"][0]["metrics"], "interval": tested["decodings"][0]["interval"]}
        write_json_atomic(student.folder / SERVED, served)


def serve_checkpoint(
    folder: Path,
    checkpoint: str,
    run: Run,
    metric: str,
    beams: Sequence[Beam],
    split: str,
    device: str,
    threads: int,
) -> dict[str, Any]:
    """Scores and timings of a checkpoint with each decoding on a split; to be called `alone`.

    Per-row statistics go into `folder`, a file per decoding. Without such a split there are no decodings.
    """
    from raydistill.training.material import read_split

    corpus = read_split(run.dataset, split)
    if corpus is None:
        return {"decodings": []}
    with tempfile.TemporaryDirectory(prefix="raydistill-serve-") as scratch:
        engine, limit = _open(checkpoint, run, device, threads, Path(scratch))
        found = []
        for beam in beams:
            served = serve(engine, corpus.sources, corpus.targets, metric, beam, limit)
            decoding = {"beams": beam.beams, "length_penalty": beam.length_penalty}
            write_rows(folder / f"rows-{split}-{decoding_name(decoding)}.npz", {split: served.scored.rows})
            found.append({**decoding, **served.summary()})
    return {
        "engine": f"{engine.name} {engine.precision}",
        "hardware": hardware(device, threads),
        "rows": len(corpus),
        "decodings": found,
    }


def _open(checkpoint: str, run: Run, device: str, threads: int, scratch: Path) -> tuple[Engine, int]:
    """The engine that would serve a checkpoint, and how many source tokens it reads."""
    preset = teacher_preset(str(run.teacher), run.dataset.name)
    engine = open_engine(
        checkpoint,
        run.evaluation.engine,
        device=device,
        threads=threads,
        languages=preset.languages if preset else None,
        cache=scratch / "engine",
    )
    return engine, max_tokens("max_source_tokens", run.dataset, preset, load_config(checkpoint))
