"""Padding-free, linear, flow, axial and prefix-scan attention and causal-flow inverses as PyTorch ops."""

from flowattn.dispatch import FallbackWarning, explain, use_backend
from flowattn.ops.encoder_fusions import bias_gelu, bias_residual_layer_norm
from flowattn.ops.packing import PackPlan, pack, pack_plan, unpack
from flowattn.ops.varlen_attention import varlen_attention

__version__ = "0.1.0"
__all__ = [
    "FallbackWarning",
    "PackPlan",
    "bias_gelu",
    "bias_residual_layer_norm",
    "explain",
    "pack",
    "pack_plan",
    "unpack",
    "use_backend",
    "varlen_attention",
]
