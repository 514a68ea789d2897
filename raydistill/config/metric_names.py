"""The names of metrics, and which metrics a run reports and is decided by."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from raydistill.core.errors import UserError
from raydistill.core.suggestions import closest_name

ROUGE_METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TRANSLATION_METRICS = ("bleu", "chrf", "chrf++")
BUILT_IN_METRICS = (*ROUGE_METRICS, *TRANSLATION_METRICS, "exact_match")
OWN_METRIC_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"  # module:attribute
BERTSCORE_PATTERN = r"^bertscore:([^:\s]+):([1-9][0-9]{0,2})$"  # model, layer; never of the form module:attribute
METRICS_HELP = f"{', '.join(BUILT_IN_METRICS)}, bertscore:MODEL:LAYER or module:function of your own"  # of options
_HINTS = {
    "bertscore": "BERTScore is named with its model and layer, as bertscore:FacebookAI/roberta-large:17.",
    "comet": "COMET needs an environment of its own and runs as a metric module:function; see docs/metrics.md.",
}
AUTO = "auto"
VALIDATION_LOSS = "val_loss"  # stands for the metric where its library is missing: a score is then -val_loss


def is_own_metric(name: str) -> bool:
    """Whether a name is that of a user's metric, `module:function`."""
    return re.match(OWN_METRIC_PATTERN, name) is not None


def is_bertscore(name: str) -> bool:
    """Whether a name is that of BERTScore with a model, `bertscore:MODEL:LAYER`."""
    return re.match(BERTSCORE_PATTERN, name) is not None


def parse_bertscore(name: str) -> tuple[str, int]:
    """Return the model and the layer of `bertscore:MODEL:LAYER`."""
    match = re.match(BERTSCORE_PATTERN, name)
    assert match, name
    return match[1], int(match[2])


def is_metric_name(name: str) -> bool:
    """Whether a name is that of a built-in metric, of BERTScore with a model, or of a user's metric."""
    return name in BUILT_IN_METRICS or is_bertscore(name) or is_own_metric(name)


def check_metric_name(name: str) -> str:
    """Return the name of a metric if the name is valid. No module is imported and no model is loaded.

    Raises:
        ValueError: The name is neither that of a built-in metric nor of the form `bertscore:MODEL:LAYER` or
            `module:function`.
    """
    if is_metric_name(name):
        return name
    raise ValueError(describe_unknown_metric(name))


def describe_unknown_metric(name: str) -> str:
    """Return the message for a name that is no metric, with the most similar name or all names."""
    similar = closest_name(name.lower(), BUILT_IN_METRICS)
    hint = f"did you mean {similar!r}?" if similar else f"known metrics: {', '.join(BUILT_IN_METRICS)}."
    hint = _HINTS.get(re.split(r"\W", name.lower())[0], hint)
    return f"unknown metric {name!r}; {hint} Your own metric has the form module:function"


def check_metric_or_auto(name: str) -> str:
    """As `check_metric_name`; "auto" is valid too."""
    return name if name == AUTO else check_metric_name(name)


def check_recorded_metric(record: str | Path, name: str) -> str:
    """Return the metric that a record on disk names if the metric may be used without a request of the user.

    Args:
        record: The checkpoint or the label set, for the message.
        name: The metric.

    Raises:
        UserError: The metric is a user's, whose code is run only if the user names the metric.
    """
    if is_own_metric(name):
        raise UserError(
            f"{record}: its metric is {name}. Code that a checkpoint or a label set names is not run: give --metric "
            f"{name} to run it, or another metric"
        )
    return name


_PATTERN_SCHEMAS = [{"type": "string", "pattern": pattern} for pattern in (OWN_METRIC_PATTERN, BERTSCORE_PATTERN)]
MetricName = Annotated[
    str,
    AfterValidator(check_metric_name),
    WithJsonSchema({"anyOf": [{"type": "string", "enum": [*BUILT_IN_METRICS]}, *_PATTERN_SCHEMAS]}),
]
MetricOrAuto = Annotated[
    str,
    AfterValidator(check_metric_or_auto),
    WithJsonSchema({"anyOf": [{"type": "string", "enum": [AUTO, *BUILT_IN_METRICS]}, *_PATTERN_SCHEMAS]}),
]


@dataclass(frozen=True)
class MetricChoice:
    """The metrics of a data set.

    Attributes:
        deciding: The metric that checkpoints and students are compared by.
        reported: Further metrics, which decide nothing.
        reason: Why `auto` means the deciding metric; empty if the metric was requested.
    """

    deciding: str
    reported: tuple[str, ...] = ()
    reason: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All metrics, the deciding metric first."""
        return (self.deciding, *self.reported)

    def describe(self) -> str:
        """The choice as a line of the log, such as "metric: chrf++ (auto: ...); reported: bleu"."""
        reason = f" (auto: {self.reason})" if self.reason else ""
        others = f"; reported: {', '.join(self.reported)}" if self.reported else ""
        return f"metric: {self.deciding}{reason}{others}"
