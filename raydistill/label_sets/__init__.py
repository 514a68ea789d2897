"""Pseudo-labels on disk: label sets and their manifests, batch plans, mixing and curation."""
