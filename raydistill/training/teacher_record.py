"""The record of the teacher's scores, SWEEP/teacher.json."""

from raydistill.config.metric_names import MetricChoice
from raydistill.core.records import Record
from raydistill.training.records import SplitScores


class TeacherScores(Record):
    """The teacher's scores on the data of a run.

    Attributes:
        name: The run's `teacher`.
        key: Content key of the checkpoint.
        commit: Commit of the checkpoint on the Hugging Face hub, where it comes from the hub.
        size: Encoder and decoder layers, such as "12-12".
        metric: The main metric.
        metric_reason: Why `evaluation.metric: auto` means this metric; empty if the metric was requested.
        metrics: Scores on the validation split, without the rows that are kept for the choice.
        interval: 95 % confidence interval of the main metric on the validation split.
        repetition: Share of the validation outputs that repeat themselves.
        test: Scores on the test split, if there is one.
        source_tokens: Mean tokens of a source of the train split.
        output_tokens: Mean tokens of a target of the train split.
        decoding: The decoding of the scores, with the fields of `BeamSearchParams`.
        signature: How the scores were computed, in the notation of the metric's library.
        engine: The engine that scored the teacher.
        precision: That engine's precision.
        machine: The hardware, as `evaluation.latency.hardware` describes it, with the number of threads with which the
            teacher decodes fastest.
        data: Fingerprint of each split.
        rows: Rows of each split.
        corpus: Statistics of the train split.
        lead1: Test scores of the first sentence as the summary; None for translation and without a test split.
    """

    name: str
    key: str
    commit: str | None = None
    size: str
    metric: str
    metric_reason: str = ""
    metrics: dict[str, float]
    interval: tuple[float, float]
    repetition: float
    test: SplitScores | None = None
    source_tokens: int
    output_tokens: int
    decoding: dict[str, bool | int | float | None]
    signature: str
    engine: str
    precision: str
    machine: dict[str, str | int]
    data: dict[str, str]
    rows: dict[str, int]
    corpus: dict[str, float]
    lead1: dict[str, float] | None = None

    @property
    def metric_choice(self) -> MetricChoice:
        """The metrics of the scores: the main metric decides, and all others are reported."""
        return MetricChoice(
            self.metric, tuple(name for name in self.metrics if name != self.metric), self.metric_reason
        )

    @property
    def threads(self) -> int:
        """The number of CPU threads with which the teacher and all students are scored and timed."""
        return int(self.machine["threads"])

    @property
    def beams(self) -> int:
        """The number of beams of the scores."""
        beams = self.decoding["beams"]
        assert isinstance(beams, int)
        return beams
