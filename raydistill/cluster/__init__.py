"""Ray primitives: starting a cluster, exclusive tasks, actor pools, process groups, draining nodes, bucket sync."""
