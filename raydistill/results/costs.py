"""What each method's gain cost: device-hours of its trials and of the teacher's passes that it needs."""

from raydistill.results.records import Outcome, Trial

PASS_OF = {"pl": "labels", "kd": "cache"}  # which teacher pass a method cannot do without


def best_by_size(trials: list[Trial], method: str, metric: str) -> dict[str, float]:
    """The best validation score of a method at each size."""
    best: dict[str, float] = {}
    for trial in trials:
        score = trial.score(metric)
        if trial.scored and trial.method == method and score is not None:
            best[trial.size] = max(best.get(trial.size, score), score)
    return best


def gain(trials: list[Trial], method: str, metric: str) -> float | None:
    """Points that a method's best is above plain fine-tuning's best, the mean over the sizes that both have."""
    ours, plain = best_by_size(trials, method, metric), best_by_size(trials, "sft", metric)
    sizes = ours.keys() & plain.keys()
    return sum(ours[size] - plain[size] for size in sizes) / len(sizes) if sizes and method != "sft" else None


def method_table(found: Outcome) -> tuple[list[str], list[list[str]]]:
    """A header and a row per method: what it took, what it brought over `sft`, and that per device-hour.

    A teacher pass is charged once for all trials that share it, to the method that needs it.
    """
    header = ["method", "trials", "device h, trials", "device h, teacher", f"{found.metric} over sft", "per device h"]
    passes = found.info.get("teacher_passes") or {}
    rows = []
    for method in sorted({trial.method for trial in found.trials if trial.method}):
        mine = [trial for trial in found.trials if trial.method == method]
        hours = sum(trial.device_hours for trial in mine)
        teacher = float(passes.get(PASS_OF.get(method, ""), 0.0))
        points = gain(found.trials, method, found.metric)
        spent = hours + teacher
        rows.append(
            [
                method,
                str(len(mine)),
                f"{hours:.3f}",
                f"{teacher:.3f}",
                "-" if points is None else f"{points:+.2f}",
                "-" if points is None or spent == 0 else f"{points / spent:+.2f}",
            ]
        )
    return header, rows
