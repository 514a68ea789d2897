"""The simulation of latency comparisons, with few runs: the promised rates, and the machine that it simulates."""

import numpy as np
import pytest

from benchmarks.paired_latency import BOUND, NOISES, Machine, Noise, measure_rates, rates_table, simulate_pairs

RUNS = 60
# More wrong runs of 60 than this have a probability below 1 in 1000 at a rate of 5 %.
MOST_WRONG = 9
REALISTIC = NOISES["jitter 15 %, spikes, drift, another process"]


@pytest.mark.parametrize("multiple", [0.9, 1.0, 1.1])
@pytest.mark.parametrize("noise", [NOISES["jitter 20 %"], REALISTIC])
def test_pairs_rarely_decide_for_the_wrong_side(noise, multiple):
    rates = measure_rates(noise, multiple, range(RUNS))
    assert rates.wrong <= MOST_WRONG / RUNS
    assert rates.covered >= 1 - MOST_WRONG / RUNS
    if multiple != 1:
        assert rates.undecided <= 0.35
        assert rates.separate_wrong > rates.wrong


def test_separate_medians_are_often_wrong_on_a_machine_with_another_process():
    assert measure_rates(REALISTIC, 1.1, range(RUNS)).separate_wrong > 0.2


def test_simulated_calls_have_the_typical_time_and_jitter():
    machine = Machine(Noise(0.1), np.random.default_rng(0))
    seconds = machine.call_seconds(np.linspace(0, 500, 4000), 0.2, student=False)
    assert np.median(seconds) == pytest.approx(0.2, rel=0.01)
    assert np.std(np.log(seconds)) == pytest.approx(0.1, rel=0.1)


def test_simulated_load_is_the_share_of_the_other_process():
    machines = [Machine(Noise(0.1, busy_share=0.4), np.random.default_rng(seed)) for seed in range(60)]
    start, end = np.array([0.0]), np.array([600.0])
    assert np.mean([machine.busy_seconds(start, end) / 600 for machine in machines]) == pytest.approx(0.4, abs=0.05)
    pairs = [pair for machine in machines[:10] for pair in simulate_pairs(machine, BOUND)]
    assert np.mean([pair.noisy for pair in pairs]) == pytest.approx(0.4, abs=0.15)
    # A pair next to the other process takes longer.
    quiet = np.median([pair.seconds for pair in pairs if not pair.noisy])
    assert np.median([pair.seconds for pair in pairs if pair.noisy]) > 1.2 * quiet


def test_table_names_the_worst_rates():
    rates = {"quiet": [measure_rates(Noise(0.02), 0.9, range(3))]}
    text = rates_table(rates)
    assert "wrong decisions of pairs 0.0%" in text
    assert "| 0.9 | 100.0% | 0.0% | 0.0% |" in text
