"""The plan of a sweep, for `sweep --dry-run`: trials, shapes, data, disk and expected cost. Starts nothing."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raydistill.config.distributions import split_parameters
from raydistill.config.label_sources import parse_labels
from raydistill.config.presets import DATASETS
from raydistill.config.run import Run
from raydistill.config.shapes import Shape, shape_sort_key
from raydistill.config.space import Space, corner_runs, shape_runs
from raydistill.core.console import format_table
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home
from raydistill.data.corpus import corpus_statistics, read_corpus, split_names
from raydistill.data.streaming import scan_split
from raydistill.models.shrinking import plan_student
from raydistill.paper.published import TABLE_4, TABLE_5, data_name, teacher_name
from raydistill.results.formatting import format_count
from raydistill.results.pareto import bound_sign, fits_any_budget, resolve_budgets
from raydistill.results.records import count_finished_trials
from raydistill.results.sweep_record import SWEEP_FILE, SweepRecord
from raydistill.training.preflight import check_space

# English text in BART's vocabulary; other languages and smaller vocabularies need more
TOKENS_PER_WORD = 1.15


@dataclass(frozen=True)
class DatasetSize:
    """Rows of the training split, mean words of a source and a target, and a description.

    `rows` is None if the data cannot be read, for the reason `problem`. `is_local` is false for data of the hub whose
    size the paper gives, and which are not read here.
    """

    rows: int | None
    source_words: float
    target_words: float
    text: str
    problem: str = ""
    is_local: bool = True


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes of encoder and decoder states if the whole teacher cache is kept; None if unknown."""

    encoder_bytes: int | None
    decoder_bytes: int | None
    free_bytes: int
    lines: list[str]


def describe_plan(space: Space, folder: Path) -> dict[str, Any]:
    """What a sweep would do and what its folder already has.

    Returns:
        A mapping for `--json`, and the description under "text". "problems" are reasons why the sweep would not start.
    """
    runs = corner_runs(space)
    first = runs[0]
    config, problem = load_teacher_config(first)
    data = dataset_size(first)
    sizes = sorted({run.student.shape.name for run in shape_runs(space)}, key=shape_sort_key)
    num_finished = count_finished_trials(folder)
    labellers = sorted(teacher for teacher, _ in labelling_passes(runs))
    extra_rows, extra_text = count_extra_rows(runs)
    disk = estimate_disk(runs, config, data, extra_rows or 0)
    hours, hours_source = estimate_device_hours(runs, space.search.trials)
    repeats = 2 * len(space.budgets) * (space.search.seeds - 1)  # the choice of each budget and its nearest rival
    infeasible, remark = estimate_infeasible_sizes(space, sizes, config, folder)
    texts = "the training split and the extra sources" if extra_rows else "the training split"
    passes = f"a pass over {texts} by {' and '.join(labellers)}" if labellers else "none needed"
    lines = [
        f"sweep {space.name}: {format_count(space.search.trials, 'trial')} ({num_finished} finished already), "
        f"sampler {space.search.sampler}, seed {space.search.seed}, in {folder}",
        f"teacher: {first.teacher}" + (f" (not available: {problem})" if problem else ""),
        f"data: {first.dataset.name}: {data.text}",
        *([f"extra sources: {extra_text}"] if extra_text else []),
        "",
        format_table(["shape", "decoder layers copied", "M parameters"], [shape_row(s, runs, config) for s in sizes]),
        "",
        format_table(["value", "distribution"], distribution_rows(space)),
        "",
        f"pseudo-labels: {passes}",
        *disk.lines,
        f"expected device-hours: {f'about {hours:.0f}' if hours else 'not known'} ({hours_source})",
        *describe_repeats(repeats),
        *[
            f"budget {name}: {', '.join(f'{cost} {bound_sign(cost)} {bound}' for cost, bound in bounds.items())}"
            for name, bounds in space.budgets.items()
        ],
        f"shapes that no budget admits, and that are not trained: {', '.join(infeasible) or 'none'}{remark}",
        describe_stopping(space),
    ]
    return {
        "text": "\n".join(lines),
        "name": space.name,
        "trials": space.search.trials,
        "finished": num_finished,
        "teacher": first.teacher,
        "dataset": first.dataset.name,
        "rows": data.rows,
        "extra_rows": extra_rows,
        "sizes": sizes,
        "combinations": len(runs),
        "expected_device_hours": hours,
        "seed_repeats": repeats,
        "infeasible_sizes": infeasible,
        "encoder_bytes": disk.encoder_bytes,
        "decoder_bytes": disk.decoder_bytes,
        "free_bytes": disk.free_bytes,
        "pseudo_labels": bool(labellers),
        "problems": find_problems(space, problem, data),
    }


def find_problems(space: Space, teacher_problem: str, data: DatasetSize) -> list[str]:
    """Why the sweep would not start: the teacher or the data are missing, or do not fit the space."""
    problems = [teacher_problem] if teacher_problem else []
    problems += [data.problem] if data.problem else []
    if not problems and data.is_local:
        try:
            check_space(space)
        except UserError as error:
            problems.append(str(error))
    return problems


def estimate_device_hours(runs: list[Run], trials: int) -> tuple[float | None, str]:
    """Device-hours of a search on the paper's GPU, and the source of the estimate; None if the paper has no figures.

    Table 5 of Shleifer and Rush (2020) is used if the table has the teacher, size and data of every run: the mean
    cost of the runs times `trials`, and the cost of pseudo-labels once for each teacher that writes some. Otherwise
    Table 4 is used, whose hours per experiment are means over all sizes that include the labels.
    """
    rows = [(teacher_name(str(run.teacher)), run.student.shape.name, data_name(run.dataset.name)) for run in runs]
    published = [TABLE_5.get(row) for row in rows]
    costs = [row and (row.kd if run.method == "kd" else row.sft) for run, row in zip(runs, published, strict=True)]
    known_hours = [cost[1] for cost in costs if cost]
    if len(known_hours) == len(runs):
        labels = sum(published_label_hours(teacher, data) for teacher, data in labelling_passes(runs))
        return trials * sum(known_hours) / len(known_hours) + labels, "the paper's Table 5, hours on an Nvidia RTX 2080"
    pairs = {(teacher, data) for teacher, _, data in rows}
    if pairs <= set(TABLE_4):
        hours = sum(TABLE_4[pair][0] / TABLE_4[pair][1] for pair in pairs) / len(pairs)
        return trials * hours, f"{hours:.1f} a run, the mean of the paper's Table 4, on an Nvidia RTX 2080"
    return None, "the paper has no figures for this teacher and data"


def labelling_passes(runs: list[Run]) -> set[tuple[str, str]]:
    """(teacher, data set) of the passes that write the runs' pseudo-labels, by the paper's names."""
    return {
        (teacher_name(part.other_teacher or str(run.teacher)), data_name(run.dataset.name))
        for run in runs
        for part in parse_labels(run.resolved_labels)
        if part.is_pseudo
    }


def published_label_hours(teacher: str, data: str) -> float:
    """Hours of a teacher's pass over the training split in Table 5: pseudo-label training less fine-tuning."""
    return max((r.pl[1] - r.sft[1] for (t, _, d), r in TABLE_5.items() if (t, d) == (teacher, data)), default=0.0)


def load_teacher_config(run: Run) -> tuple[Any, str]:
    """The teacher's configuration and an empty text, or None and the reason why it is missing."""
    from raydistill.models.loading import load_config, locate_checkpoint

    try:
        return load_config(locate_checkpoint(str(run.teacher), run.dataset.name)), ""
    except UserError as error:
        return None, str(error)


def dataset_size(run: Run) -> DatasetSize:
    """Size of the training split: counted for local data, the paper's figures for data on the hub."""
    known = DATASETS.get(run.dataset.name)
    if known is not None and known.paper_stats is not None:
        rows, source, target = known.paper_stats
        rows = min(rows, run.dataset.train_rows or rows)
        return DatasetSize(rows, source, target, f"{rows} training rows (the paper's count)", is_local=False)
    try:
        names = split_names(run.dataset)
        corpus = read_corpus(run.dataset, "train")
    except UserError as error:
        return DatasetSize(None, 0, 0, f"not available: {error}", str(error))
    statistics = corpus_statistics(corpus)
    source, target = statistics["source_words_mean"], statistics["target_words_mean"]
    text = f"{len(corpus)} training rows, {source:.0f} words to {target:.0f}; splits {', '.join(names)}"
    return DatasetSize(len(corpus), source, target, text)


def shape_row(shape: str, runs: list[Run], config: Any) -> list[str]:
    """A table row: the shape, the decoder layers that the runs copy, and millions of parameters."""
    if config is None:
        return [shape, "?", "?"]
    from raydistill.search.shape_latency import count_params_m

    runs = [run for run in runs if run.student.shape.name == shape]
    layers = {
        "measured" if run.student.measures_layers else str(plan_student(config, run.student).decoder or "random")
        for run in runs
    }
    at_most = "at most " if Shape.parse(shape).vocabulary == "used" else ""
    return [shape, "; ".join(sorted(layers)), f"{at_most}{count_params_m(config, shape):.1f}"]


def estimate_infeasible_sizes(space: Space, sizes: list[str], config: Any, folder: Path) -> tuple[list[str], str]:
    """Sizes that no budget admits by the costs known before the sweep, and a remark on missing costs.

    Numbers of parameters are known except for "used" tokens; latency and memory once a sweep in `folder` has timed the
    shapes.
    """
    from raydistill.models import families
    from raydistill.search.shape_latency import count_params_m

    if config is None or not space.budgets:
        return [], ""
    record = SweepRecord.read_if_present(folder / SWEEP_FILE)
    if record is not None:
        shapes = record.shapes
        return [size for size in sizes if shapes.is_infeasible(size, space.budgets)], ""
    full = families.size_name(config)
    costs = {}
    for name in (full, *sizes):
        shape = Shape.parse(name).with_full_size(full)
        costs[name] = {} if shape.vocabulary == "used" else {"params_m": count_params_m(config, shape.name)}
    budgets = resolve_budgets(space.budgets, costs[full])
    remark = " (by their parameters; latency and memory are known once the shapes are timed)"
    return [size for size in sizes if not fits_any_budget(costs[size], budgets)], remark


def describe_stopping(space: Space) -> str:
    """What ends a trial, and the search before all trials are finished, in one line."""
    search = space.search
    parts = ["no trial is stopped early"]
    if search.stops_early:
        parts = [
            f"a trial may stop early after {100 * search.grace:.3g}% of its steps, if it is not in the better "
            f"1/{search.reduction} of its shape"
        ]
    if search.max_device_hours is not None:
        parts.append(f"no trial starts after {search.max_device_hours:g} device-hours")
    if search.max_hours is not None:
        parts.append(f"no trial starts {search.max_hours:g} hours after the command's start")
    return "; ".join(parts)


def describe_repeats(repeats: int) -> list[str]:
    """A line about the runs with further seeds; no line if there are none."""
    if not repeats:
        return []
    runs = format_count(repeats, "run")
    return [
        f"further seeds: {runs} after the search if every budget has another choice and rival, more if the means over "
        f"the seeds change a choice; not part of the device-hours"
    ]


def distribution_rows(space: Space) -> list[list[str]]:
    """Table rows: each distribution of the space with its condition."""
    rows = []
    for case in split_parameters(space.run)[1]:
        fields = case.distribution.model_dump(exclude_none=True)
        condition = fields.pop("when", None)
        text = ", ".join(f"{kind} {value}" for kind, value in fields.items())
        rows.append([case.key, text + (f" when {condition}" if condition else "")])
    return rows


def count_extra_rows(runs: list[Run]) -> tuple[int | None, str]:
    """Rows of `pseudo.extra` that trials read at most, before rows are left out, and a description.

    None and "" if no trial reads any; None and the problem if the texts cannot be read.
    """
    readers = [run.pseudo for run in runs if run.reads_extra]
    extra = readers[0].extra if readers else None
    if extra is None:
        return None, ""
    try:
        total = scan_split(extra.as_dataset(), extra.split).rows
    except UserError as error:
        return None, f"{extra.name}: not available: {error}"
    counts = sorted({min(total, total if pseudo.extra_rows is None else pseudo.extra_rows) for pseudo in readers})
    used = " or ".join(f"{count:,}" for count in counts)
    return counts[-1], f"{extra.name}: {total:,} rows, of which trials read {used}, less repeated rows"


def estimate_disk(runs: list[Run], config: Any, data: DatasetSize, extra_rows: int = 0) -> DiskEstimate:
    """Size of the teacher cache, from the words of the corpus, and free disk space.

    Rows of `pseudo.extra` count like rows of the training split.
    """
    root = raydistill_home()
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if config is None or not data.rows:
        return DiskEstimate(None, None, free, [])
    encoder, decoder = estimate_cache_bytes(runs, config, replace(data, rows=data.rows + extra_rows))
    modes = sorted({run.training.teacher_cache for run in runs})
    lines = [
        f"teacher cache ({', '.join(modes)}): encoder states about {encoder / 1e9:.1f} GB, decoder states about "
        f"{decoder / 1e9:.1f} GB; {free / 1e9:.0f} GB are free under {root}"
    ]
    if "auto" in modes:
        lines.append("  auto keeps the states that fit and are faster to read than to compute; measured at the start")
    return DiskEstimate(encoder, decoder, free, lines)


def estimate_cache_bytes(runs: list[Run], config: Any, data: DatasetSize) -> tuple[int, int]:
    """Bytes of the encoder states, and of the decoder states of all label sets, that the runs would read.

    A state is a vector of `d_model` numbers per token, and decoder states are kept per layer.
    """
    from raydistill.teacher_cache.policy import resolve_read_set
    from raydistill.teacher_cache.storage_dtypes import vector_bytes

    readers = [run for run in runs if run.training.teacher_cache != "off"]
    bytes_per_token = max((vector_bytes(run.training.cache_precision, config.d_model) for run in readers), default=0)
    layers_by_label_set: dict[str, set[int]] = {}
    reads_encoder = False
    for run in readers:
        reads = resolve_read_set(run, config)
        reads_encoder |= reads.encoder
        if run.training.teacher_cache != "encoder":
            layers_by_label_set.setdefault(run.label_key, set()).update(reads.layers)
    num_decoder_layers = sum(map(len, layers_by_label_set.values()))
    rows = data.rows or 0
    source_tokens = min(data.source_words * TOKENS_PER_WORD, runs[0].dataset.max_source_tokens or 1024)
    target_tokens = data.target_words * TOKENS_PER_WORD
    encoder_bytes = reads_encoder * rows * bytes_per_token * source_tokens
    return int(encoder_bytes), int(rows * bytes_per_token * target_tokens * num_decoder_layers)
