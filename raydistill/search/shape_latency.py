"""Costs of each shape of a space, measured on untrained students before any training, in pairs with the teacher.

Latency and memory of a model do not depend on the values of its weights. The teacher and the shapes are timed in one
process, and a shape is compared with the teacher only by the ratio of neighbouring calls.

Of a space with many shapes, some are timed. A fit predicts the others (results/shape_costs.py). A shape is timed too if
its prediction is near the bound of a budget.
"""

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from raydistill.config.run import Run, Student
from raydistill.config.serving import EngineVariant, ServingConfig
from raydistill.config.shapes import Shape, VocabularySize
from raydistill.core.console import ProgressBar, print_progress
from raydistill.evaluation.latency import LATENCY_BATCH_SIZES, measure_peak_mb, used_memory_mb
from raydistill.evaluation.paired_latency import EXCLUSION_MARGIN, PairedTiming, StoppingRule, time_pairs, valid_pairs
from raydistill.inference.decoding import Engine, EngineOptions, Workload, engine_label
from raydistill.inference.engines import open_engine, supported_precisions
from raydistill.inference.shortlist import MAP_FILE, Shortlist, kept_tokens, write_map
from raydistill.models import families
from raydistill.models.loading import load_config
from raydistill.models.pruning import random_units
from raydistill.models.saving import save_checkpoint
from raydistill.models.shrinking import plan_student, shrink, student_config
from raydistill.models.teacher import Teacher, open_teacher
from raydistill.models.tokenization import load_tokenizer, tokens_by_id
from raydistill.models.vocabulary import select_tokens, with_vocab_size
from raydistill.results.pareto import fits_any_budget, resolve_budgets
from raydistill.results.shape_costs import prediction_errors, select_spread_shapes, shape_costs
from raydistill.results.sweep_record import CheapestServing, PredictedRatio, ShapeTable
from raydistill.search.serving_timing import CostBounds, extend_for_slow_calls, time_ms, time_rounds
from raydistill.search.shortlists import NUM_MOST_USED
from raydistill.training.tokenized_data import select_student_tokens

# The latency that trials are compared by, and a latency that a budget may exclude a shape by.
SEARCH_RULE = StoppingRule(min_pairs=10, precision=0.05, max_seconds=2.0)
EXCLUSION_RULE = StoppingRule(max_seconds=6.0)

COSTS = tuple(LATENCY_BATCH_SIZES)
WEIGHT_COSTS = frozenset({"params_m", "memory_mb"})  # known without a measurement
MAX_ADDED_TOKENS = 0.02  # share of the used tokens that label sets may add before shapes are timed again

# Shapes that are timed at least before the others are predicted: about two for each coefficient of the fit.
MAX_TIMED_SHAPES = 14
# The margin of a prediction is this number of its root mean square errors, and at least this share.
MARGIN_ERRORS = 3.0
MIN_MARGIN = 0.1


@dataclass(frozen=True)
class ShapeTask:
    """What `time_shapes` measures.

    Attributes:
        run: Names teacher, data set and engine; its training data decides which tokens are used.
        sizes: Names of the students' shapes, such as "12-3".
        label_folders: Folders of the label sets of the run by label source, in which tokens are used.
        source_tokens: Tokens read per row.
        output_tokens: Tokens written per row.
        precision: Full precision, as the teacher's scores were computed.
        beams: The teacher's own number of beams.
        threads: CPU threads of every model.
        fewest_beams: The fewest beams that a student may be served with.
        variants: The engine variants that a student may be served with.
        bounds: By cost, the bounds of all budgets.
        weight_budgets: By name, the budgets that bound nothing but parameters and memory of the weights. No latency
            excludes a shape that fits in one of them.
    """

    run: Run
    sizes: Sequence[str]
    label_folders: Mapping[str, Path]
    source_tokens: int
    output_tokens: int
    precision: str
    beams: int
    threads: int
    fewest_beams: int
    variants: Sequence[EngineVariant]
    bounds: Mapping[str, CostBounds]
    weight_budgets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def workload(self, cost: str, beams: int) -> Workload:
        """The rows of a latency."""
        return Workload(self.source_tokens, self.output_tokens, LATENCY_BATCH_SIZES[cost], beams)


def time_shapes(task: ShapeTask, device: str, threads: int) -> ShapeTable:
    """Costs of the teacher and of each size. Call with `run_exclusive`, since load disturbs timings."""
    assert task.run.teacher is not None
    teacher = open_teacher(task.run.teacher, task.run.dataset)
    with tempfile.TemporaryDirectory(prefix="raydistill-shape-", ignore_cleanup_errors=True) as scratch:
        timer = _ShapeTimer(task, teacher, Path(scratch), device, threads)
        timer.time_all()
        return timer.table()


def time_larger_shapes(task: ShapeTask, used_tokens: int, device: str, threads: int) -> ShapeTable | None:
    """Costs of shapes of "used" tokens, if these tokens are considerably more than `used_tokens`; None otherwise.

    Call with `run_exclusive`.
    """
    assert task.run.teacher is not None
    teacher = open_teacher(task.run.teacher, task.run.dataset)
    token_ids = _select_used_tokens(task, teacher.tokenizer, load_config(teacher.location))
    return None if len(token_ids) <= (1 + MAX_ADDED_TOKENS) * used_tokens else time_shapes(task, device, threads)


class _ShapeTimer:
    """The teacher's open engine, with which the students of all sizes are compared, one after the other."""

    def __init__(self, task: ShapeTask, teacher: Teacher, scratch: Path, device: str, threads: int) -> None:
        self.task, self.teacher, self.scratch, self.device, self.threads = task, teacher, scratch, device, threads
        self.teacher_size = families.size_name(teacher.model.config)
        self.full = EngineVariant.of(task.precision)
        memory_before_mb = used_memory_mb(device)
        self.baseline = self._open(teacher.location, self.full)
        self.engine = engine_label(self.baseline)
        self.calls = {cost: self.baseline.make_benchmark_call(task.workload(cost, task.beams)) for cost in COSTS}
        self.teacher_peak = self._peak_costs(self.calls["latency_ms"], memory_before_mb)
        self.teacher_ms = {cost: time_ms(call) for cost, call in self.calls.items()}
        self.baseline_calls_ms: dict[str, list[float]] = {cost: [] for cost in COSTS}
        self.ratios: dict[str, dict[str, float]] = {}
        self.other_costs: dict[str, dict[str, float]] = {}
        self.engines = {self.teacher_size: self.engine}
        self.cheapest: dict[str, CheapestServing] = {}
        self.used_tokens: int | None = None
        self.tokens: dict[VocabularySize, tuple[int, ...]] = {}

    def time_all(self) -> None:
        """Time all shapes; if there are many, some shapes and all shapes whose prediction is near a bound."""
        sizes = list(self.task.sizes)
        first = sizes
        if len(sizes) > MAX_TIMED_SHAPES:
            first = select_spread_shapes([size for size in sizes if size != self.teacher_size], MAX_TIMED_SHAPES)
            first += [self.teacher_size] if self.teacher_size in sizes else []
        with closing(ProgressBar("latency", len(first), delayed=True)) as progress:
            for number, size in enumerate(first, start=1):
                self.time_size(size)
                progress.advance(1, f"{number}/{len(first)} shapes, {size}")
        for size in sizes:
            if size not in first and self._is_near_a_bound(size):
                print_progress(f"  latency: {size} is near a bound and is timed too")
                self.time_size(size)

    def time_size(self, size: str) -> None:
        """Time a size with the teacher's own decoding, and with its cheapest serving if a budget bounds a latency."""
        if size == self.teacher_size:
            self.cheapest[size] = self._time_cheapest(self.teacher.location)
            return
        teacher = self._teacher_with_tokens(size)
        config = teacher.model.config
        plan = plan_student(config, Student.of_shape(Shape.parse(size)))
        checkpoint = self.scratch / size
        student = shrink(teacher.model, plan, units=random_units(config, plan, seed=0))
        save_checkpoint(student, teacher.tokenizer, checkpoint)
        memory_before_mb = used_memory_mb(self.device)
        engine = self._open(checkpoint, self.full)
        self.engines[size] = engine_label(engine)
        calls = {cost: engine.make_benchmark_call(self.task.workload(cost, self.task.beams)) for cost in COSTS}
        self.other_costs[size] = {
            **_weights(checkpoint, self.task.precision),
            **self._peak_costs(calls["latency_ms"], memory_before_mb),
        }
        timings = {cost: self._compare(cost, call, (), SEARCH_RULE) for cost, call in calls.items()}
        self.ratios[size] = {cost: timing.best_ratio for cost, timing in timings.items()}
        self.cheapest[size] = self._time_cheapest(checkpoint)

    def _time_cheapest(self, checkpoint: str | Path) -> CheapestServing:
        """The cheapest serving of a shape: the fewest beams, the fastest variant."""
        variants = self._supported_variants()
        memory_before_mb = used_memory_mb(self.device)
        engines = {variant: self._open(checkpoint, variant) for variant in variants}
        workload = self.task.workload("latency_ms", self.task.fewest_beams)
        times = time_rounds({v: engine.make_benchmark_call(workload) for v, engine in engines.items()})
        fastest = min(times, key=lambda variant: times[variant])
        engine = engines.pop(fastest)
        engines.clear()
        smallest = self._smallest_weights(load_config(checkpoint))
        timings: dict[str, PairedTiming] = {}
        for cost in COSTS if engine.name == self.baseline.name and self._may_be_excluded(smallest) else ():
            if ratios := self.task.bounds.get(cost, CostBounds()).ratios(self.teacher_ms[cost]):
                call = engine.make_benchmark_call(self.task.workload(cost, self.task.fewest_beams))
                bounds = [EXCLUSION_MARGIN * ratio for ratio in ratios]
                timings[cost] = self._compare(cost, call, bounds, EXCLUSION_RULE)
        peak = self._peak_costs(engine.make_benchmark_call(workload), memory_before_mb)
        config = ServingConfig(beams=self.task.fewest_beams, length_penalty=1.0).with_variant(fastest)
        return CheapestServing(
            config=config,
            engine=engine_label(engine),
            timings=timings,
            costs={**smallest, **peak},
        )

    def _may_be_excluded(self, smallest: dict[str, float]) -> bool:
        """Whether a shape of these parameters and memory fits in no budget that bounds nothing else."""
        budgets = {name: dict(bounds) for name, bounds in self.task.weight_budgets.items()}
        resolved = resolve_budgets(budgets, _weights(self.teacher.location, self.task.precision))
        return not resolved or not fits_any_budget(smallest, resolved)

    def _supported_variants(self) -> list[EngineVariant]:
        """The variants of the task that the device computes; full precision if there are none."""
        model_type = self.teacher.model.config.model_type
        supported = supported_precisions(self.baseline.name, self.device, model_type)
        return [variant for variant in self.task.variants if variant.precision in supported] or [self.full]

    def _predict_cheapest(self, size: str) -> dict[str, PredictedRatio]:
        """By latency that a budget bounds, the ratio that the timed shapes predict for a shape, with its margin.

        Noisy timings exclude no shape, and predict none. Without a known error there is no margin and no prediction.
        """
        predicted = {}
        for cost in COSTS:
            timings = {name: serving.timings.get(cost) for name, serving in self.cheapest.items()}
            timed = {name: timing.ratio for name, timing in timings.items() if timing and timing.ratio is not None}
            costs = shape_costs({name: {cost: ratio} for name, ratio in timed.items()}, Shape.parse(size))
            error = _root_mean_square_error(timed)
            if costs and error is not None:
                ratio, margin = costs[cost], max(MIN_MARGIN, MARGIN_ERRORS * error)
                predicted[cost] = PredictedRatio(ratio=ratio, low=ratio * (1 - margin), high=ratio * (1 + margin))
        return predicted

    def _is_near_a_bound(self, size: str) -> bool:
        """Whether a prediction does not decide whether a bound excludes the shape; without a prediction, also True.

        A ratio that is not above 0 is no prediction.
        """
        may_be_excluded = self._may_be_excluded(self._smallest_weights(self._config(size)))
        predicted, cost_bounds = self._predict_cheapest(size), self.task.bounds
        ratios = shape_costs(self.ratios, Shape.parse(size))
        if not ratios or min(ratios[cost] for cost in COSTS) <= 0 or self._error() is None:
            return True
        for cost in COSTS if may_be_excluded else ():
            for bound in cost_bounds.get(cost, CostBounds()).ratios(self.teacher_ms[cost]):
                if cost not in predicted or predicted[cost].low <= EXCLUSION_MARGIN * bound <= predicted[cost].high:
                    return True
        return False

    def _add_predictions(self, costs: dict[str, dict[str, float]], teacher_ms: dict[str, float]) -> tuple[str, ...]:
        """Add the costs of the shapes that were not timed; returns their names.

        Parameters and memory of the weights are exact. The configuration is that of the first timed shape.
        """
        names = tuple(size for size in self.task.sizes if size not in self.cheapest)
        first = next((serving for size, serving in self.cheapest.items() if size != self.teacher_size), None)
        for size in names:
            assert first is not None
            config = self._config(size)
            ratios = shape_costs(self.ratios, Shape.parse(size))
            latencies = {cost: ratios[cost] * teacher_ms[cost] for cost in COSTS}
            weights = _config_weights(config, self.task.precision)
            peak = shape_costs(self.other_costs, Shape.parse(size)).get("peak_mb")
            peaks = {} if peak is None else {"peak_mb": peak}
            costs[size] = {**latencies, **weights, **peaks, "speedup": 1 / ratios["latency_ms"]}
            self.cheapest[size] = CheapestServing(
                config=first.config,
                engine=first.engine,
                timings={},
                costs=self._smallest_weights(config),
                predicted=self._predict_cheapest(size),
            )
            self.engines[size] = self.engine
        return names

    def _smallest_weights(self, config: Any) -> dict[str, float]:
        """Parameters, and memory of the weights in the precision that needs the least."""
        weights = [_config_weights(config, variant.precision) for variant in self._supported_variants()]
        return min(weights, key=lambda costs: costs["memory_mb"])

    def table(self) -> ShapeTable:
        """The costs of all sizes: the milliseconds are ratios times the teacher's median over all comparisons."""
        teacher_ms = {
            cost: statistics.median(calls) if (calls := self.baseline_calls_ms[cost]) else self.teacher_ms[cost]
            for cost in COSTS
        }
        own = {**teacher_ms, **_weights(self.teacher.location, self.task.precision), **self.teacher_peak}
        costs = {self.teacher_size: {**own, "speedup": 1.0}}
        for size, ratios in self.ratios.items():
            latencies = {cost: ratio * teacher_ms[cost] for cost, ratio in ratios.items()}
            costs[size] = {**latencies, **self.other_costs[size], "speedup": 1 / ratios["latency_ms"]}
        predicted = self._add_predictions(costs, teacher_ms)
        return ShapeTable(
            teacher_size=self.teacher_size,
            costs=costs,
            cheapest=self.cheapest,
            engines=self.engines,
            used_tokens=self.used_tokens,
            predicted=predicted,
            prediction_error=self._error() if predicted else None,
        )

    def _error(self) -> float | None:
        """Root mean square of the relative errors of predicted latencies for a batch of 32; None if not known."""
        return _root_mean_square_error({size: ratios["latency_ms"] for size, ratios in self.ratios.items()})

    def _compare(self, cost: str, call: Any, bounds: Sequence[float], rule: StoppingRule) -> PairedTiming:
        timing = time_pairs(self.calls[cost], call, bounds, extend_for_slow_calls(rule, self.teacher_ms[cost], bounds))
        self.baseline_calls_ms[cost] += [ms for pair in valid_pairs(timing.pairs) for ms in pair.baseline_ms]
        return timing

    def _open(self, checkpoint: str | Path, variant: EngineVariant) -> Engine:
        options = EngineOptions(
            device=self.device,
            threads=self.threads,
            precision=variant.precision,
            languages=self.teacher.languages,
            source_prefix=self.teacher.source_prefix,
            cache_dir=self.scratch / "engines",
            shortlist=self._arbitrary_map(checkpoint, variant.shortlist),
        )
        return open_engine(checkpoint, self.task.run.evaluation.engine, options)

    def _arbitrary_map(self, checkpoint: str | Path, shortlist: str | int) -> Path | None:
        """A fixed list of the first tokens, which is as fast as a list of other tokens.

        A `source` list is at least as long as its tokens that are always allowed.
        """
        if shortlist == "off":
            return None
        tokenizer = load_tokenizer(checkpoint, self.teacher.languages, self.teacher.source_prefix)
        config = load_config(checkpoint)
        size = min(shortlist if isinstance(shortlist, int) else NUM_MOST_USED, config.vocab_size)
        path = self.scratch / f"map-{config.vocab_size}-{size}" / MAP_FILE
        if not path.is_file():
            ids = sorted({*range(size), *kept_tokens(tokenizer, config)})
            write_map(path, Shortlist(np.array(ids)), tokens_by_id(tokenizer))
        return path

    def _config(self, size: str) -> Any:
        """The configuration of a student of a shape."""
        config = self.teacher.model.config
        if Shape.parse(size).vocabulary is not None:
            config = with_vocab_size(config, len(self._token_ids(size)))
        return student_config(config, plan_student(config, Student.of_shape(Shape.parse(size))))

    def _teacher_with_tokens(self, shape: str) -> Teacher:
        """The teacher with the tokens that a student of the shape keeps."""
        if Shape.parse(shape).vocabulary is None:
            return self.teacher
        run = self.task.run
        assert run.teacher is not None
        return open_teacher(run.teacher, run.dataset, self._token_ids(shape))

    def _token_ids(self, shape: str) -> tuple[int, ...]:
        """The tokens that a student of the shape keeps, chosen once per number.

        A number of tokens is chosen without the data, since only the number affects the cost.
        """
        vocabulary = Shape.parse(shape).vocabulary
        assert vocabulary is not None
        if vocabulary not in self.tokens:
            config, tokenizer = load_config(self.teacher.location), self.teacher.tokenizer
            if vocabulary == "used":
                self.tokens[vocabulary] = used = _select_used_tokens(self.task, tokenizer, config)
                self.used_tokens = len(used)
            else:
                self.tokens[vocabulary] = select_tokens(tokenizer, config, {}, vocabulary)
        return self.tokens[vocabulary]

    def _peak_costs(self, call: Any, memory_before_mb: float | None) -> dict[str, float]:
        peak_mb = measure_peak_mb(call, self.device, memory_before_mb)
        return {} if peak_mb is None else {"peak_mb": peak_mb}


def _select_used_tokens(task: ShapeTask, tokenizer: PreTrainedTokenizerBase, config: Any) -> tuple[int, ...]:
    """The ids of the tokens that "used" stands for in the run of a task."""
    student = task.run.student.model_copy(update={"vocabulary": "used"})
    run = task.run.model_copy(update={"student": student})
    token_ids = select_student_tokens(run, tokenizer, config, task.label_folders)
    assert token_ids is not None
    return token_ids


def _root_mean_square_error(measured: Mapping[str, float]) -> float | None:
    """Of the relative errors with which each measured shape is predicted from the others; None if none can be."""
    errors = list(prediction_errors(measured).values())
    return math.sqrt(statistics.mean(error**2 for error in errors)) if errors else None


def _weights(checkpoint: str | Path, precision: str) -> dict[str, float]:
    return _config_weights(load_config(checkpoint), precision)


def _config_weights(config: Any, precision: str) -> dict[str, float]:
    """Parameters, and memory of the weights in a precision."""
    return {
        "params_m": families.count_parameters(config) / 1e6,
        "memory_mb": families.weights_mb(config, precision),
    }


def count_params_m(config: Any, shape: str) -> float:
    """Millions of parameters of a student of this shape, at most for "used" tokens; allocates nothing.

    Args:
        config: The teacher's configuration.
        shape: Name of the shape, such as "12-3".
    """
    parsed = Shape.parse(shape)
    if isinstance(parsed.vocabulary, int):
        config = with_vocab_size(config, min(parsed.vocabulary, config.vocab_size))
    plan = plan_student(config, Student.of_shape(parsed))
    return families.count_parameters(student_config(config, plan)) / 1e6
