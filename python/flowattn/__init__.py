"""Padding-free, linear, flow, axial and prefix-scan attention and causal-flow inverses as PyTorch ops."""

from flowattn.data import TokenBudgetBatchSampler, pack_sequences
from flowattn.dispatch import FallbackWarning, explain, use_backend
from flowattn.ops.packing import PackPlan, pack, pack_plan, unpack
from flowattn.ops.varlen_attention import varlen_attention

__version__ = "0.1.0"
__all__ = [
    "FallbackWarning",
    "PackPlan",
    "TokenBudgetBatchSampler",
    "explain",
    "pack",
    "pack_plan",
    "pack_sequences",
    "unpack",
    "use_backend",
    "varlen_attention",
]
