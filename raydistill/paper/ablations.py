"""Section 6.3: variations of direct distillation, each against plain KD of the same recipe."""

from collections.abc import Iterable, Sequence

from raydistill.config.run import Loss
from raydistill.paper.cells import SWEEP, Table, interval, number
from raydistill.paper.settings import Setting, by_sweep, difference

NAMES = {
    "alpha_hidden": "hidden",
    "alpha_logits": "logits",
    "alpha_data": "data",
    "alpha_attention": "attention maps",
    "alpha_cosine": "cosine",
    "temperature": "temperature",
    "label_smoothing": "label smoothing",
}
NOTE = (
    "Each variation against plain KD (the default losses) of the same sweep, all else alike, on test: the means over "
    "the n seeds that both have, with the 95 % interval of a paired bootstrap over rows. The paper gives no figures."
)


def ablations(settings: Sequence[Setting]) -> Table:
    """Score of each variation, and less plain KD."""
    rows = []
    for sweep, mine in by_sweep(s for s in settings if s.run.method == "kd"):
        for same in _alike_but_for_loss(mine):
            plain = next((s for s in same if s.run.loss == Loss()), None)
            for s in sorted(same, key=lambda s: s is not plain) if len(same) > 1 else []:
                found = difference(s, plain) if plain and s is not plain else None
                score = number(s.test(sweep.metric), 2)
                less = interval(*found) if found else ""
                rows.append([*s.place, sweep.name, variation(s.run.loss), score, less, str(s.seeds)])
    header = ["teacher", "size", "data", SWEEP, "variation", "score", "less plain KD", "seeds"]
    return Table("section63", "Section 6.3: variations of direct distillation", header, rows, NOTE)


def variation(loss: Loss) -> str:
    """In what the losses are not the default ones: "plain KD", "no hidden loss", "attention maps 1, temperature 1"."""
    found = []
    for name, usual in Loss():
        value = getattr(loss, name)
        if value == usual:
            continue
        if name == "normalize_hidden":
            found.append("normalised hidden")
        else:
            found.append(f"no {NAMES[name]} loss" if value == 0 else f"{NAMES[name]} {value:g}")
    return ", ".join(found) or "plain KD"


def as_in_table_5(settings: Iterable[Setting]) -> list[Setting]:
    """Those with the losses that Table 5 is about, whatever their weights: variations of section 6.3 are none.

    Normalised hidden states are a variation where a sweep has them beside plain ones, and else its recipe, as with
    Pegasus and Marian.
    """
    found = [s for s in settings if s.run.method != "kd" or _paper_terms(s.run.loss)]
    bare = {s.sweep.folder for s in found if s.run.method == "kd" and not s.run.loss.normalize_hidden}
    return [s for s in found if s.run.method != "kd" or not s.run.loss.normalize_hidden or s.sweep.folder not in bare]


def _paper_terms(loss: Loss) -> bool:
    """Data, logits and hidden states, each with some weight, and no other, at the usual temperature."""
    terms = loss.alpha_data > 0 and loss.alpha_logits > 0 and loss.alpha_hidden > 0
    return terms and not loss.alpha_attention and not loss.alpha_cosine and loss.temperature == Loss().temperature


def _alike_but_for_loss(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Those that are one run but for their losses and seeds."""
    groups: dict[str, list[Setting]] = {}
    for s in settings:
        plain = s.run.model_dump_json(exclude={"name": True, "loss": True, "training": {"seed"}})
        groups.setdefault(plain, []).append(s)
    return list(groups.values())
