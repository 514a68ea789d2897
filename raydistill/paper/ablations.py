"""Section 6.3 of the paper: variations of the distillation loss, each compared with plain KD of the same recipe."""

from collections.abc import Iterable, Sequence

from raydistill.config.run import Loss
from raydistill.paper.cells import SWEEP_COLUMN, Table, format_cell, format_difference
from raydistill.paper.seed_groups import SeedGroup, compare_groups, group_by_sweep

LOSS_NAMES = {
    "alpha_hidden": "hidden",
    "alpha_logits": "logits",
    "alpha_data": "data",
    "alpha_attention": "attention maps",
    "alpha_cosine": "cosine",
    "temperature": "temperature",
    "label_smoothing": "label smoothing",
}
NOTE = (
    "Each variation is compared on test with plain KD (the default losses) of the same sweep and otherwise equal "
    "settings: means over the n seeds that both have, with the 95 % interval of a paired bootstrap over rows. The "
    "paper gives no values."
)


def ablation_table(seed_groups: Sequence[SeedGroup]) -> Table:
    """The test score of each variation of the loss, and its difference to plain KD."""
    rows = []
    for sweep, groups in group_by_sweep(group for group in seed_groups if group.run.method == "kd"):
        for variations in _group_except_loss(groups):
            if len(variations) == 1:
                continue
            plain = next((group for group in variations if group.run.loss == Loss()), None)
            for group in sorted(variations, key=lambda group: group is not plain):
                comparison = compare_groups(group, plain) if plain and group is not plain else None
                score = format_cell(group.mean_test_score(sweep.metric), 2)
                difference = format_difference(*comparison) if comparison else ""
                cells = [describe_loss(group.run.loss), score, difference, str(group.num_seeds)]
                rows.append([*group.paper_key, sweep.name, *cells])
    header = ["teacher", "size", "data", SWEEP_COLUMN, "variation", "score", "less plain KD", "seeds"]
    return Table("section63", "Section 6.3: variations of direct distillation", header, rows, NOTE)


def describe_loss(loss: Loss) -> str:
    """The difference to the default losses: "plain KD", "no hidden loss", "attention maps 1, temperature 1"."""
    parts = []
    for name, default in Loss():
        value = getattr(loss, name)
        if value == default:
            continue
        if name == "normalize_hidden":
            parts.append("normalised hidden")
        else:
            parts.append(f"no {LOSS_NAMES[name]} loss" if value == 0 else f"{LOSS_NAMES[name]} {value:g}")
    return ", ".join(parts) or "plain KD"


def select_table_5_losses(seed_groups: Iterable[SeedGroup]) -> list[SeedGroup]:
    """The groups with the loss terms of Table 5, whatever their weights; variations of section 6.3 are excluded.

    Normalised hidden states are a variation in a sweep that also has unnormalised ones. In other sweeps, such as for
    Pegasus and Marian, they are part of the recipe.
    """
    groups = [group for group in seed_groups if group.run.method != "kd" or _has_paper_loss_terms(group.run.loss)]
    unnormalised_sweeps = {
        group.sweep.folder for group in groups if group.run.method == "kd" and not group.run.loss.normalize_hidden
    }
    return [
        group
        for group in groups
        if group.run.method != "kd"
        or not group.run.loss.normalize_hidden
        or group.sweep.folder not in unnormalised_sweeps
    ]


def _has_paper_loss_terms(loss: Loss) -> bool:
    """Whether the loss has terms for data, logits and hidden states and no others, at the default temperature."""
    has_terms = loss.alpha_data > 0 and loss.alpha_logits > 0 and loss.alpha_hidden > 0
    return has_terms and not loss.alpha_attention and not loss.alpha_cosine and loss.temperature == Loss().temperature


def _group_except_loss(seed_groups: Sequence[SeedGroup]) -> list[list[SeedGroup]]:
    """Groups whose runs differ only in their losses and seeds."""
    by_settings: dict[str, list[SeedGroup]] = {}
    for group in seed_groups:
        settings = group.run.model_dump_json(exclude={"name": True, "loss": True, "training": {"seed"}})
        by_settings.setdefault(settings, []).append(group)
    return list(by_settings.values())
