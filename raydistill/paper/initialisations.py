"""Tables 8 and 9: the least validation loss by what the decoder started from, a row per sweep and start."""

from collections.abc import Mapping, Sequence

from raydistill.models.layer_choice import layers_to_copy
from raydistill.paper import published
from raydistill.paper.cells import SWEEP, Table, beside, number
from raydistill.paper.settings import Setting, by_sweep

INITS = {"spaced": "SFT", "first": "SFT lo", "middle": "SFT mid", "last": "SFT hi", "repeated": "SFT 000"}
NOTE = (
    "The least validation cross-entropy of a run, and that after a tenth of an epoch: ours the mean over seeds (the "
    "least to the most). Less spaced: seed by seed against the same sweep's spaced student of that size. Every student "
    "that was trained to its end is here, also one that failed because its outputs collapsed; repetition is the share "
    "of a student's validation outputs that repeat themselves."
)
TITLES = {
    "table8": "Table 8: loss for different initialisation strategies on XSUM",
    "table9": "Table 9: loss for different initialisation strategies",
}
# What a student started from: (decoder layers, where they come from), as the paper's tables have it.
Start = tuple[tuple[int, ...], str]


def initialisations(settings: Sequence[Setting]) -> list[Table]:
    """Tables 8 (XSUM) and 9 (the others)."""
    header = ["teacher", "size", "data", SWEEP, "name", "layers copied", "from", *beside("min loss")]
    header += ["less spaced", "tenth of epoch", "tenth less spaced", "seeds", "repetition"]
    ours = compared(settings)
    rows: dict[str, list[list[str]]] = {"table8": [], "table9": []}
    for teacher, data in dict.fromkeys([*published.INITIALISATIONS, *((s.place[0], s.place[2]) for s in ours)]):
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
    """What a student started from, by the paper's names; "" for a list of layers that has none."""
    if not setting.layers:
        return "SFT rand"
    depths = setting.sweep.teacher_depths
    if setting.source != "teacher" or depths is None:
        return "SFT"
    layers = list(setting.layers)
    return next((name for init, name in INITS.items() if layers == layers_to_copy(depths[1], len(layers), init)), "")


def _rows(teacher: str, data: str, ours: list[Setting]) -> list[list[str]]:
    """The paper's rows, ours in them; then what only we have. The paper's students have three decoder layers."""
    theirs = published.INITIALISATIONS.get((teacher, data), {})
    rows = []
    for begun, (name, loss) in theirs.items():
        same = [s for s in ours if start(s) == begun and _decoder(s) == 3]
        rows += [_row(s, _spaced_beside(s, ours), name, loss) for s in same]
        if not same:
            rows.append([teacher, "", data, "", name, *_whence(teacher, begun), "", number(loss, 2), *[""] * 5])
    for s in ours:
        if start(s) not in theirs or _decoder(s) != 3:
            rows.append(_row(s, _spaced_beside(s, ours), name_of(s), None))
    return rows


def _row(ours: Setting, spaced: Setting | None, name: str, loss: float | None) -> list[str]:
    least, early = ours.least_losses, _early_losses(ours)
    teacher, size, data = ours.place
    return [
        *(teacher, size, data, ours.sweep.name, name, *_whence(teacher, start(ours))),
        spread(least),
        number(loss, 2),
        _less(least, spaced.least_losses) if spaced else "",
        spread(early),
        _less(early, _early_losses(spaced)) if spaced else "",
        str(len(ours.ended)),
        number(ours.repetition, 2),
    ]


def _whence(teacher: str, begun: Start) -> list[str]:
    layers, source = begun
    return [",".join(map(str, layers)) or "-", (teacher if source == "teacher" else published.last_part(source)) or "-"]


def _spaced_beside(setting: Setting, ours: list[Setting]) -> Setting | None:
    """The spaced student of the same sweep and size; None of the spaced one itself."""
    same = (s for s in ours if s.sweep == setting.sweep and s.place == setting.place and s is not setting)
    return None if setting.spaced else next((s for s in same if s.spaced), None)


def spread(by_seed: Mapping[int, float | None]) -> str:
    """A figure over seeds: its mean, and from the least to the most; nothing where a seed lacks it."""
    known = [value for value in by_seed.values() if value is not None]
    if not known or len(known) < len(by_seed):
        return ""
    ends = f" ({min(known):.3f} to {max(known):.3f})" if len(known) > 1 else ""
    return f"{sum(known) / len(known):.3f}{ends}"


def _less(ours: Mapping[int, float | None], spaced: Mapping[int, float | None]) -> str:
    """What is lost seed by seed, on the seeds that both have: the mean, and from the least to the most."""
    pairs = [(ours[seed], spaced[seed]) for seed in ours if seed in spaced]
    apart = [a - b for a, b in pairs if a is not None and b is not None]
    if not apart or len(apart) < len(pairs):
        return ""
    ends = f" ({min(apart):+.3f} to {max(apart):+.3f})" if len(apart) > 1 else ""
    return f"{sum(apart) / len(apart):+.3f}{ends}, n = {len(apart)}"


def _early_losses(setting: Setting) -> dict[int, float | None]:
    """By seed the validation loss after a tenth of an epoch; None where that was not checked."""
    found: dict[int, float | None] = {}
    for trial in setting.ended:
        checks = [c["val_loss"] for c in trial.history() if "val_loss" in c and abs(c["epoch"] - 0.1) < 0.02]
        found[trial.seed] = checks[0] if checks else None
    return found


def _loss(setting: Setting) -> float:
    found = setting.least_loss
    return float("inf") if found is None else found


def _decoder(setting: Setting) -> int:
    return int(setting.place[1].partition("-")[2] or 0)
