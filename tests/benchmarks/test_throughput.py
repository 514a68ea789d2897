"""The benchmark of throughput: the rate that all settings are compared with."""

from benchmarks.throughput import one_batch_rate
from raydistill.config.serving import ThroughputSetting
from raydistill.evaluation.throughput import SettingThroughput, Throughput


def test_settings_are_compared_with_the_best_batch_size_of_one_batch_at_a_time():
    rates = {(2, 1, 2400): 30.0, (1, 2, 1200): 18.0, (1, 2, 2400): 20.0}
    settings = tuple(
        SettingThroughput(
            setting=ThroughputSetting(inter_threads=inter, intra_threads=intra, batch_tokens=tokens),
            seconds=[1.0],
            rows_per_s=rate,
        )
        for (inter, intra, tokens), rate in rates.items()
    )
    result = Throughput(rows=20, settings=settings, background_cores=0.0)
    assert one_batch_rate(result) == 20.0
