"""All tables of the paper's report, from sweeps, in the paper's order.

Every measured value is read from the trials' folders. Scores are means over seeds on test; of several settings, a table
shows the one with the best mean validation score. Measured values in one row come from one sweep
and one recipe; several sweeps have a row each.
"""

from collections.abc import Sequence

from raydistill.paper import published
from raydistill.paper.ablations import ablation_table
from raydistill.paper.cells import Table, drop_sweep_column
from raydistill.paper.cost_tables import corpus_table, effort_table, training_cost_table
from raydistill.paper.initialisations import initialisation_tables
from raydistill.paper.score_tables import (
    best_by_size_table,
    label_quality_table,
    label_strategy_table,
    main_results_table,
)
from raydistill.paper.seed_groups import SeedGroup, Sweep, check_comparable
from raydistill.results.tables import format_trial_counts
from raydistill.training.records import RESULT_FILE, RunResult


def make_tables(sweeps: Sequence[Sweep], seed_groups: Sequence[SeedGroup]) -> list[Table]:
    """All tables, in the paper's order.

    Raises:
        UserError: Sweeps share the name of a teacher or data set and differ in its content.
    """
    check_comparable(sweeps)
    datasets = dict.fromkeys(["XSUM", "CNN", *(sweep.dataset_name for sweep in sweeps if sweep.dataset_name)])
    tables = [
        training_cost_table(seed_groups),
        corpus_table(sweeps),
        effort_table(sweeps),
        main_results_table(seed_groups),
        *[best_by_size_table(sweeps, seed_groups, dataset) for dataset in datasets],
        *initialisation_tables(seed_groups),
        label_strategy_table(seed_groups),
        label_quality_table(sweeps),
        ablation_table(seed_groups),
    ]
    return tables if len(sweeps) > 1 else list(map(drop_sweep_column, tables))


def describe_sweeps(sweeps: Sequence[Sweep]) -> list[str]:
    """One line per sweep: trials by status, since failed trials have no scores, and how the sweep was run."""
    return [f"{sweep.name}: {format_trial_counts(sweep.trials)}; {'; '.join(_describe_run(sweep))}" for sweep in sweeps]


def _describe_run(sweep: Sweep) -> list[str]:
    """Teacher, alignment, engine, machine, versions, seeds and dates, as far as the sweep records them."""
    results = [RunResult.read(trial.folder / RESULT_FILE) for trial in sweep.trials if trial.status != "running"]
    alignments = [result.alignment for result in results if result.alignment is not None]
    teacher, hardware = sweep.teacher, sweep.teacher.machine
    days = sorted({result.ended_at[:10] for result in results if result.ended_at})
    facts = {
        "teacher": " at commit ".join(filter(None, (teacher.name, teacher.commit))),
        "logits of a full-depth copy differ by at most": (
            f"{max(alignments):.1e} of the largest logit" if alignments else ""
        ),
        "scores are of": ""
        if sweep.metric in published.METRICS
        else f"{sweep.metric}, which the paper does not report",
        "engine": f"{teacher.engine} {teacher.precision}",
        "machine": f"{hardware.get('name')} ({hardware.get('kind')}, {hardware.get('threads')} threads)",
        "hosts": ", ".join(sorted({result.host for result in results if result.host})),
        "versions": ", ".join(f"{name} {number}" for name, number in sweep.record.versions.items()),
        "seeds": ", ".join(map(str, sorted({trial.seed for trial in sweep.trials}))),
        "ended": " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "",
    }
    return [f"{name} {value}" for name, value in facts.items() if value]
