"""The paper's tables and figures from sweeps, and its published numbers."""
