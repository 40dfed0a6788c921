"""Padding-free attention, prefix-scan attention and linear scans as PyTorch ops."""

from flowattn.data import TokenBudgetBatchSampler, pack_sequences
from flowattn.dispatch import FallbackWarning, explain, use_backend
from flowattn.ops.attention_scores import RelativeBias
from flowattn.ops.axial_attention import (
    axial_attention,
    axial_attention_qkvpacked,
    axial_attention_step,
    axial_attention_sum,
    axial_shift,
)
from flowattn.ops.encoder_fusions import bias_gelu, bias_residual_layer_norm
from flowattn.ops.factorized_attention import axis_means, factorized_attention
from flowattn.ops.linear_scan import linear_scan
from flowattn.ops.packing import PackPlan, pack, pack_plan, unpack
from flowattn.ops.prefix_attention import (
    PrefixState,
    aaren_attention,
    prefix_attention,
    prefix_attention_step,
    prefix_state_merge,
)
from flowattn.ops.varlen_attention import varlen_attention

__version__ = "0.1.0"
__all__ = [
    "FallbackWarning",
    "PackPlan",
    "PrefixState",
    "RelativeBias",
    "TokenBudgetBatchSampler",
    "aaren_attention",
    "axial_attention",
    "axial_attention_qkvpacked",
    "axial_attention_step",
    "axial_attention_sum",
    "axial_shift",
    "axis_means",
    "bias_gelu",
    "bias_residual_layer_norm",
    "explain",
    "factorized_attention",
    "linear_scan",
    "pack",
    "pack_plan",
    "pack_sequences",
    "prefix_attention",
    "prefix_attention_step",
    "prefix_state_merge",
    "unpack",
    "use_backend",
    "varlen_attention",
]
