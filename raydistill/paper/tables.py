"""The paper's Tables 2 to 10 from sweeps, the paper's own figure beside each of ours, an empty cell where one has none.

Every figure of ours is read from the trials' folders when the table is made: nothing is kept in between. Scores are on
test and means over seeds; what a table shows of several settings is the one with the best validation score. Ours in a
row are of one sweep, so of one recipe; of several sweeps each has a row.
"""

from collections.abc import Iterable, Mapping, Sequence

from raydistill.core.files import damage_told, read_json
from raydistill.paper import published
from raydistill.paper.ablations import ablations, as_in_table_5
from raydistill.paper.cells import SWEEP, Table, beside, interval, number, without_sweep
from raydistill.paper.initialisations import initialisations
from raydistill.paper.settings import Setting, Sweep, best, by_sweep, check_together, difference, less_teacher
from raydistill.results.tables import count_trials

METHODS = {"sft": "SFT", "kd": "KD", "pl": "Pseudo"}
EXTRA = {"sft": "", "pl": "T's generations", "kd": "T's hidden states, logits"}
LOSSES = {"sft": "L_data", "pl": "L_pseudo", "kd": "L_kd"}
PLAIN_LABELS = {"sft": "original", "kd": "original", "pl": "pseudo"}
LABELS = {
    "Orig": ("original",),
    "PL": ("pseudo",),
    "Orig+PL": ("original", "pseudo"),
    "Orig+PL+PL*": ("original", "pseudo", "other"),
}
QUALITY = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum", "bleu": "BLEU"}
INTERVAL = (
    "Differences are of the means over the n seeds that both sides have, in brackets the 95 % interval of a paired "
    "bootstrap over the test rows: it tells of the rows' chance and not of the seeds'."
)


def tables(sweeps: Sequence[Sweep], settings: Sequence[Setting]) -> list[Table]:
    """All of them, in the paper's order; UserError where sweeps cannot stand in one report."""
    check_together(sweeps)
    made = [
        costs(settings),
        corpora(sweeps),
        effort(sweeps),
        main_results(settings),
        *[best_by_size(sweeps, settings, data) for data in _data_of_best(sweeps)],
        *initialisations(settings),
        label_strategies(settings),
        label_quality(sweeps),
        ablations(settings),
    ]
    return made if len(sweeps) > 1 else list(map(without_sweep, made))


def heads(sweeps: Sequence[Sweep]) -> list[str]:
    """A line about each sweep: what became of its trials, since the failed are in no score, and how it was run."""
    return [f"{sweep.name}: {count_trials(sweep.trials)}; {'; '.join(_run_how(sweep))}" for sweep in sweeps]


def _run_how(sweep: Sweep) -> list[str]:
    """Teacher, alignment, engine, machine, versions, seeds and dates; nothing for what the sweep does not tell."""
    results = [read_json(t.folder / "result.json") for t in sweep.trials if t.status != "running"]
    apart = [found["alignment"] for found in results if found.get("alignment") is not None]
    with damage_told(sweep.folder / "sweep.json"):
        known = dict(sweep.teacher.get("machine") or {})
        machine = f"{known['name']} ({known['kind']}, {known['threads']} threads)" if known else ""
        versions = dict(sweep.info.get("versions") or {})
    days = sorted({str(found["ended_at"])[:10] for found in results if found.get("ended_at")})
    told = {
        "teacher": " at commit ".join(str(sweep.teacher[key]) for key in ("name", "commit") if sweep.teacher.get(key)),
        "a full-depth copy of it differs by": f"{max(apart):.1e} of the largest logit" if apart else "",
        "engine": str(sweep.teacher.get("engine") or ""),
        "machine": machine,
        "hosts": ", ".join(sorted({str(found["host"]) for found in results if found.get("host")})),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "seeds": ", ".join(map(str, sorted({trial.seed for trial in sweep.trials}))),
        "ended": " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "",
    }
    return [f"{what} {value}" for what, value in told.items() if value]


def costs(settings: Sequence[Setting]) -> Table:
    """Table 2: what each technique costs end to end."""
    rows = []
    for place, sweep, mine in _rows_of(_plain(settings), [published.TABLE_2_SETTING]):
        theirs = published.TABLE_2 if place == published.TABLE_2_SETTING else {}
        for method in ("sft", "pl", "kd"):
            ours = best(s for s in mine if s.run.method == method)
            cells = [
                METHODS[method],
                EXTRA[method],
                number(ours.cost if ours else None, 3),
                number(theirs.get(method), 1),
            ]
            rows.append([*place, sweep, *cells, LOSSES[method]])
    header = ["teacher", "size", "data", SWEEP, "technique", "extra supervision"]
    header += ["device-hours", "paper: GPU hours", "loss"]
    return Table("table2", "Table 2: training time of different distillation approaches, end to end", header, rows)


def corpora(sweeps: Sequence[Sweep]) -> Table:
    """Table 3: data set statistics, a row for each training split that differs."""
    ours: dict[tuple[str, str], list[Sweep]] = {}
    for sweep in sweeps:
        if sweep.data and "corpus" in sweep.teacher:
            mark = (sweep.teacher.get("data") or {}).get("train", "")
            ours.setdefault((sweep.data, mark), []).append(sweep)
    names = dict.fromkeys([*published.TABLE_3, *(sweep.data for sweep in sweeps if sweep.data)])
    rows = []
    for name in names:
        theirs = published.TABLE_3.get(name)
        for same in [found for (data, _), found in ours.items() if data == name] or [[]]:
            own = same[0].teacher["corpus"] if same else None
            rows.append(
                [
                    name,
                    ", ".join(sweep.name for sweep in same),
                    number(own and own["rows"], 0),
                    number(theirs and theirs.rows, 0),
                    number(own and own["source_words_mean"], 1),
                    number(theirs and theirs.source_words, 0),
                    number(own and own["target_words_mean"], 1),
                    number(theirs and theirs.target_words, 0),
                    number(own and own["bytes"] / 1e6, 1),
                    number(theirs and theirs.megabytes, 0),
                ]
            )
    header = ["data", SWEEP, *beside("training rows", "mean source words", "mean target words", "size (MB)")]
    return Table("table3", "Table 3: data set statistics", header, rows)


def effort(sweeps: Sequence[Sweep]) -> Table:
    """Table 4: device-hours and experiments per teacher and data set, the teacher's passes among them.

    What several sweeps read of one pass is counted once.
    """
    hours: dict[tuple[str, str], float] = {}
    made: dict[tuple[str, str], dict[str, float]] = {}
    runs: dict[tuple[str, str], int] = {}
    for sweep in sweeps:
        if sweep.data is None:
            continue
        key = (sweep.teacher_name, sweep.data)
        hours[key] = hours.get(key, 0.0) + sum(trial.device_hours for trial in sweep.trials)
        made.setdefault(key, {}).update(sweep.passes)
        runs[key] = runs.get(key, 0) + len(sweep.trials)
    hours = {key: spent + sum(made[key].values()) for key, spent in hours.items()}
    theirs_hours = {key: spent for key, (spent, _) in published.TABLE_4.items()}
    theirs_runs = {key: count for key, (_, count) in published.TABLE_4.items()}
    keys = dict.fromkeys([*published.TABLE_4, *hours])
    rows = [[*key, *_shares(hours, theirs_hours, key, 3), *_shares(runs, theirs_runs, key, 0)] for key in keys]
    totals = [number(sum(hours.values()) if hours else None, 3), number(sum(theirs_hours.values()), 0), "", ""]
    totals += [number(sum(runs.values()) if runs else None, 0), number(sum(theirs_runs.values()), 0), "", ""]
    rows.append(["TOTALS", "", *totals])
    header = ["teacher", "data", *beside("device-hours", "% of hours", "experiments", "% of experiments")]
    note = "The paper counts experiments of 15 minutes or more; ours are all trials that were begun."
    return Table("table4", "Table 4: effort", header, rows, note)


def main_results(settings: Sequence[Setting]) -> Table:
    """Table 5: the three methods, their cost, and what kd and pl gain over sft."""
    rows = []
    for place, sweep, mine in _rows_of(_plain(settings), published.TABLE_5):
        theirs = published.TABLE_5.get(place)
        found = {method: best(s for s in mine if s.run.method == method) for method in METHODS}
        row = [*place, sweep, *_teacher_cells(mine, theirs and theirs.teacher)]
        for method, ours in found.items():
            pair = getattr(theirs, method) if theirs else None
            row += [_score(ours), number(pair and pair[0], 2)]
            row += [
                number(ours.cost if ours else None, 3),
                number(pair and pair[1], 1),
                str(ours.seeds) if ours else "",
            ]
        row += [_gain(found[method], found["sft"]) for method in ("kd", "pl")]
        rows.append(row)
    header = ["teacher", "size", "data", SWEEP, *beside("teacher score")]
    for name in METHODS.values():
        header += [*beside(f"{name} score", f"{name} cost"), f"{name} seeds"]
    header += ["KD - SFT", "Pseudo - SFT"]
    return Table("table5", "Table 5: main results", header, rows, INTERVAL)


def best_by_size(sweeps: Sequence[Sweep], settings: Sequence[Setting], data: str) -> Table:
    """Tables 6 (XSUM) and 7 (CNN), and the same of other data: the best student of each size, whatever the method.

    The teacher has a row of its own, also where a student is as deep.
    """
    mine = [sweep for sweep in sweeps if sweep.data == data]
    theirs = {key[:2]: row for key, row in published.TABLES_6_7.items() if key[2] == data}
    teachers: dict[tuple[str, str], list[Sweep]] = {}
    for sweep in mine:
        teachers.setdefault((sweep.teacher_name, str(sweep.teacher.get("size"))), []).append(sweep)
    students: dict[tuple[str, str], list[Setting]] = {}
    for s in settings:
        if s.place[2] == data:
            students.setdefault(s.place[:2], []).append(s)
    metric = mine[0].metric if mine else "rouge2"
    rows: list[list[str]] = []
    for key in _by_teacher([*theirs, *students, *teachers]):
        row, known = theirs.get(key), len(rows)
        rows += [_teacher_of_size(key, sweep, metric, row) for sweep in teachers.get(key, [])]
        for sweep, same in by_sweep(students.get(key, [])):
            # The paper's row of a teacher's size is the teacher's.
            if chosen := best(same):
                rows.append(_student_of_size(key, sweep, chosen, metric, None if key in teachers else row))
        if len(rows) == known and row:
            rows.append([*key, "", "", *_figures({}, {}, metric, row)])
    number_of = {"XSUM": "Table 6", "CNN": "Table 7"}.get(data, "As Tables 6 and 7")
    main = "BLEU" if metric == "bleu" else "ROUGE-2"
    header = ["teacher", "size", SWEEP, "ours by", *beside("params (M)", "ms for 32", "speed-up", main, "ROUGE-L")]
    name = {"XSUM": "table6", "CNN": "table7"}.get(data, f"table6_{data}")
    note = "The paper's times are on an Nvidia RTX 2080 (BART in mixed precision); ours on the machine of the sweep."
    return Table(name, f"{number_of}: best {data} results of each size across all methods", header, rows, note)


def _teacher_of_size(key: tuple[str, str], sweep: Sweep, metric: str, row: published.Best | None) -> list[str]:
    measured = sweep.teacher.get("costs") or {}
    values = {**measured, "speedup": 1.0 if measured else None}
    return [*key, sweep.name, "teacher", *_figures(values, sweep.teacher.get("test") or {}, metric, row)]


def _student_of_size(
    key: tuple[str, str], sweep: Sweep, student: Setting, metric: str, row: published.Best | None
) -> list[str]:
    values = {name: student.measure(name) for name in ("params_m", "latency_ms", "speedup")}
    scores = {name: student.test(name) for name in (metric, "rougeL")}
    how = f"{METHODS[student.run.method]} on {student.labels}, n = {student.seeds}"
    return [*key, sweep.name, how, *_figures(values, scores, metric, row)]


def _figures(
    values: Mapping[str, float | None], scores: Mapping[str, float | None], metric: str, row: published.Best | None
) -> list[str]:
    """The figures of a row of Tables 6 and 7, ours and the paper's."""
    return [
        number(values.get("params_m"), 1),
        number(row and row.params, 0),
        number(values.get("latency_ms"), 0),
        number(row and row.ms, 0),
        number(values.get("speedup"), 2),
        number(row and row.speedup, 2),
        number(scores.get(metric), 2),
        number(row and row.rouge2, 2),
        number(scores.get("rougeL"), 2),
        number(row and row.rougeL, 2),
    ]


def label_strategies(settings: Sequence[Setting]) -> Table:
    """Table 10: students' scores less their teacher's, by what they were trained to write."""
    rows = []
    for place, sweep, mine in _rows_of(_with_labels(settings), published.TABLE_10):
        theirs = published.TABLE_10.get(place)
        found = {name: best(s for s in mine if s.label_kinds == kinds) for name, kinds in LABELS.items()}
        row = [*place, sweep, *_teacher_cells(mine, theirs and theirs.teacher)]
        figures = theirs[1:] if theirs else (None,) * len(LABELS)
        for ours, figure in zip(found.values(), figures, strict=True):
            row += [_less_teacher(ours), number(figure, 1, sign=True)]
        rows.append(row)
    header = ["teacher", "size", "data", SWEEP, *beside("teacher score", *LABELS)]
    note = f"Student less teacher. {INTERVAL} PL*: with another teacher's labels added."
    return Table("table10", "Table 10: pseudo-labelling strategies", header, rows, note)


def label_quality(sweeps: Sequence[Sweep]) -> Table:
    """Under Table 10: the scores of the pseudo-labels against the originals, a row for each set."""
    rows = []
    for sweep in sweeps:
        for name, told in (sweep.teacher.get("label_sets") or {}).items():
            quality = told.get("quality") or {}
            who = published.teacher_name(told["teacher"]) if told.get("teacher") else ""
            scores = [number(quality.get(metric), 2) for metric in QUALITY]
            rows.append([who, sweep.data or "", sweep.name, name, number(told.get("rows"), 0), *scores])
    header = ["teacher", "data", SWEEP, "label set", "rows", *QUALITY.values()]
    return Table("table10_labels", "The pseudo-labels of Table 10 against the originals", header, rows)


def _gain(a: Setting | None, b: Setting | None) -> str:
    found = difference(a, b) if a and b else None
    return interval(*found) if found else ""


def _less_teacher(student: Setting | None) -> str:
    """With its interval where the rows of both are there; else the plain difference."""
    if student is None:
        return ""
    if found := less_teacher(student):
        return interval(*found)
    metric = student.sweep.metric
    score, theirs = student.test(metric), (student.sweep.teacher.get("test") or {}).get(metric)
    return "" if score is None or theirs is None else f"{score - theirs:+.2f}, n = {student.seeds}"


def _score(setting: Setting | None) -> str:
    return number(setting.test(setting.sweep.metric) if setting else None, 2)


def _teacher_cells(mine: Sequence[Setting], theirs: float | None) -> list[str]:
    """Our teacher's score on test, and the paper's."""
    sweep = mine[0].sweep if mine else None
    score = (sweep.teacher.get("test") or {}).get(sweep.metric) if sweep else None
    return [number(score, 2), number(theirs, 2)]


def _plain(settings: Sequence[Setting]) -> list[Setting]:
    """The methods as Table 5 means them: spaced layers, the paper's losses, and labels as the method has them."""
    return as_in_table_5(s for s in settings if s.spaced and s.label_kinds == (PLAIN_LABELS[s.run.method],))


def _with_labels(settings: Sequence[Setting]) -> list[Setting]:
    """What Table 10 compares: fine-tuning on one of its mixes, none weighted."""
    mine = (s for s in settings if s.run.method in ("sft", "pl") and s.spaced)
    return [s for s in mine if s.label_kinds in LABELS.values() and "*" not in s.run.label_source]


def _rows_of(
    settings: Sequence[Setting], theirs: Iterable[published.Setting]
) -> list[tuple[published.Setting, str, list[Setting]]]:
    """A row's place, sweep and settings: the paper's places, then ours that it does not have; "" without a sweep."""
    rows: list[tuple[published.Setting, str, list[Setting]]] = []
    for place in dict.fromkeys([*theirs, *(s.place for s in settings)]):
        ours = by_sweep(s for s in settings if s.place == place)
        rows += [(place, sweep.name, mine) for sweep, mine in ours] or [(place, "", [])]
    return rows


def _data_of_best(sweeps: Sequence[Sweep]) -> list[str]:
    return list(dict.fromkeys(["XSUM", "CNN", *(sweep.data for sweep in sweeps if sweep.data)]))


def _by_teacher(keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each once, a teacher's together, in the order of first sight."""
    teachers = list(dict.fromkeys(teacher for teacher, _ in keys))
    return sorted(dict.fromkeys(keys), key=lambda key: teachers.index(key[0]))


def _shares(
    ours: Mapping[tuple[str, str], float], theirs: Mapping[tuple[str, str], float], key: tuple[str, str], digits: int
) -> list[str]:
    """A figure and its share of the sum in per cent, ours and the paper's."""

    def share(values: Mapping[tuple[str, str], float]) -> float | None:
        return 100 * values[key] / total if key in values and (total := sum(values.values())) else None

    figures = [number(ours.get(key), digits), number(theirs.get(key), 0)]
    return [*figures, number(share(ours), 0), number(share(theirs), 0)]
