"""The recurrences that sub-quadratic sequence models share, as differentiable array functions."""

from kernels.linear_recurrence import linear_recurrence

__all__ = ["linear_recurrence"]
