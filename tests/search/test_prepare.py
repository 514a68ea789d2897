"""Which sizes a sweep does not train, because no budget admits them."""

from raydistill.search.prepare import PreparedSweep, find_infeasible_sizes
from tests.factories.sweeps import make_space


def test_a_size_is_infeasible_only_if_it_exceeds_the_budget_with_the_fewest_beams_too():
    costs = {"2-3": {"latency_ms": 90.0}, "2-1": {"latency_ms": 50.0}}
    fewest_beams = {"2-3": {"latency_ms": 45.0}, "2-1": {"latency_ms": 30.0}}
    prepared = PreparedSweep({"size": "2-3", "costs": costs["2-3"]}, costs, fewest_beams)
    for bound, infeasible in ((90, set()), (45, set()), ("50%", set()), (44, {"2-3"}), ("40%", {"2-3"})):
        space = make_space().model_copy(update={"budgets": {"fast": {"latency_ms": bound}}})
        assert find_infeasible_sizes(space, prepared) == infeasible
