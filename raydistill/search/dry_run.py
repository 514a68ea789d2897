"""What a sweep would do, without doing it: `sweep --dry-run`, and the checks before anything starts."""

import shutil
from pathlib import Path
from typing import Any

from raydistill.config.distributions import split_parameters
from raydistill.config.label_sources import parse_labels
from raydistill.config.presets import DATASETS
from raydistill.config.run import Run
from raydistill.config.space import Space
from raydistill.core.console import format_table
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home
from raydistill.data.corpus import corpus_statistics, read_corpus, split_names
from raydistill.models.shrinking import check_same_decoder, plan_layers
from raydistill.paper.published import TABLE_4, TABLE_5, data_name, teacher_name
from raydistill.results.pareto import fits_any_budget, resolve_budgets
from raydistill.results.records import read_sweep
from raydistill.search.prepare import corner_runs

# Of running English text in BART's vocabulary; other languages and smaller vocabularies take more.
TOKENS_PER_WORD = 1.15


def describe_plan(space: Space, folder: Path) -> dict[str, Any]:
    """Trials, shapes, data, disk, what is there already; `text` is for people. Downloads and starts nothing."""
    runs = corner_runs(space)
    first = runs[0]
    config, why = load_teacher_config(first)
    data = dataset_size(first)
    sizes = sorted({run.student.size or "full" for run in runs})
    done = count_finished_trials(folder)
    lines = [
        f"sweep {space.name}: {space.search.trials} trials ({done} finished already), sampler {space.search.sampler}, "
        f"seed {space.search.seed}, in {folder}",
        f"teacher: {first.teacher}" + (f" ({why})" if why else ""),
        f"data: {first.dataset.name}: {data['text']}",
        "",
        format_table(["shape", "decoder layers copied", "M parameters"], [shape_row(s, runs, config) for s in sizes]),
        "",
        format_table(["value", "distribution"], distribution_rows(space)),
        "",
    ]
    disk = estimate_disk(runs, config, data)
    lines += disk.pop("lines")
    hours, why_hours = estimate_device_hours(runs, space.search.trials)
    lines.append(f"expected device-hours: {f'about {hours:.0f}' if hours else 'not known'} ({why_hours})")
    for name, bounds in space.budgets.items():
        lines.append(f"budget {name}: {', '.join(f'{k} <= {v}' for k, v in bounds.items())}")
    barred, unknown = estimate_infeasible_sizes(space, sizes, config, folder)
    lines.append(f"shapes that no budget admits, and that are not trained: {', '.join(barred) or 'none'}{unknown}")
    lines.append(describe_stopping(space))
    return {
        "text": "\n".join(lines),
        "name": space.name,
        "trials": space.search.trials,
        "finished": done,
        "teacher": first.teacher,
        "dataset": first.dataset.name,
        "rows": data["rows"],
        "sizes": sizes,
        "combinations": len(runs),
        "expected_gpu_hours": hours,
        "not_trained": barred,
        **disk,
    }


def estimate_device_hours(runs: list[Run], trials: int) -> tuple[float | None, str]:
    """What a search would take on the paper's GPU by the paper's costs, and by which; None where it has none.

    By Table 5 where it has the teacher, size and data of every run: a run's own cost each, and what pseudo-labels add
    once for each teacher that writes some. Else by Table 4, whose hours per experiment are over all sizes and have the
    labels in them.
    """
    place = {id(r): (teacher_name(str(r.teacher)), r.student.size or "", data_name(r.dataset.name)) for r in runs}
    rows = [TABLE_5.get(place[id(run)]) for run in runs]
    costs = [row and (row.kd if run.method == "kd" else row.sft) for run, row in zip(runs, rows, strict=True)]
    known = [cost[1] for cost in costs if cost]
    if len(known) == len(runs):
        labels = sum(published_label_hours(teacher, data) for teacher, data in labellers(runs))
        return trials * sum(known) / len(known) + labels, "the paper's Table 5, hours on an Nvidia RTX 2080"
    pairs = {(teacher, data) for teacher, _, data in place.values()}
    if pairs <= set(TABLE_4):
        hours = sum(TABLE_4[pair][0] / TABLE_4[pair][1] for pair in pairs) / len(pairs)
        return trials * hours, f"{hours:.1f} a run, the mean of the paper's Table 4, on an Nvidia RTX 2080"
    return None, "the paper has no such teacher and data"


def labellers(runs: list[Run]) -> set[tuple[str, str]]:
    """Who has to write pseudo-labels for which data, by the paper's names."""
    return {
        (teacher_name(part.other_teacher or str(run.teacher)), data_name(run.dataset.name))
        for run in runs
        for part in parse_labels(run.resolved_labels)
        if part.is_pseudo
    }


def published_label_hours(teacher: str, data: str) -> float:
    """What a teacher's pass over the training split cost in Table 5: pseudo-labels less fine-tuning."""
    return max((r.pl[1] - r.sft[1] for (t, _, d), r in TABLE_5.items() if (t, d) == (teacher, data)), default=0.0)


def count_finished_trials(folder: Path) -> int:
    """Trials of a sweep that have left their result."""
    return len(list((folder / "trials").glob("*/result.json")))


def check_space(space: Space) -> None:
    """UserError where a corner of the space asks for what its teacher or its data do not have; nothing is started.

    Reads the teacher's configuration and the names of the data's splits only.
    """
    seen: dict[str, Any] = {}
    for run in corner_runs(space):
        check_run(run, seen)


def check_run(run: Run, cache: dict[str, Any] | None = None) -> None:
    """The same for one run; `cache` keeps what was read already."""
    from raydistill.config.presets import check_teacher, teacher_preset
    from raydistill.models import families
    from raydistill.models.loading import load_config, locate_checkpoint
    from raydistill.models.tokenization import resolve_max_tokens

    cache = {} if cache is None else cache
    data = str(run.dataset)
    if data not in cache:
        cache[data] = split_names(run.dataset)
        missing = [split for split in ("train", "validation") if split not in cache[data]]
        if missing:
            raise UserError(
                f"{run.dataset.name}: training needs a train and a validation split; "
                f"there is no {' and no '.join(missing)}"
            )
    for part in parse_labels(run.resolved_labels):
        if part.other_teacher:
            check_teacher(part.other_teacher)
    if run.teacher is None:
        return
    name = f"{run.teacher} {run.dataset.name}"
    if name not in cache:
        cache[name] = load_config(locate_checkpoint(run.teacher, run.dataset.name))
    plan_layers(families.num_layers(cache[name]), run.student)
    if other := run.student.copy_from:
        if other not in cache:
            cache[other] = load_config(locate_checkpoint(other, run.dataset.name))
        check_same_decoder(cache[name], cache[other], other)
    preset = teacher_preset(run.teacher, run.dataset.name)
    resolve_max_tokens("max_source_tokens", run.dataset, preset, cache[name])
    resolve_max_tokens("max_target_tokens", run.dataset, preset, cache[name])


def load_teacher_config(run: Run) -> tuple[Any, str]:
    """The teacher's configuration and "", or None and why it cannot be read now."""
    from raydistill.models.loading import load_config, locate_checkpoint

    try:
        return load_config(locate_checkpoint(str(run.teacher), run.dataset.name)), ""
    except UserError as error:
        return None, f"not here: {error}"


def dataset_size(run: Run) -> dict[str, Any]:
    """Training rows and words: counted where the data are local, the paper's where they are the hub's."""
    known = DATASETS.get(run.dataset.name)
    if known is not None and known.paper_stats is not None:
        rows, source, target = known.paper_stats
        rows = min(rows, run.dataset.train_rows or rows)
        return {"rows": rows, "source": source, "target": target, "text": f"{rows} training rows (the paper's count)"}
    try:
        names = split_names(run.dataset)
        corpus = read_corpus(run.dataset, "train")
    except UserError as error:
        return {"rows": None, "source": 0, "target": 0, "text": f"not here: {error}"}
    found = corpus_statistics(corpus)
    text = (
        f"{len(corpus)} training rows, {found['source_words_mean']:.0f} words to {found['target_words_mean']:.0f}; "
        f"splits {', '.join(names)}"
    )
    return {
        "rows": len(corpus),
        "source": found["source_words_mean"],
        "target": found["target_words_mean"],
        "text": text,
    }


def shape_row(size: str, runs: list[Run], config: Any) -> list[str]:
    """A shape, the decoder layers that its runs copy, and its parameters where the teacher is known."""
    if config is None:
        return [size, "?", "?"]
    from raydistill.models import families
    from raydistill.search.shape_latency import count_params_m

    mine = [run for run in runs if (run.student.size or "full") == size]
    layers = {str(plan_layers(families.num_layers(config), run.student).decoder or "random") for run in mine}
    shown = "; ".join(sorted(layers))
    return [size, shown, f"{count_params_m(config, size if size != 'full' else families.size_name(config)):.1f}"]


def estimate_infeasible_sizes(space: Space, sizes: list[str], config: Any, folder: Path) -> tuple[list[str], str]:
    """Sizes that no budget admits by what is known before the sweep, and a remark on what is not known yet.

    Parameters are known; latency and memory too once a sweep of this name has timed its shapes.
    """
    from raydistill.models import families
    from raydistill.search.shape_latency import count_params_m

    if config is None or not space.budgets:
        return [], ""
    info = read_sweep(folder) if (folder / "sweep.json").is_file() else {}
    timed = info.get("shapes_fewest_beams") or {}
    whole = families.size_name(config)
    costs = {s: {"params_m": count_params_m(config, s), **timed.get(s, {})} for s in {whole, *sizes} - {"full"}}
    costs["full"] = costs[whole]
    budgets = resolve_budgets(space.budgets, {**costs[whole], **(info.get("shapes") or {}).get(whole, {})})
    remark = "" if timed else " (by their parameters; latency and memory are known once they are timed)"
    return [size for size in sizes if not fits_any_budget(costs[size], budgets)], remark


def describe_stopping(space: Space) -> str:
    """What ends a trial and the search before all trials are done, in a line."""
    search = space.search
    parts = ["every trial runs to its end"]
    if search.stops_early:
        parts = [
            f"a trial may stop early from {100 * search.grace:.3g}% of its steps on, where it is not in the better "
            f"1/{search.reduction} of its shape"
        ]
    if search.max_device_hours is not None:
        parts.append(f"no trial starts after {search.max_device_hours:g} device-hours")
    if search.max_hours is not None:
        parts.append(f"nor {search.max_hours:g} hours after the command's start")
    return "; ".join(parts)


def distribution_rows(space: Space) -> list[list[str]]:
    """Each distribution of the space and when it holds."""
    rows = []
    for case in split_parameters(space.run)[1]:
        kinds = case.distribution.model_dump(exclude_none=True)
        when = kinds.pop("when", None)
        text = ", ".join(f"{kind} {value}" for kind, value in kinds.items())
        rows.append([case.key, text + (f" when {when}" if when else "")])
    return rows


def estimate_disk(runs: list[Run], config: Any, data: dict[str, Any]) -> dict[str, Any]:
    """Bytes of the teacher cache where all of it is kept, from the corpus's words; and which label sets are wanted."""
    root = raydistill_home()
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    passes = sorted(teacher for teacher, _ in labellers(runs))
    pseudo = bool(passes)
    who = f"a pass over the training split by {' and '.join(passes)}"
    lines = [f"pseudo-labels: {who if pseudo else 'none needed'}"]
    encoder = decoder = None
    if config is not None and data["rows"]:
        encoder, decoder = estimate_cache_bytes(runs, config, data)
        asked = sorted({run.training.teacher_cache for run in runs})
        lines.append(
            f"teacher cache ({', '.join(asked)}): encoder states about {encoder / 1e9:.1f} GB, decoder states about "
            f"{decoder / 1e9:.1f} GB; {free / 1e9:.0f} GB are free under {root}"
        )
        if "auto" in asked:
            lines.append(
                "  auto keeps what fits and is read faster than worked out anew; it measures when the sweep starts"
            )
    return {
        "lines": lines,
        "encoder_bytes": encoder,
        "decoder_bytes": decoder,
        "free_bytes": free,
        "pseudo_labels": pseudo,
    }


def estimate_cache_bytes(runs: list[Run], config: Any, data: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the encoder states, and of the decoder states of all label sets, that the runs would read."""
    from raydistill.models import families
    from raydistill.teacher_cache.policy import resolve_read_set

    reading = [run for run in runs if run.training.teacher_cache != "off"]
    each = config.d_model * (4 if any(run.training.cache_precision == "fp32" for run in reading) else 2)
    source = min(data["source"] * TOKENS_PER_WORD, runs[0].dataset.max_source_tokens or 1024)
    layers: dict[str, set[int]] = {}
    encoder = False
    for run in reading:
        reads = resolve_read_set(run, families.num_layers(config))
        encoder |= reads.encoder
        if run.training.teacher_cache != "encoder":
            layers.setdefault(run.label_key, set()).update(reads.layers)
    count = sum(map(len, layers.values()))
    target = data["target"] * TOKENS_PER_WORD
    return int(encoder * data["rows"] * each * source), int(data["rows"] * each * target * count)
