"""Which kind of machine Ray's autoscaler asks for: the cheap one, and another where the cloud had none of it.

Ray keeps account of the node types whose launch failed, for half an hour each, but its own choice does not look at it:
it would ask for spot instances for ever where there are none. cluster.yaml names `spot_first` as the scorer instead
(RAY_AUTOSCALER_UTILIZATION_SCORER, which Ray's first autoscaler reads).
"""

from typing import Any


def spot_first(
    node_resources: Any,
    resources: list[Any],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """Ray's score of a node type for the bundles that wait, highest chosen; None where it can hold none of them.

    Between types that fit equally well: one whose last launch did not fail; then one with "spot" in its name.
    """
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer

    score = _default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if score is None:
        return None
    record = node_availability_summary.node_availabilities.get(node_type)
    return (*score, record is None or record.is_available, "spot" in node_type)
