"""Rows per second of trained models on a CPU, by the number of parallel batches, threads per batch and batch size.

    python -m benchmarks.throughput --model 6-3=STUDENT --model 6-1=STUDENT --data MULTI30K

The machine should do nothing else.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import BenchmarkResult, describe_machine
from raydistill.config.run import Dataset, Decoding
from raydistill.config.serving import ThroughputSetting
from raydistill.core.console import print_progress
from raydistill.core.machine import available_cores
from raydistill.data.corpus import read_corpus
from raydistill.evaluation.throughput import Throughput, measure_throughput, setting_grid
from raydistill.inference.decoding import Engine, EngineOptions, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.results.tables import markdown_table

MAX_TOKENS = 64


def open_with(checkpoint: Path, options: EngineOptions, setting: ThroughputSetting) -> Engine:
    """Open CTranslate2 with a setting."""
    return open_engine(checkpoint, "ctranslate2", options.with_setting(setting))


def one_batch_rate(result: Throughput) -> float:
    """Rows per second with one batch at a time on all threads, at the best batch size that was measured."""
    return max(measured.rows_per_s for measured in result.settings if measured.setting.inter_threads == 1)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=CHECKPOINT")
    parser.add_argument("--data", required=True, help="the data set: a name or a folder")
    parser.add_argument("--rows", type=int, help="test rows; default: all")
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 1], help="default: 4 1")
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8"], help="default: fp32 int8")
    parser.add_argument("--threads", type=int, default=len(available_cores()), help="default: all cores")
    arguments = parser.parse_args()
    machine = describe_machine()
    texts = list(read_corpus(Dataset(name=arguments.data, test_rows=arguments.rows), "test").sources)
    grid = setting_grid("ctranslate2", "cpu", arguments.threads)
    data: list[dict[str, Any]] = []
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        options = EngineOptions(cache_dir=Path(scratch), allow_fallback=False)
        cases = [(m, p, b) for m in arguments.model for p in arguments.precision for b in arguments.beams]
        for model, precision, beams in cases:
            name, _, path = model.partition("=")
            opener = partial(open_with, Path(path), replace(options, precision=precision))
            generation_config = opener(ThroughputSetting(inter_threads=1, intra_threads=1)).generation_config
            beam = resolve_decoding(Decoding(beams=beams), generation_config, None, MAX_TOKENS)
            result = measure_throughput(opener, grid, texts, beam, MAX_TOKENS)
            data.append({"model": name, "precision": precision, "beams": beams, **result.model_dump()})
            baseline = one_batch_rate(result)
            for measured in result.settings:
                best = " *" if measured is result.best else ""
                figures = [f"{measured.rows_per_s:.0f}{best}", f"{measured.rows_per_s / baseline:.2f}x"]
                rows.append([name, precision, str(beams), measured.setting.label, *figures])
            print_progress(
                f"{name} {precision} {beams} beams: {result.best.setting.label}; other processes kept "
                f"{result.background_cores:.2f} cores busy"
            )
    load = max(entry["background_cores"] for entry in data)
    text = (
        "Median of three passes. `*`: the fastest setting. The last column compares with one batch at a time on all "
        f"threads, at its best measured batch size. Other processes kept at most {load:.2f} cores busy."
    )
    header = ["model", "precision", "beams", "setting", "rows per second", "over one batch at a time"]
    markdown = f"{text}\n\n{markdown_table(header, rows)}"
    print(BenchmarkResult("throughput", "Rows per second on a CPU", markdown, data, machine).write())


if __name__ == "__main__":
    main()
