"""The recurrences that sub-quadratic sequence models share, as differentiable array functions."""

from kernels.delta_rule import DeltaRuleBlocks, delta_rule, delta_rule_step
from kernels.linear_attention import (
    LinearAttentionBlocks,
    bidirectional_linear_attention,
    linear_attention,
    linear_attention_step,
)
from kernels.linear_recurrence import LinearRecurrenceBlocks, linear_recurrence, linear_recurrence_step
from kernels.selective_scan import SelectiveScanBlocks, selective_scan, selective_scan_step

__all__ = [
    "DeltaRuleBlocks",
    "LinearAttentionBlocks",
    "LinearRecurrenceBlocks",
    "SelectiveScanBlocks",
    "bidirectional_linear_attention",
    "delta_rule",
    "delta_rule_step",
    "linear_attention",
    "linear_attention_step",
    "linear_recurrence",
    "linear_recurrence_step",
    "selective_scan",
    "selective_scan_step",
]
