"""Passes: one file a rewrite, discovered."""
