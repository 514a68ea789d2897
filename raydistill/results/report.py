"""The paper's Tables 2 to 10 from sweeps, the paper's own figure beside each of ours, an empty cell where one has none.

Every figure of ours is read from the trials' folders when the table is made: nothing is kept in between. Scores are on
test and means over seeds; what a table shows of several settings is the one with the best validation score.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from raydistill.evaluation.scores import Comparison
from raydistill.results import paper
from raydistill.results.settings import Setting, Sweep, best, difference

METHODS = {"sft": "SFT", "kd": "KD", "pl": "Pseudo"}
EXTRA = {"sft": "", "pl": "T's generations", "kd": "T's hidden states, logits"}
LOSSES = {"sft": "L_data", "pl": "L_pseudo", "kd": "L_kd"}
INITS = {"spaced": "SFT", "first": "SFT lo", "middle": "SFT mid", "last": "SFT hi", "repeated": "SFT 000"}
LABELS = {
    "Orig": ("original",),
    "PL": ("pseudo",),
    "Orig+PL": ("original", "pseudo"),
    "Orig+PL+PL*": ("original", "pseudo", "other"),
}
INTERVAL = (
    "In brackets the 95 % interval of a paired bootstrap over the test rows, n seeds' scores taken together: it tells "
    "of the rows' chance and not of the seeds'."
)


@dataclass(frozen=True)
class Table:
    """A table of the paper, ours and its figures side by side. Cells are text, "" where there is no figure."""

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def tables(sweeps: Sequence[Sweep], settings: Sequence[Setting]) -> list[Table]:
    """All of them, in the paper's order."""
    return [
        costs(settings),
        corpora(sweeps),
        effort(sweeps),
        main_results(settings),
        *[best_by_size(sweeps, settings, data) for data in _data_of_best(sweeps)],
        *initialisations(settings),
        label_strategies(settings),
    ]


def costs(settings: Sequence[Setting]) -> Table:
    """Table 2: what each technique costs end to end."""
    rows = []
    for place in _places(settings, [paper.TABLE_2_SETTING]):
        theirs = paper.TABLE_2 if place == paper.TABLE_2_SETTING else {}
        for method in ("sft", "pl", "kd"):
            ours = best(_plain(settings, place, method))
            cells = [
                METHODS[method],
                EXTRA[method],
                number(ours.cost if ours else None, 3),
                number(theirs.get(method), 1),
            ]
            rows.append([*place, *cells, LOSSES[method]])
    header = ["teacher", "size", "data", "technique", "extra supervision", "device-hours", "paper: GPU hours", "loss"]
    return Table("table2", "Table 2: training time of different distillation approaches, end to end", header, rows)


def corpora(sweeps: Sequence[Sweep]) -> Table:
    """Table 3: data set statistics."""
    ours = {paper.data_name(name): s.teacher["corpus"] for s in sweeps if (name := _dataset(s)) and _has_corpus(s)}
    rows = []
    for name in dict.fromkeys([*paper.TABLE_3, *map(paper.data_name, filter(None, map(_dataset, sweeps)))]):
        own, theirs = ours.get(name), paper.TABLE_3.get(name)
        rows.append(
            [
                name,
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
    header = ["data", *_beside("training rows", "mean source words", "mean target words", "size (MB)")]
    return Table("table3", "Table 3: data set statistics", header, rows)


def effort(sweeps: Sequence[Sweep]) -> Table:
    """Table 4: device-hours and experiments per teacher and data set, the teacher's passes among them."""
    hours: dict[tuple[str, str], float] = {}
    runs: dict[tuple[str, str], int] = {}
    for sweep in sweeps:
        if (data := _dataset(sweep)) is None:
            continue
        key = (paper.teacher_name(str(sweep.teacher.get("name"))), paper.data_name(data))
        own = sum(trial.device_hours for trial in sweep.trials)
        hours[key] = hours.get(key, 0.0) + own + float(sweep.info.get("teacher_gpu_hours") or 0.0)
        runs[key] = runs.get(key, 0) + len(sweep.trials)
    theirs_hours = {key: spent for key, (spent, _) in paper.TABLE_4.items()}
    theirs_runs = {key: count for key, (_, count) in paper.TABLE_4.items()}
    keys = dict.fromkeys([*paper.TABLE_4, *hours])
    rows = [[*key, *_shares(hours, theirs_hours, key, 3), *_shares(runs, theirs_runs, key, 0)] for key in keys]
    totals = [number(sum(hours.values()) if hours else None, 3), number(sum(theirs_hours.values()), 0), "", ""]
    totals += [number(sum(runs.values()) if runs else None, 0), number(sum(theirs_runs.values()), 0), "", ""]
    rows.append(["TOTALS", "", *totals])
    header = ["teacher", "data", *_beside("device-hours", "% of hours", "experiments", "% of experiments")]
    note = "The paper counts experiments of 15 minutes or more; ours are all trials that were begun."
    return Table("table4", "Table 4: effort", header, rows, note)


def main_results(settings: Sequence[Setting]) -> Table:
    """Table 5: the three methods, their cost, and what kd and pl gain over sft."""
    rows = []
    for place in _places(settings, paper.TABLE_5):
        theirs = paper.TABLE_5.get(place)
        found = {method: best(_plain(settings, place, method)) for method in METHODS}
        row = [*place, *_teacher_cells(list(found.values()), theirs and theirs.teacher)]
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
    header = ["teacher", "size", "data", *_beside("teacher score")]
    for name in METHODS.values():
        header += [*_beside(f"{name} score", f"{name} cost"), f"{name} seeds"]
    header += ["KD - SFT", "Pseudo - SFT"]
    return Table("table5", "Table 5: main results", header, rows, INTERVAL)


def best_by_size(sweeps: Sequence[Sweep], settings: Sequence[Setting], data: str) -> Table:
    """Tables 6 (XSUM) and 7 (CNN), and the same of other data: the best student of each size, whatever the method."""
    shapes: dict[tuple[str, str], list[Setting]] = {}
    for s in settings:
        if s.place[2] == data:
            shapes.setdefault(s.place[:2], []).append(s)
    theirs = {key[:2]: row for key, row in paper.TABLES_6_7.items() if key[2] == data}
    teachers = {_teacher_place(s): s for s in sweeps if _dataset(s) and paper.data_name(str(_dataset(s))) == data}
    metric = next((s.metric for s in teachers.values()), "rouge2")
    rows = []
    for key in _by_teacher([*theirs, *shapes, *teachers]):
        row, ours = theirs.get(key), best(shapes.get(key, []))
        teacher = teachers.get(key)
        costs = teacher.teacher.get("costs", {}) if teacher else {}
        baseline = ours is None and teacher is not None
        test = (teacher.teacher.get("test") or {}) if teacher and baseline else {}

        def value(name: str, ours: Setting | None = ours, costs: dict[str, float] = costs) -> float | None:
            return ours.measure(name) if ours else costs.get(name)

        rows.append(
            [
                *key,
                "teacher" if baseline else (f"{METHODS[ours.run.method]}, n = {ours.seeds}" if ours else ""),
                number(value("params_m"), 1),
                number(row and row.params, 0),
                number(value("latency_ms"), 0),
                number(row and row.ms, 0),
                number(1.0 if baseline and costs else value("speedup"), 2),
                number(row and row.speedup, 2),
                number(ours.test(metric) if ours else test.get(metric), 2),
                number(row and row.rouge2, 2),
                number(ours.test("rougeL") if ours else test.get("rougeL"), 2),
                number(row and row.rougeL, 2),
            ]
        )
    number_of = {"XSUM": "Table 6", "CNN": "Table 7"}.get(data, "As Tables 6 and 7")
    main = "BLEU" if metric == "bleu" else "ROUGE-2"
    header = ["teacher", "size", "ours by", *_beside("params (M)", "ms for 32", "speed-up", main, "ROUGE-L")]
    name = {"XSUM": "table6", "CNN": "table7"}.get(data, f"table6_{data}")
    note = "The paper's times are on an Nvidia RTX 2080 (BART in mixed precision); ours on the machine of the sweep."
    return Table(name, f"{number_of}: best {data} results of each size across all methods", header, rows, note)


def initialisations(settings: Sequence[Setting]) -> list[Table]:
    """Tables 8 (XSUM) and 9 (the others): the least validation loss by what the decoder starts from."""
    groups = dict.fromkeys(paper.INITIALISATIONS)
    groups |= dict.fromkeys((s.place[0], s.place[2]) for s in settings if _shows_initialisation(s, settings))
    header = [
        "teacher",
        "size",
        "data",
        "name",
        "layers copied",
        "from",
        *_beside("min loss"),
        "seeds",
        "tenth of epoch",
    ]
    note = "The least validation cross-entropy of a run, ours the mean over seeds; and that after a tenth of an epoch."
    found: dict[str, list[list[str]]] = {"table8": [], "table9": []}
    for teacher, data in groups:
        mine = [s for s in settings if (s.place[0], s.place[2]) == (teacher, data) and _is_initialisation(s)]
        theirs = paper.INITIALISATIONS.get((teacher, data), {})
        rows = found["table8" if data == "XSUM" else "table9"]
        used = set()
        for (layers, source), (name, loss) in theirs.items():
            # The paper's students of these tables have three decoder layers.
            ours = next((s for s in mine if (s.layers, s.source) == (layers, source) and _decoder(s) == 3), None)
            used.add(id(ours))
            rows.append(_initialisation_row(teacher, data, name, layers, source, ours, loss))
        for s in mine:
            if id(s) not in used:
                name = "SFT rand" if not s.layers else INITS.get(s.run.student.init, "")
                if s.run.student.copied.decoder is not None or s.run.student.copy_from:
                    name = "SFT"
                rows.append(_initialisation_row(teacher, data, name, s.layers, s.source, s, None))
    return [
        Table("table8", "Table 8: loss for different initialisation strategies on XSUM", header, found["table8"], note),
        Table("table9", "Table 9: loss for different initialisation strategies", header, found["table9"], note),
    ]


def label_strategies(settings: Sequence[Setting]) -> Table:
    """Table 10: students' scores less their teacher's, by what they were trained to write."""
    rows = []
    for place in _places(settings, paper.TABLE_10):
        theirs = paper.TABLE_10.get(place)
        found = {name: best(_with_labels(settings, place, kinds)) for name, kinds in LABELS.items()}
        row = [*place, *_teacher_cells(list(found.values()), theirs and theirs.teacher)]
        figures = theirs[1:] if theirs else (None,) * len(LABELS)
        for ours, figure in zip(found.values(), figures, strict=True):
            row += [_less_teacher(ours), number(figure, 1, sign=True)]
        rows.append(row)
    header = ["teacher", "size", "data", *_beside("teacher score", *LABELS)]
    note = f"Student less teacher. {INTERVAL} PL*: with another teacher's labels added."
    return Table("table10", "Table 10: pseudo-labelling strategies", header, rows, note)


def number(value: float | None, digits: int, sign: bool = False) -> str:
    """A cell: the figure, or nothing."""
    return "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def interval(found: Comparison | None, seeds: int) -> str:
    """A difference with its interval and the number of seeds behind it."""
    return f"{found.difference:+.2f} [{found.low:+.2f}, {found.high:+.2f}], n = {seeds}" if found else ""


def _gain(a: Setting | None, b: Setting | None) -> str:
    if a is None or b is None:
        return ""
    return interval(difference(a.sweep.metric, a.rows(), b.rows()), min(a.seeds, b.seeds))


def _less_teacher(student: Setting | None) -> str:
    """With its interval where the rows of both are there; else the plain difference."""
    if student is None:
        return ""
    metric = student.sweep.metric
    found = difference(metric, student.rows(), student.sweep.teacher_rows())
    if found is not None:
        return interval(found, student.seeds)
    score, theirs = student.test(metric), (student.sweep.teacher.get("test") or {}).get(metric)
    return "" if score is None or theirs is None else f"{score - theirs:+.2f}, n = {student.seeds}"


def _score(setting: Setting | None) -> str:
    return number(setting.test(setting.sweep.metric) if setting else None, 2)


def _teacher_cells(found: list[Setting | None], theirs: float | None) -> list[str]:
    """Our teacher's score on test, and the paper's."""
    one = next((s for s in found if s is not None), None)
    score = (one.sweep.teacher.get("test") or {}).get(one.sweep.metric) if one else None
    return [number(score, 2), number(theirs, 2)]


def _plain(settings: Sequence[Setting], place: paper.Setting, method: str) -> list[Setting]:
    """A method as Table 5 means it: spaced layers, and labels as the method has them."""
    kinds = ("pseudo",) if method == "pl" else ("original",)
    return [s for s in settings if s.place == place and s.run.method == method and s.spaced and s.label_kinds == kinds]


def _with_labels(settings: Sequence[Setting], place: paper.Setting, kinds: tuple[str, ...]) -> list[Setting]:
    mine = (s for s in settings if s.place == place and s.run.method in ("sft", "pl") and s.spaced)
    return [s for s in mine if s.label_kinds == kinds and "*" not in s.run.label_source]


def _places(settings: Sequence[Setting], theirs: Iterable[paper.Setting]) -> list[paper.Setting]:
    """The paper's settings, then ours that it does not have."""
    ours = [s.place for s in settings if s.spaced]
    return list(dict.fromkeys([*theirs, *ours]))


def _is_initialisation(s: Setting) -> bool:
    return s.run.method == "sft" and s.label_kinds == ("original",)


def _shows_initialisation(s: Setting, settings: Sequence[Setting]) -> bool:
    """Whether a sweep tells of initialisation: some student of the same shape starts otherwise."""
    same = [o for o in settings if o.place == s.place and _is_initialisation(o)]
    return any(not o.spaced for o in same)


def _initialisation_row(
    teacher: str, data: str, name: str, layers: tuple[int, ...], source: str, ours: Setting | None, loss: float | None
) -> list[str]:
    size = ours.place[1] if ours else ""
    early = _early_loss(ours) if ours else None
    cells = [name, ",".join(map(str, layers)) or "-", {"teacher": teacher}.get(source, source) or "-"]
    seeds = str(ours.seeds) if ours else ""
    return [
        teacher,
        size,
        data,
        *cells,
        number(ours.least_loss if ours else None, 3),
        number(loss, 2),
        seeds,
        number(early, 3),
    ]


def _early_loss(setting: Setting) -> float | None:
    """The mean validation loss after a tenth of an epoch; None where that was not checked."""
    losses = []
    for trial in setting.trials:
        checks = [c for c in trial.history() if "val_loss" in c and abs(c["epoch"] - 0.1) < 0.02]
        if not checks:
            return None
        losses.append(checks[0]["val_loss"])
    return sum(losses) / len(losses)


def _decoder(setting: Setting) -> int:
    return int(setting.place[1].partition("-")[2] or 0)


def _dataset(sweep: Sweep) -> str | None:
    """The data set's name, from any trial's run."""
    for trial in sweep.trials:
        name = (trial.run_config().get("dataset") or {}).get("name")
        if name:
            return str(name)
    return None


def _has_corpus(sweep: Sweep) -> bool:
    return "corpus" in sweep.teacher


def _teacher_place(sweep: Sweep) -> tuple[str, str]:
    return paper.teacher_name(str(sweep.teacher.get("name"))), str(sweep.teacher.get("size"))


def _data_of_best(sweeps: Sequence[Sweep]) -> list[str]:
    ours = [paper.data_name(name) for s in sweeps if (name := _dataset(s))]
    return list(dict.fromkeys(["XSUM", "CNN", *ours]))


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


def _beside(*names: str) -> list[str]:
    """Our column and the paper's for each name."""
    return [header for name in names for header in (name, f"{name} (paper)")]
