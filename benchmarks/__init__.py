"""Benchmarks that compare raydistill with the obvious alternatives; README.md lists them."""
