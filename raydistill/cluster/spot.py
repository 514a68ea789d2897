"""Scoring of node types for Ray's autoscaler: spot instances first, on-demand instances where spot is unavailable.

Ray records node types whose launch failed, for half an hour each, but its default scorer ignores the record and would
request spot instances forever. cluster.yaml names `spot_first` as the scorer
(RAY_AUTOSCALER_UTILIZATION_SCORER, which only Ray's first autoscaler reads).
"""

from typing import Any

from raydistill.cluster.ray_compat import default_node_score


def spot_first(
    node_resources: Any,
    resources: list[Any],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """Score a node type for the pending resource bundles: Ray launches the type with the highest score.

    Extends Ray's default score. Of types that fit equally well, a type whose last launch did not fail wins, then a type
    with "spot" in its name.

    Returns:
        The score, or None if a node of this type can hold none of the bundles.
    """
    score = default_node_score(node_resources, resources, node_type, node_availability_summary)
    if score is None:
        return None
    record = node_availability_summary.node_availabilities.get(node_type)
    return (*score, record is None or record.is_available, "spot" in node_type)
