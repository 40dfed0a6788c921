"""Every private op: its schema, and the thunk that loads a Triton launcher on first use.

Forward and backward are separate ops of fixed arity. `<op>` has the C++ kernels (CPU and CUDA, registered by
flowattn._C); `<op>_triton` the Triton launcher of the same signature. The schemas stand here and not in C++ so that
the Triton ops exist, and compile, where no compiler was present at installation.
"""

import importlib

import torch

_ROWS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? tiles, SymInt max_seqlen_q, SymInt max_seqlen_k"
_MASK = "float scale, SymInt window_left, SymInt window_right, bool top_left"
_ATTENTION = f"Tensor q, Tensor k, Tensor v, {_ROWS}, {_MASK}"
_ATTENTION_BWD = (
    "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_ROWS}, {_MASK}, bool deterministic"
)
# What attention does to its scores: bias (1 or B, 1 or H, S, S), rel_table (buckets, H), rng (2,) = seed and offset.
# The defaults mean nothing at all, and spare the plain call the cost of handing them over.
_SCORES = (
    "float softcap=0.0, Tensor? alibi_slopes=None, Tensor? bias=None, Tensor? rel_table=None, Tensor? rel_lut=None,"
    " float dropout_p=0.0, Tensor? rng=None"
)
# Disentangled attention has ops of its own, so that no backend must return gradients of tables that it does not take.
_POSITIONS = "Tensor? position_keys=None, Tensor? position_queries=None"

# What a selective scan is given: u, delta, z (B, E, L) or (B, L, E), A (E, N), B, C (B, G, N, L) or (B, L, G, N).
_SELECTIVE = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? skip, Tensor? z, Tensor? delta_bias"

# A block of a causal flow: packed weights, what its rows are conditioned on, and its static cache.
_FLOW_BLOCK = (
    "Tensor weights, Tensor vectors, Tensor config, Tensor? positions, Tensor? cond, Tensor? prefix, Tensor? rope,"
    " Tensor? start, Tensor scale, Tensor(a!) keys, Tensor(b!) values"
)

# Flow-Attention: its options, and the state that a causal call starts from.
_FLOW_OPTIONS = "bool relu, float clamp, float eps, float extra"
_FLOW_STATE = "Tensor? sums, Tensor? total, Tensor? count, Tensor? state"

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
    "flow_affine_fwd": "(Tensor x, Tensor params, bool softplus, float soft_clip) -> (Tensor z, Tensor logdet)",
    "flow_affine_bwd": "(Tensor dz, Tensor? dlogdet, Tensor z, Tensor params, bool softplus, float soft_clip)"
    " -> (Tensor dx, Tensor dparams)",
    "flow_affine_inv": "(Tensor z, Tensor params, Tensor? params_uncond, Tensor? guidance, Tensor? previous, int rule,"
    " bool guide_scale, bool guide_mean, bool softplus, float soft_clip) -> (Tensor x, Tensor statistics)",
    "flow_pack": "(Tensor weight, Tensor(a!) packed, SymInt offset) -> ()",
    "flow_window": f"(Tensor tokens, {_FLOW_BLOCK}, Tensor lo, Tensor hi, SymInt width, SymInt outputs,"
    " float eps) -> Tensor",
    "flow_sequential": f"(Tensor(c!) tokens, {_FLOW_BLOCK}, Tensor z, Tensor? guidance, SymInt begin, int rule,"
    " bool guide_scale, bool guide_mean, bool softplus, float soft_clip, float clamp, float eps) -> Tensor",
    "causal_flow_attention_fwd": "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? cu_seqlens,"
    f" {_FLOW_STATE}, {_FLOW_OPTIONS})"
    " -> (Tensor y, Tensor flows, Tensor sums_final, Tensor total_final, Tensor state_final)",
    "causal_flow_attention_bwd": "(Tensor dy, Tensor? dsums, Tensor? dtotal, Tensor? dstate, Tensor q, Tensor k,"
    f" Tensor v, Tensor? mask, Tensor? cu_seqlens, {_FLOW_STATE}, Tensor flows, {_FLOW_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsums0, Tensor dtotal0, Tensor dstate0)",
    "chunk_hybrid_attention_fwd": "(Tensor q, Tensor k, Tensor v, Tensor gate, Tensor? state, SymInt chunk)"
    " -> (Tensor o, Tensor lse, Tensor final)",
    "chunk_hybrid_attention_bwd": "(Tensor do, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor gate,"
    " Tensor? state, Tensor lse, SymInt chunk) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgate, Tensor dstate)",
    "flow_attention_fwd": "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? query_mask, Tensor? cu_seqlens,"
    f" {_FLOW_OPTIONS}) -> (Tensor y, Tensor flows_q, Tensor flows_k, Tensor sums, Tensor lse, Tensor kv)",
    "flow_attention_bwd": "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? query_mask,"
    " Tensor? cu_seqlens, Tensor flows_q, Tensor flows_k, Tensor sums, Tensor lse, Tensor kv,"
    f" {_FLOW_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
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
    # Its gradients are itself: a, b, c in the roles of queries, keys and values (ops/grid_retention.py).
    "grid_retention_fwd": "(Tensor a, Tensor b, Tensor c, Tensor decay, float scale, SymInt height, SymInt width,"
    " int visible) -> Tensor",
    "linear_attention_fwd": "(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? key_weight, Tensor? row_scale,"
    " Tensor? s0, Tensor? z0, Tensor? cu_seqlens, float scale, float eps, int map_q, int map_k, int mode,"
    " bool normalize) -> (Tensor out, Tensor den, Tensor s, Tensor z)",
    "linear_attention_bwd": "(Tensor dout, Tensor? ds, Tensor? dz, Tensor q, Tensor k, Tensor v, Tensor? decay,"
    " Tensor? key_weight, Tensor? row_scale, Tensor? s0, Tensor? z0, Tensor? cu_seqlens, Tensor out, Tensor den,"
    " Tensor s, Tensor z, float scale, float eps, int map_q, int map_k, int mode, bool normalize, bool want_ddecay)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor ddecay, Tensor ds0, Tensor dz0)",
    "linear_scan_fwd": "(Tensor gates, Tensor tokens, Tensor? initial, Tensor? cu_seqlens, Tensor? reset,"
    " bool log_gate, bool reverse) -> (Tensor out, Tensor final)",
    "linear_scan_bwd": "(Tensor dout, Tensor? dfinal, Tensor gates, Tensor out, Tensor? initial, Tensor? cu_seqlens,"
    " Tensor? reset, bool log_gate, bool reverse) -> (Tensor dgates, Tensor dtokens, Tensor dinitial)",
    "pack_plan": "(Tensor source, int kind, SymInt padded_len, SymInt capacity)"
    " -> (Tensor cu_seqlens, Tensor indices, Tensor inverse, Tensor position_ids, Tensor tiles, Tensor stats)",
    "prefix_attention_fwd": "(Tensor scores, Tensor values, Tensor? mask, Tensor? reset, Tensor? cu_seqlens,"
    " Tensor? m0, Tensor? u0, Tensor? w0, bool reverse, bool keep_sums, bool keep_lse)"
    " -> (Tensor out, Tensor m, Tensor u, Tensor lse, Tensor m_final, Tensor u_final, Tensor w_final)",
    "prefix_attention_bwd": "(Tensor dout, Tensor? dlse, Tensor? du_final, Tensor? dw_final, Tensor scores,"
    " Tensor values, Tensor? mask, Tensor? reset, Tensor? cu_seqlens, Tensor? m0, Tensor out, Tensor m, Tensor u,"
    " Tensor u_final, bool reverse) -> (Tensor dscores, Tensor dvalues, Tensor du0, Tensor dw0)",
    "selective_scan_fwd": f"({_SELECTIVE}, Tensor? initial, Tensor? cu_seqlens, Tensor? slots, int num_slots,"
    " bool softplus, bool reverse, bool time_last, int chunk)"
    " -> (Tensor out, Tensor final, Tensor states, Tensor carries)",
    "selective_scan_bwd": f"(Tensor dout, Tensor? dfinal, Tensor? dstates, {_SELECTIVE}, bool has_initial,"
    " Tensor? cu_seqlens, Tensor? slots, Tensor carries, bool softplus, bool reverse, bool time_last, int chunk)"
    " -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dskip, Tensor dz, Tensor dbias,"
    " Tensor dinitial)",
    "varlen_attention_fwd": f"({_ATTENTION}, {_SCORES}) -> (Tensor out, Tensor lse)",
    "varlen_attention_bwd": f"({_ATTENTION_BWD}, {_SCORES}, bool want_dbias=False)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor drel_table)",
    "varlen_attention_disentangled_fwd": f"({_ATTENTION}, {_SCORES}, {_POSITIONS}) -> (Tensor out, Tensor lse)",
    "varlen_attention_disentangled_bwd": f"({_ATTENTION_BWD}, {_SCORES}, {_POSITIONS}, bool want_dbias=False)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dposition_keys, Tensor dposition_queries)",
}
TRITON_OPS = {
    f"{name}_{direction}": name
    for name in (
        "axial_attention", "causal_flow_attention", "chunk_hybrid_attention", "factorized_attention", "flow_attention",
        "linear_attention", "selective_scan", "varlen_attention",
    )
    for direction in ("fwd", "bwd")
} | {
    "axial_attention_qkvpacked_bwd": "axial_attention",
    "causal_flow_attention_bwd": "causal_flow_attention_bwd",
    "flow_attention_bwd": "flow_attention_bwd",
    **{f"flow_affine_{part}": "flow_affine" for part in ("fwd", "bwd", "inv")},
    "grid_retention_fwd": "grid_retention",
    "varlen_attention_bwd": "varlen_attention_bwd",
    "varlen_attention_disentangled_fwd": "disentangled_attention",
    "varlen_attention_disentangled_bwd": "disentangled_attention_bwd",
}  # fmt: skip

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
