"""Timings. `python -m experiments.bench` runs all of them; each module also runs by itself.

Command: python -m experiments.bench
"""
