"""Modules: drop-in layers with regenerated weights, and the contexts that modulate them."""

from nmkern.nn.contexts import (
    ContextModule,
    add_context,
    context_parameters,
    finish_context,
    num_contexts,
    select_context,
    use_context,
)
from nmkern.nn.modulated_linear import ModulatedLinear
from nmkern.nn.records import load_state_dict
from nmkern.nn.sparse_projection import SparseProjection

__all__ = [
    "ContextModule",
    "ModulatedLinear",
    "SparseProjection",
    "add_context",
    "context_parameters",
    "finish_context",
    "load_state_dict",
    "num_contexts",
    "select_context",
    "use_context",
]
