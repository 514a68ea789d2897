"""Tables 8 and 9 of the paper: minimum validation loss by the initialisation of the decoder."""

from collections.abc import Mapping, Sequence

from raydistill.models.layer_choice import layers_to_copy
from raydistill.paper import published
from raydistill.paper.cells import SWEEP_COLUMN, Table, format_cell, paired_headers
from raydistill.paper.published import DecoderInit
from raydistill.paper.seed_groups import SeedGroup, group_by_sweep

INIT_NAMES = {"spaced": "SFT", "first": "SFT lo", "middle": "SFT mid", "last": "SFT hi", "repeated": "SFT 000"}
PAPER_DECODER_LAYERS = 3  # of every student in Tables 8 and 9
EARLY_EPOCH, EARLY_TOLERANCE = 0.1, 0.02
NOTE = (
    "Minimum validation cross-entropy of a run, and the cross-entropy after a tenth of an epoch: the mean over seeds, "
    "with the range in brackets. The difference to spaced layers is computed seed by seed with the spaced student of "
    "the same sweep and size. The table includes every student that was trained to the end, also if it failed because "
    "its outputs collapsed; repetition is the share of a student's validation outputs that are repetitive."
)
TITLES = {
    "table8": "Table 8: loss for different initialisation strategies on XSUM",
    "table9": "Table 9: loss for different initialisation strategies",
}


def initialisation_tables(seed_groups: Sequence[SeedGroup]) -> list[Table]:
    """Tables 8 (XSUM) and 9 (the other data sets), with a row per sweep and initialisation."""
    header = ["teacher", "size", "data", SWEEP_COLUMN, "name", "layers copied", "from", *paired_headers("min loss")]
    header += ["less spaced", "tenth of epoch", "tenth less spaced", "seeds", "repetition"]
    compared = select_init_comparisons(seed_groups)
    rows: dict[str, list[list[str]]] = {"table8": [], "table9": []}
    keys = [*published.INITIALISATIONS, *((group.teacher_name, group.dataset_name) for group in compared)]
    for teacher, data in dict.fromkeys(keys):
        groups = [group for group in compared if (group.teacher_name, group.dataset_name) == (teacher, data)]
        rows["table8" if data == "XSUM" else "table9"] += _table_rows(teacher, data, groups)
    return [Table(name, title, header, rows[name], NOTE) for name, title in TITLES.items()]


def select_init_comparisons(seed_groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """Plain fine-tuning from sweeps that compare several initialisations of one size.

    If several recipes of a sweep use the same initialisation, the one with the lowest loss represents it.
    """
    plain = [group for group in seed_groups if group.run.method == "sft" and group.label_kinds == ("original",)]
    selected: list[SeedGroup] = []
    for key in dict.fromkeys(group.paper_key for group in plain):
        for _, groups in group_by_sweep(group for group in plain if group.paper_key == key):
            by_init: dict[DecoderInit, list[SeedGroup]] = {}
            for group in groups:
                by_init.setdefault(decoder_init(group), []).append(group)
            if len(by_init) > 1:
                selected += [min(recipes, key=_min_loss_or_inf) for recipes in by_init.values()]
    return selected


def decoder_init(group: SeedGroup) -> DecoderInit:
    """The decoder layers that a student copied, and their source."""
    return group.decoder_layers, group.decoder_source


def init_name(group: SeedGroup) -> str:
    """The paper's name for a student's initialisation; "" for a list of layers that the paper does not name."""
    if not group.decoder_layers:
        return "SFT rand"
    if group.decoder_source != "teacher":
        return "SFT"
    depths = group.sweep.teacher_depths
    layers = list(group.decoder_layers)
    return next(
        (name for init, name in INIT_NAMES.items() if layers == layers_to_copy(depths[1], len(layers), init)), ""
    )


def format_mean_and_range(by_seed: Mapping[int, float | None]) -> str:
    """Mean and range over seeds, such as "2.450 (2.400 to 2.500)"; "" if a seed lacks the value."""
    values = [value for value in by_seed.values() if value is not None]
    return _format_values(values, ".3f") if values and len(values) == len(by_seed) else ""


def _table_rows(teacher: str, data: str, seed_groups: list[SeedGroup]) -> list[list[str]]:
    """The paper's rows with the matching measured students, then the students that the paper does not have."""
    published_rows = published.INITIALISATIONS.get((teacher, data), {})
    rows = []
    for init, (name, loss) in published_rows.items():
        matching = [group for group in seed_groups if decoder_init(group) == init and _has_paper_depth(group)]
        rows += [_table_row(group, _spaced_counterpart(group, seed_groups), name, loss) for group in matching]
        if not matching:
            rows.append([teacher, "", data, "", name, *_init_cells(teacher, init), "", format_cell(loss, 2), *[""] * 5])
    for group in seed_groups:
        if decoder_init(group) not in published_rows or not _has_paper_depth(group):
            rows.append(_table_row(group, _spaced_counterpart(group, seed_groups), init_name(group), None))
    return rows


def _table_row(group: SeedGroup, spaced: SeedGroup | None, name: str, paper_loss: float | None) -> list[str]:
    min_losses, early_losses = group.min_val_losses, _early_losses(group)
    teacher, size, data = group.paper_key
    return [
        *(teacher, size, data, group.sweep.name, name, *_init_cells(teacher, decoder_init(group))),
        format_mean_and_range(min_losses),
        format_cell(paper_loss, 2),
        _format_loss_difference(min_losses, spaced.min_val_losses) if spaced else "",
        format_mean_and_range(early_losses),
        _format_loss_difference(early_losses, _early_losses(spaced)) if spaced else "",
        str(len(group.completed)),
        format_cell(group.mean_repetition, 2),
    ]


def _init_cells(teacher: str, init: DecoderInit) -> list[str]:
    layers, source = init
    source_name = teacher if source == "teacher" else published.short_name(source)
    return [",".join(map(str, layers)) or "-", source_name or "-"]


def _spaced_counterpart(group: SeedGroup, seed_groups: list[SeedGroup]) -> SeedGroup | None:
    """The student with spaced layers of the same sweep and size; None if the group itself is spaced."""
    if group.is_spaced:
        return None
    same_size = (other for other in seed_groups if (other.sweep, other.paper_key) == (group.sweep, group.paper_key))
    return next((other for other in same_size if other.is_spaced), None)


def _format_loss_difference(losses: Mapping[int, float | None], spaced_losses: Mapping[int, float | None]) -> str:
    """Mean and range of the differences over the seeds that both have; "" if one of them lacks a loss."""
    pairs = [(losses[seed], spaced_losses[seed]) for seed in losses if seed in spaced_losses]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if not differences or len(differences) < len(pairs):
        return ""
    return f"{_format_values(differences, '+.3f')}, n = {len(differences)}"


def _format_values(values: Sequence[float], number_format: str) -> str:
    value_range = f" ({min(values):{number_format}} to {max(values):{number_format}})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):{number_format}}{value_range}"


def _early_losses(group: SeedGroup) -> dict[int, float | None]:
    """The validation loss after a tenth of an epoch by seed; None if there was no validation at that time."""
    losses: dict[int, float | None] = {}
    for trial in group.completed:
        early = [
            line.val_loss
            for line in trial.history()
            if line.val_loss is not None and abs(line.epoch - EARLY_EPOCH) < EARLY_TOLERANCE
        ]
        losses[trial.seed] = early[0] if early else None
    return losses


def _min_loss_or_inf(group: SeedGroup) -> float:
    return float("inf") if group.min_val_loss is None else group.min_val_loss


def _has_paper_depth(group: SeedGroup) -> bool:
    return group.size.partition("-")[2] == str(PAPER_DECODER_LAYERS)
