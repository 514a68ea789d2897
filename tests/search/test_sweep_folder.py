"""The folder of a sweep: why its search stopped, and when it is started again."""

from raydistill.config.serving import Serving
from raydistill.config.space import Search
from raydistill.results.sweep_record import StopReason
from raydistill.search.study import PROPOSALS_FILE, Proposal, ProposalLog
from raydistill.search.sweep_folder import search_stop_reason
from tests.factories.sweeps import change_sweep, finished_sweep


def test_an_exhausted_search_is_not_started_again_unless_other_budgets_may_admit_more(world, tmp_path):
    space, _ = finished_sweep(tmp_path, *world)
    changes = space.model_copy(update={"search": Search(trials=9)})
    assert search_stop_reason(changes, tmp_path) is None
    change_sweep(tmp_path, stop=StopReason("all tried", exhausted=True))
    assert search_stop_reason(changes, tmp_path) == StopReason("all tried", exhausted=True)
    deleted = ProposalLog(proposals=(Proposal(key="deleted", number=9, params={}),))
    deleted.write(tmp_path / PROPOSALS_FILE)
    assert search_stop_reason(changes, tmp_path) is None, "a trial whose folder was deleted"
    (tmp_path / PROPOSALS_FILE).unlink()
    assert search_stop_reason(changes.model_copy(update={"budgets": {"b": {"params_m": 9}}}), tmp_path) is None
    assert search_stop_reason(changes.model_copy(update={"serving": Serving(beams=[1])}), tmp_path) is None
    change_sweep(tmp_path, stop=StopReason("one hour is used up"))
    assert search_stop_reason(changes, tmp_path) is None
