"""Padding-free attention, prefix-scan attention and linear scans as PyTorch ops."""

from flowattn.data import TokenBudgetBatchSampler, pack_sequences
from flowattn.dispatch import FallbackWarning, explain, use_backend
from flowattn.ops.attention_scores import DisentangledBias, RelativeBias
from flowattn.ops.axial_attention import (
    axial_attention,
    axial_attention_qkvpacked,
    axial_attention_step,
    axial_attention_sum,
    axial_shift,
)
from flowattn.ops.chunk_hybrid_attention import chunk_hybrid_attention
from flowattn.ops.decays import decay_preset
from flowattn.ops.encoder_fusions import bias_gelu, bias_residual_layer_norm
from flowattn.ops.factorized_attention import axis_means, factorized_attention
from flowattn.ops.fixed_point_inverse import fixed_point_inverse
from flowattn.ops.flow_affine import flow_affine_forward, flow_affine_inverse
from flowattn.ops.flow_attention import FLOW_PRESETS, FlowState, flow_attention, flow_attention_step
from flowattn.ops.flow_inverse import InverseInfo, flow_forward, flow_inverse
from flowattn.ops.flow_solvers import InverseStatus
from flowattn.ops.grid_retention import grid_retention
from flowattn.ops.linear_attention import LinearState, linear_attention, linear_attention_step
from flowattn.ops.linear_scan import linear_scan
from flowattn.ops.packing import PackPlan, pack, pack_plan, unpack
from flowattn.ops.prefix_attention import (
    PrefixState,
    aaren_attention,
    prefix_attention,
    prefix_attention_step,
    prefix_state_merge,
)
from flowattn.ops.selective_scan import SelectiveInputs, bi_selective_scan, selective_scan
from flowattn.ops.varlen_attention import varlen_attention

__version__ = "0.1.0"
__all__ = [
    "DisentangledBias",
    "FLOW_PRESETS",
    "FallbackWarning",
    "FlowState",
    "InverseInfo",
    "InverseStatus",
    "LinearState",
    "PackPlan",
    "PrefixState",
    "RelativeBias",
    "SelectiveInputs",
    "TokenBudgetBatchSampler",
    "aaren_attention",
    "axial_attention",
    "axial_attention_qkvpacked",
    "axial_attention_step",
    "axial_attention_sum",
    "axial_shift",
    "axis_means",
    "bi_selective_scan",
    "bias_gelu",
    "bias_residual_layer_norm",
    "chunk_hybrid_attention",
    "decay_preset",
    "explain",
    "factorized_attention",
    "fixed_point_inverse",
    "flow_affine_forward",
    "flow_affine_inverse",
    "flow_attention",
    "flow_attention_step",
    "flow_forward",
    "flow_inverse",
    "grid_retention",
    "linear_attention",
    "linear_attention_step",
    "linear_scan",
    "pack",
    "pack_plan",
    "pack_sequences",
    "prefix_attention",
    "prefix_attention_step",
    "prefix_state_merge",
    "selective_scan",
    "unpack",
    "use_backend",
    "varlen_attention",
]
