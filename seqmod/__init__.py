"""Sequence models whose residual stream can be read and edited."""
