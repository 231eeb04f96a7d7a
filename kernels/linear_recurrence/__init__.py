"""Diagonal linear recurrence h_t = a_t * h_{t-1} + x_t: the core of LRU, S4D, S5 and RG-LRU / Hawk."""

from kernels.linear_recurrence.scan import linear_recurrence

__all__ = ["linear_recurrence"]
