"""Generators of the documentation site: reference pages from the code, the import drawing, and checks of the text."""
