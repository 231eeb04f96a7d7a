"""The recurrences that sub-quadratic sequence models share, as differentiable array functions."""
