"""Measures the rows per second of the shapes of a sweep as they are served, for budgets that bound `rows_per_s`."""

from collections.abc import Iterator, Sequence
from functools import partial

from raydistill.config.serving import EngineVariant, ServingConfig, ThroughputSetting
from raydistill.core.console import print_progress
from raydistill.evaluation.latency import MAX_BACKGROUND_CORES
from raydistill.evaluation.throughput import SettingGrid, measure_throughput, setting_grid
from raydistill.inference.decoding import Engine
from raydistill.results.formatting import format_count
from raydistill.results.serving_latency import MeasuredThroughput
from raydistill.search.served_engine import ServedCheckpoint, open_served_engine
from raydistill.search.serving_timing import SessionTask


def measure_throughputs(task: SessionTask, device: str, threads: int) -> list[MeasuredThroughput]:
    """The rows per second of the baseline, and of each student's shape with each of its configurations.

    Several settings of threads and batches are tried with the first configuration of a shape. The shape's other
    configurations are measured with the best of these settings. Call with `run_exclusive`.
    """
    measured: list[MeasuredThroughput] = []
    for checkpoint in task.checkpoints:
        configs = [task.baseline] if checkpoint.is_teacher else task.configs[checkpoint.shape]
        measured += _measure_shape(_Decoder(task, checkpoint, device, threads), configs)
    return measured


class _Decoder:
    """Opens a checkpoint with settings of threads and batches."""

    def __init__(self, task: SessionTask, checkpoint: ServedCheckpoint, device: str, threads: int) -> None:
        self.context, self.checkpoint, self.device, self.threads = task.context, checkpoint, device, threads

    def open(self, variant: EngineVariant, setting: ThroughputSetting) -> Engine:
        """The checkpoint with a setting."""
        return open_served_engine(self.context, self.checkpoint.checkpoint, variant, self.device, setting)

    def settings(self, variant: EngineVariant) -> SettingGrid:
        """The settings to try for a variant."""
        whole_machine = ThroughputSetting(inter_threads=1, intra_threads=self.threads)
        return setting_grid(self.open(variant, whole_machine).name, self.device, self.threads)

    def measure(self, config: ServingConfig, settings: SettingGrid) -> MeasuredThroughput:
        """The rows per second of a configuration with the best of some settings."""
        result = measure_throughput(
            partial(self.open, config.variant),
            settings,
            self.context.sources,
            self.checkpoint.beam(config),
            self.context.max_source_tokens(self.checkpoint.checkpoint),
        )
        return MeasuredThroughput(
            shape=self.checkpoint.shape,
            config=config,
            setting=result.best.setting,
            rows_per_s=result.best.rows_per_s,
            background_cores=result.background_cores,
        )


def _measure_shape(decoder: _Decoder, configs: Sequence[ServingConfig]) -> Iterator[MeasuredThroughput]:
    settings = decoder.settings(configs[0].variant)
    for config in configs:
        measured = decoder.measure(config, settings)
        settings = settings.only(measured.setting)
        yield measured


def warn_if_busy(throughputs: Sequence[MeasuredThroughput]) -> None:
    """Print a warning if other processes kept the machine busy."""
    busy = [measured for measured in throughputs if measured.background_cores > MAX_BACKGROUND_CORES]
    if busy:
        print_progress(
            f"throughput: other processes kept the machine busy during {format_count(len(busy), 'measurement')} of "
            f"{len(throughputs)}, which may mislead the selection. End those processes, delete serving_latency.json in "
            f"the sweep's folder, and run the same command again"
        )
