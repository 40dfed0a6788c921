"""Layers with the parameter names of the models they replace."""

from flowattn.nn.axial_attention import AxialAttention
from flowattn.nn.factorized_attention import AxisKernel, FactorizedBlock

__all__ = ["AxialAttention", "AxisKernel", "FactorizedBlock"]
