"""Pseudo-labels as a Ray Data job: the teacher's beam search over a split, in planned batches, each done once.

The split is read row by row, checked and fingerprinted; the plan (data/plan.py) is made once and kept; actors label
planned batches and leave a file each (cluster/planned.py); the files are put together, window by window, into a label
set (data/labels.py). Run again after any death, the job goes on from the files that are there.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from raydistill.cluster import sync
from raydistill.cluster.actor_pool import Facts, room_for_actors, run_batches
from raydistill.config.presets import metric_for, teacher_preset
from raydistill.config.run import Dataset, Decoding, Pseudo
from raydistill.core.console import Bar, progress
from raydistill.core.errors import UserError
from raydistill.core.files import damage_told, read_json, write_atomic
from raydistill.data.readers import extension
from raydistill.data.streaming import Scan, scan, usable_rows
from raydistill.evaluation.metrics import Tally, rouge2_rows
from raydistill.jobs.label_outputs import compact, is_done, output_of, write_output
from raydistill.label_sets.batch_plan import BATCH_CHARS, Plan, make_plan, open_plan
from raydistill.label_sets.curation import check_curation, curate
from raydistill.label_sets.label_set import is_finished, label_set_name, read_manifest

if TYPE_CHECKING:  # it loads torch
    from raydistill.inference.decoding import Engine

PROOF_ROWS = 4
# A GPU takes as many rows at once as fill it; a CPU core is fastest with few.
GPU_CHARS = 4 * BATCH_CHARS
CHARS_PER_TOKEN = 5  # roughly, to know how much of a long source the teacher reads
ROWS_AT_ONCE = {"ctranslate2": 32, "transformers": 16}
ROWS_AT_ONCE_GPU = 128
# Part of a label set's key. One more whenever an engine, with the same settings, comes to write other texts.
SEARCH_VERSION = 2

# Called in the actor with (batch number, ids, sources, the labels), when a batch is labelled and before its file is
# written: what else a pass over the data has to produce. It must leave its output whole, as the batch's own file is.
Also = Callable[[int, list[str], list[str], list[str]], None]
# What opens the teacher in an actor; called as model.generate.open_engine is.
Opener = Callable[..., "Engine"]


@dataclass(frozen=True)
class Job:
    """What to label, by whom, how."""

    teacher: str
    dataset: Dataset
    split: str = "train"
    decoding: Decoding = field(default_factory=Decoding)
    engine: Literal["auto", "ctranslate2", "transformers"] = "auto"
    pseudo: Pseudo = field(default_factory=Pseudo)
    metric: Literal["auto", "rouge2", "bleu"] = "auto"
    threads: int = 1
    batch_chars: int | None = None
    fallback: bool = True


def pseudolabel(
    job: Job,
    root: Path,
    device: str = "cpu",
    say: bool = True,
    also: Callable[[], Also] | None = None,
    opener: Opener | None = None,
) -> Path:
    """Label every row of the split; returns the label set's folder under `root`. Finished work is not done again.

    Where `job.pseudo.curation` has rules, the folder is that of the curated set, and the whole one stands beside it.
    `opener` is there for measuring the job itself (benchmarks/scaling.py); the default is `open_engine`.
    """
    found = scan(job.dataset, job.split)
    about = describe_job(job, found)
    rules = job.pseudo.curation
    check_curation(rules, found.labelled)
    root = root.absolute()  # Ray's workers have working folders of their own
    folder = root / f"{_plain(job.dataset.name)}-{_plain(job.split)}-{_key(job, about, found, device)}"
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{folder.name}.lock", folder):
        _make(job, about, found, folder, device, say, also, opener)
    if rules == type(rules)():
        return folder
    made = curate(folder, job.dataset, job.split, rules, rouge2_rows, Tally(metric_for(job.dataset.name, job.metric)))
    sync.keep(made)
    return made


def _key(job: Job, about: dict[str, Any], found: Scan, device: str) -> str:
    """What decides about the texts: the teacher's weights and settings, the data, and how it is decoded.

    Two engines, or one with another precision, do not always write the same text.
    """
    how = {
        **about["decoding"],
        "n_best": job.pseudo.n_best,
        "engine": job.engine,
        "device": device,
        "precision": job.pseudo.precision,
        "settings": about["teacher"]["settings"],
        "languages": about["languages"],
        "search": SEARCH_VERSION,
    }
    return label_set_name(about["teacher"]["fingerprint"], found.fingerprint, how)


@contextmanager
def _locked(path: Path, folder: Path) -> Iterator[None]:
    """Hold a label set's lock; says so where another command has it, and waits."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"pseudo-labels: another command is making {folder.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def describe_job(job: Job, found: Scan) -> dict[str, Any]:
    """Teacher, data and decoding as the manifest holds them, without loading the model."""
    from raydistill.inference.decoding import resolve_decoding
    from raydistill.models.loading import languages_of, load_config, load_generation_config, locate, max_tokens

    preset = teacher_preset(job.teacher, job.dataset.name)
    where = locate(job.teacher, job.dataset.name)
    where = str(Path(where).absolute()) if Path(where).is_dir() else where
    config = load_config(where)
    target = max_tokens("max_target_tokens", job.dataset, preset, config)
    beam = resolve_decoding(job.decoding, load_generation_config(where), preset.decoding if preset else None, target)
    if job.pseudo.n_best > beam.beams:
        raise UserError(
            f"{job.pseudo.n_best} candidates per row need as many beams, and the teacher's are {beam.beams}: "
            f"give --beams"
        )
    return {
        "teacher": {"name": job.teacher, "where": where, **_identity(where)},
        "data": {
            "name": job.dataset.name,
            "split": job.split,
            "fingerprint": found.fingerprint,
            "skipped": found.skipped,
            "dataset": job.dataset.model_dump(mode="json", exclude_defaults=True),
        },
        "decoding": {
            **asdict(beam),
            "max_source_tokens": max_tokens("max_source_tokens", job.dataset, preset, config),
        },
        "n_best": job.pseudo.n_best,
        "languages": languages_of(job.teacher, job.dataset),
    }


def _identity(where: str) -> dict[str, str]:
    """Fingerprints of the weights and of configuration and tokenizer; the commit, of a teacher from the hub."""
    from raydistill.models.hub import commit
    from raydistill.models.loading import fingerprint, settings_fingerprint

    known = commit(where)
    found = {"fingerprint": fingerprint(where), "settings": settings_fingerprint(where)}
    return {**found, "commit": known} if known else found


def _make(
    job: Job,
    about: dict[str, Any],
    found: Scan,
    folder: Path,
    device: str,
    say: bool,
    also: Callable[[], Also] | None,
    opener: Opener | None,
) -> None:
    """Go on with the label set in `folder`; the caller holds its lock."""
    work = folder.with_name(f".{folder.name}.work")
    sync.fetch(folder, work)
    if is_finished(folder):
        if not job.fallback and (why := read_manifest(folder).get("engine_why")):
            raise UserError(f"{folder}: is finished, but not by CTranslate2: {why}")
        shutil.rmtree(work, ignore_errors=True)  # of a job that was killed after its last step but one
        if say:
            progress(f"pseudo-labels: {found.rows} rows are there already: {folder}")
        return
    plan = open_plan(work / "plan")
    if plan is None:
        chars = job.batch_chars or (GPU_CHARS if device == "cuda" else BATCH_CHARS)
        read = CHARS_PER_TOKEN * about["decoding"]["max_source_tokens"]
        rows = usable_rows(job.dataset, job.split, found)
        plan = make_plan(rows, work / "plan", batch_chars=chars, max_chars=read)
        sync.keep(work / "plan")
    (work / "out").mkdir(exist_ok=True)
    missing = [n for n in range(len(plan)) if not is_done(output_of(work, n))]
    if say and len(missing) < len(plan):
        progress(f"pseudo-labels: going on; {len(plan) - len(missing)} of {len(plan)} batches are done")
    if missing:
        _label(job, about, plan, work, missing, device, say, also, opener)
        sync.fetch(work)
    compact(plan, work, folder, about, found, metric_for(job.dataset.name, job.metric))
    sync.keep(folder)
    sync.drop(work)
    shutil.rmtree(work, ignore_errors=True)


def _label(
    job: Job,
    about: dict[str, Any],
    plan: Plan,
    work: Path,
    missing: list[int],
    device: str,
    say: bool,
    also: Callable[[], Also] | None,
    opener: Opener | None,
) -> None:
    """Run the missing batches through one actor per GPU, or per `job.threads` CPUs, and tell how far it is."""
    total, todo = sum(plan.rows), sum(plan.rows[n] for n in missing)
    chars = sum(plan.chars[n] for n in missing)
    done = {"rows": total - todo, "tokens": 0}
    started = time.monotonic()
    if say:
        actors = min(room_for_actors(device, job.threads), len(missing))
        progress(f"pseudo-labels: {todo} rows to label in {len(missing)} batches, {actors} teachers at work")
    bar = Bar("pseudo-labels", sum(plan.chars), sum(plan.chars) - chars) if say else None

    def on_done(facts: Facts) -> None:
        done["rows"] += int(facts["rows"])
        done["tokens"] += int(facts["tokens"])
        if bar is not None:
            seconds = time.monotonic() - started
            rates = f"{(done['rows'] - total + todo) / seconds:.1f} rows/s, {done['tokens'] / seconds:.0f} tokens/s"
            bar.advance(plan.chars[int(facts["batch"])], f"{done['rows']}/{total} rows, {rates}")

    where = Path(about["teacher"]["where"])
    sync.keep(where)

    def labeller() -> Callable[[int], Facts]:
        sync.fetch(where, work / "plan", work / "engine.json")
        return Labeller(job, about, plan, work, device, also() if also else None, opener)

    try:
        run_batches(missing, labeller, device=device, threads=job.threads, on_done=on_done)
    finally:
        if bar is not None:
            bar.close()


class Labeller:
    """One teacher on one device or CPU share: labels planned batches and leaves a file for each."""

    def __init__(
        self,
        job: Job,
        about: dict[str, Any],
        plan: Plan,
        work: Path,
        device: str,
        also: Also | None = None,
        opener: Opener | None = None,
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = str(job.threads)
        from raydistill.inference.decoding import Beam, Sample
        from raydistill.inference.engines import open_engine

        decoding = dict(about["decoding"])
        if _identity(about["teacher"]["where"]).items() - about["teacher"].items():
            raise UserError(f"{about['teacher']['where']}: the teacher has changed since the job began; run it again")
        self.max_source_tokens = decoding.pop("max_source_tokens")
        self.beam = Beam(**decoding)
        self.plan, self.work, self.n_best, self.also = plan, work, job.pseudo.n_best, also
        self.threads = job.threads
        middle = plan.read_batch(len(plan) // 2)["sources"]
        said: list[str] = []
        self.engine = (opener or open_engine)(
            about["teacher"]["where"],
            job.engine,
            device=device,
            threads=job.threads,
            precision=job.pseudo.precision,
            languages=about["languages"],
            cache=work.parent / ".engines",
            allow_fallback=job.fallback,
            say=said.append,
            sample=Sample(tuple(middle[:PROOF_ROWS]), self.beam, self.max_source_tokens),
        )
        self.name = f"{self.engine.name} {self.engine.precision}"
        self.rows_at_once = ROWS_AT_ONCE_GPU if device == "cuda" else ROWS_AT_ONCE[self.engine.name]
        _one_engine(work, self.name, [line for line in said if "using transformers" in line])

    def __call__(self, number: int) -> Facts:
        """Label one planned batch and write its file."""
        batch = self.plan.read_batch(number)
        started = time.monotonic()
        found = self.engine.generate(
            batch["sources"],
            self.beam,
            max_source_tokens=self.max_source_tokens,
            batch_size=self.rows_at_once,
            n_best=self.n_best,
        )
        seconds = time.monotonic() - started
        targets = [[h.text.strip() for h in hypotheses] for hypotheses in found]
        if self.also is not None:
            self.also(number, batch["ids"], batch["sources"], [texts[0] for texts in targets])
        scores = [[float(h.score) for h in hypotheses] for hypotheses in found]
        columns = {"id": batch["ids"], "targets": targets, "scores": scores}
        write_output(self.work, number, columns, self.name, seconds * self._devices)
        tokens = sum(hypotheses[0].tokens for hypotheses in found)
        return {"rows": len(found), "tokens": tokens, "seconds": seconds}

    @property
    def _devices(self) -> int:
        """What it holds: a GPU, or CPU cores."""
        return self.threads if self.engine.device == "cpu" else 1


def _one_engine(work: Path, name: str, why: list[str]) -> None:
    """All batches of a set are written by one engine: the first actor says which, and the others agree.

    UserError where a job is taken up on a machine that opens another one.
    """
    place = work / "engine.json"
    with FileLock(work / ".engine.lock"):
        sync.fetch(place)
        if not place.is_file():
            write_atomic(place, json.dumps({"engine": name, "why": " ".join(why)}).encode())
            sync.keep(place)
        with damage_told(place):
            begun = read_json(place)["engine"]
    if begun != name:
        raise UserError(
            f"{work}: the batches so far were written by {begun}, and this machine opens {name}: texts of two engines "
            f"are not mixed. Go on where {begun} can be opened, or delete the folder to begin anew"
        )


def _plain(name: str) -> str:
    """A data set's name as a folder's: "my_texts.jsonl.gz" is my-texts."""
    stem = Path(name).name.removesuffix(extension(Path(name)) or "")
    return "".join(c if c.isalnum() else "-" for c in stem)
