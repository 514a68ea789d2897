"""Tables 8 and 9: the least validation loss by what the decoder started from, a row per sweep and start."""

from collections.abc import Mapping, Sequence

from raydistill.models.layer_choice import layers_to_copy
from raydistill.paper import published
from raydistill.paper.cells import SWEEP_COLUMN, Table, format_number, paired_headers
from raydistill.paper.seed_groups import SeedGroup, group_by_sweep

INIT_NAMES = {"spaced": "SFT", "first": "SFT lo", "middle": "SFT mid", "last": "SFT hi", "repeated": "SFT 000"}
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
DecoderInit = tuple[tuple[int, ...], str]


def initialisation_tables(seed_groups: Sequence[SeedGroup]) -> list[Table]:
    """Tables 8 (XSUM) and 9 (the others)."""
    header = ["teacher", "size", "data", SWEEP_COLUMN, "name", "layers copied", "from", *paired_headers("min loss")]
    header += ["less spaced", "tenth of epoch", "tenth less spaced", "seeds", "repetition"]
    ours = select_init_comparisons(seed_groups)
    rows: dict[str, list[list[str]]] = {"table8": [], "table9": []}
    for teacher, data in dict.fromkeys([*published.INITIALISATIONS, *((s.paper_key[0], s.paper_key[2]) for s in ours)]):
        mine = [s for s in ours if (s.paper_key[0], s.paper_key[2]) == (teacher, data)]
        rows["table8" if data == "XSUM" else "table9"] += _table_rows(teacher, data, mine)
    return [Table(name, title, header, rows[name], NOTE) for name, title in TITLES.items()]


def select_init_comparisons(seed_groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """Those of sweeps that compare starts: plain fine-tuning of one size from more than the spaced layers.

    Of several recipes that begin alike, the one with the least loss: a sweep has one row for each start.
    """
    plain = [s for s in seed_groups if s.run.method == "sft" and s.label_kinds == ("original",)]
    found: list[SeedGroup] = []
    for place in dict.fromkeys(s.paper_key for s in plain):
        for _, mine in group_by_sweep(s for s in plain if s.paper_key == place):
            starts: dict[DecoderInit, list[SeedGroup]] = {}
            for s in mine:
                starts.setdefault(decoder_init(s), []).append(s)
            if len(starts) > 1:
                found += [min(same, key=_min_loss_or_inf) for same in starts.values()]
    return found


def decoder_init(group: SeedGroup) -> DecoderInit:
    """What a student started from."""
    return group.layers, group.source


def init_name(group: SeedGroup) -> str:
    """What a student started from, by the paper's names; "" for a list of layers that has none."""
    if not group.layers:
        return "SFT rand"
    depths = group.sweep.teacher_depths
    if group.source != "teacher" or depths is None:
        return "SFT"
    layers = list(group.layers)
    return next(
        (name for init, name in INIT_NAMES.items() if layers == layers_to_copy(depths[1], len(layers), init)), ""
    )


def _table_rows(teacher: str, data: str, seed_groups: list[SeedGroup]) -> list[list[str]]:
    """The paper's rows, ours in them; then what only we have. The paper's students have three decoder layers."""
    theirs = published.INITIALISATIONS.get((teacher, data), {})
    rows = []
    for begun, (name, loss) in theirs.items():
        same = [s for s in seed_groups if decoder_init(s) == begun and _decoder_depth(s) == 3]
        rows += [_table_row(s, _spaced_counterpart(s, seed_groups), name, loss) for s in same]
        if not same:
            rows.append(
                [teacher, "", data, "", name, *_init_cells(teacher, begun), "", format_number(loss, 2), *[""] * 5]
            )
    for s in seed_groups:
        if decoder_init(s) not in theirs or _decoder_depth(s) != 3:
            rows.append(_table_row(s, _spaced_counterpart(s, seed_groups), init_name(s), None))
    return rows


def _table_row(group: SeedGroup, spaced: SeedGroup | None, name: str, paper_loss: float | None) -> list[str]:
    least, early = group.min_val_losses, _early_losses(group)
    teacher, size, data = group.paper_key
    return [
        *(teacher, size, data, group.sweep.name, name, *_init_cells(teacher, decoder_init(group))),
        format_mean_and_range(least),
        format_number(paper_loss, 2),
        _format_loss_difference(least, spaced.min_val_losses) if spaced else "",
        format_mean_and_range(early),
        _format_loss_difference(early, _early_losses(spaced)) if spaced else "",
        str(len(group.ended)),
        format_number(group.repetition, 2),
    ]


def _init_cells(teacher: str, init: DecoderInit) -> list[str]:
    layers, source = init
    return [
        ",".join(map(str, layers)) or "-",
        (teacher if source == "teacher" else published.short_name(source)) or "-",
    ]


def _spaced_counterpart(group: SeedGroup, seed_groups: list[SeedGroup]) -> SeedGroup | None:
    """The spaced student of the same sweep and size; None of the spaced one itself."""
    same = (s for s in seed_groups if s.sweep == group.sweep and s.paper_key == group.paper_key and s is not group)
    return None if group.is_spaced else next((s for s in same if s.is_spaced), None)


def format_mean_and_range(by_seed: Mapping[int, float | None]) -> str:
    """A figure over seeds: its mean, and from the least to the most; nothing where a seed lacks it."""
    known = [value for value in by_seed.values() if value is not None]
    if not known or len(known) < len(by_seed):
        return ""
    ends = f" ({min(known):.3f} to {max(known):.3f})" if len(known) > 1 else ""
    return f"{sum(known) / len(known):.3f}{ends}"


def _format_loss_difference(losses: Mapping[int, float | None], spaced_losses: Mapping[int, float | None]) -> str:
    """What is lost seed by seed, on the seeds that both have: the mean, and from the least to the most."""
    pairs = [(losses[seed], spaced_losses[seed]) for seed in losses if seed in spaced_losses]
    apart = [a - b for a, b in pairs if a is not None and b is not None]
    if not apart or len(apart) < len(pairs):
        return ""
    ends = f" ({min(apart):+.3f} to {max(apart):+.3f})" if len(apart) > 1 else ""
    return f"{sum(apart) / len(apart):+.3f}{ends}, n = {len(apart)}"


def _early_losses(group: SeedGroup) -> dict[int, float | None]:
    """By seed the validation loss after a tenth of an epoch; None where that was not checked."""
    found: dict[int, float | None] = {}
    for trial in group.ended:
        checks = [c["val_loss"] for c in trial.history() if "val_loss" in c and abs(c["epoch"] - 0.1) < 0.02]
        found[trial.seed] = checks[0] if checks else None
    return found


def _min_loss_or_inf(group: SeedGroup) -> float:
    found = group.min_val_loss
    return float("inf") if found is None else found


def _decoder_depth(group: SeedGroup) -> int:
    return int(group.paper_key[1].partition("-")[2] or 0)
