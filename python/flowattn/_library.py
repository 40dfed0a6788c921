"""Every private op: its schema, and the thunk that loads a Triton launcher on first use.

Forward and backward are separate ops of fixed arity. `<op>` has the C++ kernels (CPU and CUDA, registered by
flowattn._C); `<op>_triton` the Triton launcher of the same signature. The schemas stand here and not in C++ so that
the Triton ops exist, and compile, where no compiler was present at installation.
"""

import importlib

import torch

# What attention does to its scores: bias (1 or B, 1 or H, S, S), rel_table (buckets, H), rng (2,) = seed and offset.
# The defaults mean nothing at all, and spare the plain call the cost of handing them over.
_SCORES = (
    "float softcap=0.0, Tensor? alibi_slopes=None, Tensor? bias=None, Tensor? rel_table=None, Tensor? rel_lut=None,"
    " float dropout_p=0.0, Tensor? rng=None"
)

_AXIAL_BWD = (
    "Tensor out, Tensor lse, Tensor? bias, Tensor? cos, Tensor? sin, int axis, float scale, int mask, bool interleaved,"
    " bool want_dbias"
)

# name -> arguments and results; shapes and meanings are in ops/<op>.py.
SCHEMAS = {
    "bias_gelu_fwd": "(Tensor x, Tensor? bias, bool tanh) -> Tensor",
    "bias_gelu_bwd": "(Tensor dy, Tensor x, Tensor? bias, bool tanh, bool want_dbias) -> (Tensor dx, Tensor dbias)",
    "bias_residual_layer_norm_fwd": "(Tensor x, Tensor? bias, Tensor? residual, Tensor? weight, Tensor? ln_bias,"
    " Tensor? index, float eps, bool want_sum) -> (Tensor y, Tensor z, Tensor stats)",
    "bias_residual_layer_norm_bwd": "(Tensor dy, Tensor? dz, Tensor x, Tensor? bias, Tensor? residual, Tensor? weight,"
    " Tensor? ln_bias, Tensor stats, Tensor? inverse, bool want_params)"
    " -> (Tensor dx, Tensor dbias, Tensor dweight, Tensor dln_bias)",
    "axial_attention_fwd": "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? cos, Tensor? sin, int axis,"
    " float scale, int mask, bool interleaved) -> (Tensor out, Tensor lse)",
    "axial_attention_bwd": f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, {_AXIAL_BWD})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    "axial_attention_qkvpacked_bwd": f"(Tensor dout, Tensor? dlse, Tensor qkv, {_AXIAL_BWD})"
    " -> (Tensor dqkv, Tensor dbias)",
    "factorized_attention_fwd": "(Tensor v, Tensor[] kernels, int[] axes) -> Tensor",
    "factorized_attention_bwd": "(Tensor dout, Tensor v, Tensor[] kernels, int[] axes)"
    " -> (Tensor dv, Tensor[] dkernels)",
    "gather_rows": "(Tensor src, Tensor index, float fill) -> Tensor",
    "aaren_scores_fwd": "(Tensor query, Tensor keys, float scale) -> Tensor",
    "aaren_scores_bwd": "(Tensor dscores, Tensor query, Tensor keys, float scale) -> (Tensor dquery, Tensor dkeys)",
    "linear_scan_fwd": "(Tensor gates, Tensor tokens, Tensor? initial, Tensor? cu_seqlens, Tensor? reset,"
    " bool log_gate, bool reverse) -> (Tensor out, Tensor final)",
    "linear_scan_bwd": "(Tensor dout, Tensor? dfinal, Tensor gates, Tensor out, Tensor? initial, Tensor? cu_seqlens,"
    " Tensor? reset, bool log_gate, bool reverse) -> (Tensor dgates, Tensor dtokens, Tensor dinitial)",
    "pack_plan": "(Tensor source, int kind, SymInt padded_len, SymInt capacity)"
    " -> (Tensor cu_seqlens, Tensor indices, Tensor inverse, Tensor position_ids, Tensor tiles, Tensor stats)",
    "prefix_attention_fwd": "(Tensor scores, Tensor values, Tensor? mask, Tensor? reset, Tensor? cu_seqlens,"
    " Tensor? m0, Tensor? u0, Tensor? w0, bool reverse, bool keep_sums)"
    " -> (Tensor out, Tensor m, Tensor u, Tensor m_final, Tensor u_final, Tensor w_final)",
    "prefix_attention_bwd": "(Tensor dout, Tensor? dlse, Tensor? du_final, Tensor? dw_final, Tensor scores,"
    " Tensor values, Tensor? mask, Tensor? reset, Tensor? cu_seqlens, Tensor? m0, Tensor out, Tensor m, Tensor u,"
    " Tensor u_final, bool reverse) -> (Tensor dscores, Tensor dvalues, Tensor du0, Tensor dw0)",
    "varlen_attention_fwd": "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? tiles,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, SymInt window_left, SymInt window_right, bool top_left,"
    f" {_SCORES}) -> (Tensor out, Tensor lse)",
    "varlen_attention_bwd": "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? tiles, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale,"
    " SymInt window_left, SymInt window_right, bool top_left,"
    f" bool deterministic, {_SCORES}, bool want_dbias=False)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor drel_table)",
}
TRITON_OPS = {
    "factorized_attention_fwd": "factorized_attention",
    "factorized_attention_bwd": "factorized_attention",
    "axial_attention_fwd": "axial_attention",
    "axial_attention_bwd": "axial_attention",
    "axial_attention_qkvpacked_bwd": "axial_attention",
    "varlen_attention_fwd": "varlen_attention",
    "varlen_attention_bwd": "varlen_attention",
}

_LIB = torch.library.Library("flowattn", "DEF")


def _triton_thunk(module, name):
    launcher = None

    def call(*args):
        nonlocal launcher
        if launcher is None:
            launcher = getattr(importlib.import_module(f"flowattn.triton_kernels.{module}"), name)
        return launcher(*args)

    return call


def _define():
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    for name, signature in SCHEMAS.items():
        _LIB.define(name + signature, tags=tags)
        if name in TRITON_OPS:
            _LIB.define(f"{name}_triton{signature}", tags=tags)
            thunk = _triton_thunk(TRITON_OPS[name], name)
            for key in ("CUDA", "CPU"):  # CPU: Triton's interpreter
                _LIB.impl(f"{name}_triton", thunk, key)


_define()


def fake(name):
    """Decorator: register one fake for `name` and its Triton twin."""

    def register(function):
        for op in (name, f"{name}_triton") if name in TRITON_OPS else (name,):
            torch.library.register_fake(f"flowattn::{op}", function, lib=_LIB)
        return function

    return register


def op(name):
    """The bound overload, to be looked up once at import."""
    return getattr(torch.ops.flowattn, name).default
