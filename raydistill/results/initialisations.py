"""Tables 8 and 9: the least validation loss by what the decoder started from, a row per sweep and start."""

from collections.abc import Sequence

from raydistill.results import paper
from raydistill.results.cells import SWEEP, Table, beside, number
from raydistill.results.settings import Setting, by_sweep

INITS = {"spaced": "SFT", "first": "SFT lo", "middle": "SFT mid", "last": "SFT hi", "repeated": "SFT 000"}
NOTE = "The least validation cross-entropy of a run, ours the mean over seeds; and that after a tenth of an epoch."
TITLES = {
    "table8": "Table 8: loss for different initialisation strategies on XSUM",
    "table9": "Table 9: loss for different initialisation strategies",
}
# What a student started from: (decoder layers, where they come from), as the paper's tables have it.
Start = tuple[tuple[int, ...], str]


def initialisations(settings: Sequence[Setting]) -> list[Table]:
    """Tables 8 (XSUM) and 9 (the others)."""
    header = ["teacher", "size", "data", SWEEP, "name", "layers copied", "from", *beside("min loss"), "seeds"]
    header += ["tenth of epoch"]
    ours = compared(settings)
    rows: dict[str, list[list[str]]] = {"table8": [], "table9": []}
    for teacher, data in dict.fromkeys([*paper.INITIALISATIONS, *((s.place[0], s.place[2]) for s in ours)]):
        mine = [s for s in ours if (s.place[0], s.place[2]) == (teacher, data)]
        rows["table8" if data == "XSUM" else "table9"] += _rows(teacher, data, mine)
    return [Table(name, title, header, rows[name], NOTE) for name, title in TITLES.items()]


def compared(settings: Sequence[Setting]) -> list[Setting]:
    """Those of sweeps that compare starts: plain fine-tuning of one size from more than the spaced layers.

    Of several recipes that begin alike, the one with the least loss: a sweep has one row for each start.
    """
    plain = [s for s in settings if s.run.method == "sft" and s.label_kinds == ("original",)]
    found: list[Setting] = []
    for place in dict.fromkeys(s.place for s in plain):
        for _, mine in by_sweep(s for s in plain if s.place == place):
            starts: dict[Start, list[Setting]] = {}
            for s in mine:
                starts.setdefault(start(s), []).append(s)
            if len(starts) > 1:
                found += [min(same, key=_loss) for same in starts.values()]
    return found


def start(setting: Setting) -> Start:
    """What a student started from."""
    return setting.layers, setting.source


def name_of(setting: Setting) -> str:
    """What a student started from, by the paper's names where it has them."""
    if not setting.layers:
        return "SFT rand"
    student = setting.run.student
    return "SFT" if student.copied.decoder is not None or student.copy_from else INITS.get(student.init, "")


def _rows(teacher: str, data: str, ours: list[Setting]) -> list[list[str]]:
    """The paper's rows, ours in them; then what only we have. The paper's students have three decoder layers."""
    theirs = paper.INITIALISATIONS.get((teacher, data), {})
    rows = []
    for begun, (name, loss) in theirs.items():
        same = [s for s in ours if start(s) == begun and _decoder(s) == 3]
        rows += [_row(teacher, data, name, begun, s, loss) for s in same or [None]]
    for s in ours:
        if start(s) not in theirs or _decoder(s) != 3:
            rows.append(_row(teacher, data, name_of(s), start(s), s, None))
    return rows


def _row(teacher: str, data: str, name: str, begun: Start, ours: Setting | None, loss: float | None) -> list[str]:
    layers, source = begun
    place = [teacher, ours.place[1] if ours else "", data, ours.sweep.name if ours else ""]
    whence = teacher if source == "teacher" else source
    cells = [name, ",".join(map(str, layers)) or "-", whence or "-"]
    figures = [number(ours.least_loss if ours else None, 3), number(loss, 2), str(ours.seeds) if ours else ""]
    return [*place, *cells, *figures, number(_early_loss(ours) if ours else None, 3)]


def _early_loss(setting: Setting) -> float | None:
    """The mean validation loss after a tenth of an epoch; None where that was not checked."""
    losses = []
    for trial in setting.trials:
        checks = [c for c in trial.history() if "val_loss" in c and abs(c["epoch"] - 0.1) < 0.02]
        if not checks:
            return None
        losses.append(checks[0]["val_loss"])
    return sum(losses) / len(losses)


def _loss(setting: Setting) -> float:
    found = setting.least_loss
    return float("inf") if found is None else found


def _decoder(setting: Setting) -> int:
    return int(setting.place[1].partition("-")[2] or 0)
