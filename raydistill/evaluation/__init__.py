"""Scores with bootstrap intervals, latency, and serving on real rows."""
