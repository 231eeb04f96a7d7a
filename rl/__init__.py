"""Environments, algorithms and internal RL, compiled end to end."""
