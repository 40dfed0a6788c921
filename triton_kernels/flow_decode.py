"""A decode step of a flow block: one token of every row through all layers, as launches over memory that never moves.

The position is in device memory, so that the same launches, or a CUDA graph of them, do every step. A layer takes five
kernels with few rows: norm and QKV; attention; merge and output product; norm, up and GELU; down. With many rows the
norms are kernels of their own. Norms of heads take one more. See flow_decode_device.py for the residual stream.
"""

import functools
from typing import NamedTuple

import torch
import triton

from . import flow_decode_configs as configs
from .flow_decode_attention import flow_decode_attention_kernel, flow_decode_heads_kernel, flow_decode_merge_kernel
from .flow_decode_ends import flow_decode_begin_kernel, flow_decode_end_kernel
from .flow_decode_few import (
    flow_decode_down_kernel,
    flow_decode_proj_kernel,
    flow_decode_qkv_kernel,
    flow_decode_up_kernel,
)
from .flow_decode_many import (
    flow_decode_add_many_kernel,
    flow_decode_norm_kernel,
    flow_decode_qkv_many_kernel,
    flow_decode_up_many_kernel,
)
from .launch import Launcher

_begin, _end = Launcher(flow_decode_begin_kernel), Launcher(flow_decode_end_kernel)
_qkv, _proj = Launcher(flow_decode_qkv_kernel), Launcher(flow_decode_proj_kernel)
_up, _down = Launcher(flow_decode_up_kernel), Launcher(flow_decode_down_kernel)
_norm, _qkv_many = Launcher(flow_decode_norm_kernel), Launcher(flow_decode_qkv_many_kernel)
_up_many, _add_many = Launcher(flow_decode_up_many_kernel), Launcher(flow_decode_add_many_kernel)
_heads, _attention = Launcher(flow_decode_heads_kernel), Launcher(flow_decode_attention_kernel)
_merge = Launcher(flow_decode_merge_kernel)


class Affine(NamedTuple):
    """From raw outputs to tokens; see flow_affine_inverse."""

    guidance: torch.Tensor | None  # (B, T), with two streams
    rule: int  # index into reference.flow_affine.RULES
    what: str
    softplus: bool
    soft_clip: float
    clamp: float | None


def _signature(arguments):
    """What of the arguments changes the compiled code: types, alignments, and what is left out."""
    return tuple(
        _signature(x) if isinstance(x, tuple)
        else (x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor)
        else x is None
        for x in arguments
    )  # fmt: skip


NO_NORM = (None, None)  # in the place of a norm's weight and bias


def _plain(arguments):
    """Named tuples as tuples, which is what Triton takes."""
    return tuple(_plain(x) if isinstance(x, tuple) else x for x in arguments)


class FlowDecode:
    """The launches of a step of `block` (a FlowBlock) for tokens and z (B, T, D), contiguous float32.

    keys, values (layers, S, Hkv, slots, d) hold the prefix and the steps before `begin`. A call does one step: it
    writes the next token and moves on. Nothing is allocated by a call.
    """

    def __init__(self, block, conditions, tokens, z, keys, values, begin, affine, early, config=None):
        self.config = config = config or configs.DEFAULT
        self.block, self.affine, self.early = block, affine, early and config.early
        self.fetch = self.early and config.fetch
        self.keys, self.values, self.prefix = keys, values, conditions.prefix_length
        device, spec, layers = tokens.device, block.spec, block.layers
        self.batch, self.length, self.features = tokens.shape
        self.rows, self.width = self.batch * conditions.streams, block.width
        self.hidden_width, self.inner = layers[0].up.weight.shape[0], spec.heads * spec.head_dim
        self.few = self.rows <= config.few
        self.dtype = torch.float32 if self.few else layers[0].qkv.weight.dtype  # of what products read
        self.norms = (spec.eps, spec.norm == "rms")
        self.launches = []

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=device)

        self.position = torch.full((2,), begin, dtype=torch.int64, device=device)
        self.streams = [empty(self.rows, self.width) for _ in range(2)]
        self.parts = empty(configs.MOST_PARTS, self.rows, self.width)
        self.hidden = empty(self.rows, self.hidden_width, dtype=self.dtype)
        self.q = empty(self.rows, self.inner)
        columns = self.inner + 2 * spec.kv_heads * spec.head_dim
        self.raw = None if layers[0].q_norm is None else empty(self.rows, columns)
        self.rope = (None, None) if block.rope is None else block.rope
        self.splits = configs.splits(config, self.rows * spec.kv_heads, self.few)
        merges = self.few or self.splits > 1
        self.pieces = empty(self.splits, self.rows, self.inner) if merges else None
        self.lse = empty(self.splits, self.rows, self.inner) if merges else None
        if not self.few:
            self.x, self.seen = (empty(self.rows, n, dtype=self.dtype) for n in (self.width, self.inner))
        feature_block = configs.feature_block(self.features, self.width)
        self.info = torch.zeros(self.batch, triton.cdiv(self.features, feature_block), 4, device=device)
        self.info[..., 0], self.info[..., 1] = float("inf"), float("-inf")

        self._add_steps(tokens, z, conditions, feature_block)

    def _add_steps(self, tokens, z, conditions, feature_block):
        self._add_begin(tokens, conditions)
        added, post = 0, NO_NORM
        for number, layer in enumerate(self.block.layers):
            attend, mlp = (self._few_attend, self._few_mlp) if self.few else (self._many_attend, self._many_mlp)
            added = attend(number, layer, conditions.scale, added, post)
            added, post = mlp(layer, added), layer.post2 or NO_NORM
        self._add_end(tokens, z, feature_block, added, post)

    def __call__(self):
        for launch in self.launches:
            launch()

    def _add(self, launcher, programs, arguments, constants, tile, warps=4, stages=1):
        options = {"launch_pdl": True} if self.early else {}
        arguments = _plain(arguments)
        call = (programs, _signature(arguments), arguments, constants, (*tile, warps, stages))
        self.launches.append(functools.partial(launcher, *call, **options))

    def _add_begin(self, tokens, conditions):
        block, positions, features = self.block, conditions.positions, self.features
        strides = (0, 0)
        if positions is not None:
            strides = (positions.stride(0) if positions.shape[0] > 1 else 0, positions.stride(1))
        tile = (min(configs.power(self.width), 64), min(configs.power(features), 64))
        self._add(
            _begin,
            self.rows * triton.cdiv(self.width, tile[0]),
            (tokens, block.start, *block.proj_in, positions, conditions.cond, self.streams[0], self.position,
             self.length, self.batch, *strides),
            (self.width, features, block.first, self.early),
            tile,
        )  # fmt: skip

    def _add_end(self, tokens, z, feature_block, added, post):
        block, affine, guidance = self.block, self.affine, self.affine.guidance
        scales = block.proj_out.weight.shape[0] == 2 * self.features
        strides = (0, 0) if guidance is None else guidance.stride()
        numbers = (self.rows, self.batch, self.length, *strides, float(affine.clamp or 0.0), float(affine.soft_clip))
        self._add(
            _end,
            self.batch * self.info.shape[1],
            (self.streams[0], self.parts, post, block.final_norm or NO_NORM, *block.proj_out, z, guidance, tokens,
             self.info, self.position, *numbers),
            (self.width, self.features, scales, block.first, added, affine.rule, "a" in affine.what,
             "b" in affine.what, affine.softplus, affine.soft_clip > 0, affine.clamp is not None, *self.norms,
             self.early),
            (configs.power(self.width), feature_block),
        )  # fmt: skip

    def _cache(self, number):
        return self.keys[number], self.values[number], self.rows, self.keys.shape[3], self.prefix

    def _heads(self):
        spec = self.block.spec
        return spec.heads, spec.kv_heads, spec.head_dim

    def _add_attention(self, number, layer, scale):
        """Norms of heads where there are any, attention, and the shares put together with many rows."""
        heads, kv_heads, head_dim = self._heads()
        cache = self._cache(number)
        if self.raw is not None:
            arguments = (self.raw, layer.q_norm, layer.k_norm, self.rope, self.position, self.q, *cache)
            programs = self.rows * (heads + 2 * kv_heads)
            self._add(_heads, programs, arguments, (*self._heads(), *self.norms, self.early), (), 1)
        more = 2 if self.rows >= self.config.crowd else 1
        tile = configs.attention_tile(more * self.config.keys, heads // kv_heads, head_dim)
        programs = self.rows * kv_heads * triton.cdiv(heads // kv_heads, tile[0]) * self.splits
        out = self.seen if self.pieces is None else self.pieces
        arguments = (self.q, *cache[:2], scale, self.position, out, self.lse, *cache[2:])
        constants = (*self._heads(), self.splits, self.early)
        self._add(_attention, programs, arguments, constants, tile, more * self.config.attention_warps)
        if not self.few and self.pieces is not None:
            arguments = (self.pieces, self.lse, self.seen, self.rows)
            self._add(_merge, self.rows * heads, arguments, (heads, head_dim, self.splits, self.early), (), 1)

    def _qkv_arguments(self, number, layer):
        return (*layer.qkv, self.rope, self.position, self.raw, self.q, *self._cache(number))

    def _few_tile(self, columns, depth, depths=1):
        """(R, BK, BN), and warps."""
        rows = configs.power(self.rows)
        columns = configs.few_columns(self.config, columns, depth, depths)
        return (rows, depth, columns), configs.few_warps(self.config, columns, depth)

    def _few_attend(self, number, layer, scale, added, post):
        """Adds the launches; returns the parts that the layer's attention leaves to be added."""
        heads, kv_heads, head_dim = self._heads()
        columns, inner = (heads + 2 * kv_heads) * head_dim, self.inner
        tile, warps = self._few_tile(columns, configs.power(self.width))
        arguments = (*self.streams, self.parts, post, layer.norm1, *self._qkv_arguments(number, layer))
        constants = (self.width, *self._heads(), added, *self.norms, self.early)
        self._add(_qkv, triton.cdiv(columns, tile[2]), arguments, constants, tile, warps)
        self._add_attention(number, layer, scale)
        depth = configs.few_depth(inner)
        depths = triton.cdiv(inner, depth)
        tile, warps = self._few_tile(self.width, depth, depths)
        arguments = (self.pieces, self.lse, *layer.proj, self.parts, self.rows)
        constants = (self.width, heads, head_dim, self.splits, self.early)
        self._add(_proj, triton.cdiv(self.width, tile[2]) * depths, arguments, constants, tile, warps)
        return depths

    def _few_mlp(self, layer, added):
        hidden = self.hidden_width
        tile, warps = self._few_tile(hidden, configs.power(self.width))
        gate = (None, None) if layer.gate is None else layer.gate
        streams = (self.streams[1], self.streams[0], self.parts, layer.post1 or NO_NORM, layer.norm2)
        constants = (self.width, hidden, added, *self.norms, self.early)
        arguments = (*streams, *layer.up, *gate, self.hidden, self.rows)
        self._add(_up, triton.cdiv(hidden, tile[2]), arguments, constants, tile, warps)
        depth = configs.few_depth(hidden)
        depths = triton.cdiv(hidden, depth)
        tile, warps = self._few_tile(self.width, depth, depths)
        arguments = (self.hidden, *layer.down, self.parts, self.rows)
        constants = (self.width, hidden, self.early)
        self._add(_down, triton.cdiv(self.width, tile[2]) * depths, arguments, constants, tile, warps)
        return depths

    def _many_tile(self):
        """(BM, BN, BK), and the tiles of rows."""
        tile = (min(max(configs.power(self.rows), 16), 64), self.config.columns, self.config.depth)
        return tile, triton.cdiv(self.rows, tile[0])

    def _add_norm(self, streams, post, norm, added):
        arguments = (*streams, self.parts, post, norm, self.x, self.rows)
        constants = (self.width, added, *self.norms, self.early)
        self._add(_norm, self.rows, arguments, constants, (configs.power(self.width),))

    def _add_product(self, x, linear, depth):
        """x (S, depth) times weights, as parts of what is added to the stream; their number."""
        tile, row_tiles = self._many_tile()
        chunk = configs.many_depth(self.config, row_tiles, self.width, depth)
        depths = triton.cdiv(depth, chunk)
        programs = row_tiles * triton.cdiv(self.width, tile[1]) * depths
        constants = (self.width, depth, chunk, configs.precision(self.dtype), self.early, self.fetch)
        self._add(_add_many, programs, (x, *linear, self.parts, self.rows), constants, tile, 4, self.config.stages)
        return depths

    def _many_attend(self, number, layer, scale, added, post):
        heads, kv_heads, head_dim = self._heads()
        self._add_norm(self.streams, post, layer.norm1, added)
        tile, row_tiles = self._many_tile()
        programs = row_tiles * triton.cdiv((heads + 2 * kv_heads) * head_dim, tile[1])
        constants = (self.width, *self._heads(), configs.precision(self.dtype), self.early, self.fetch)
        arguments = (self.x, *self._qkv_arguments(number, layer))
        self._add(_qkv_many, programs, arguments, constants, tile, 4, self.config.stages)
        self._add_attention(number, layer, scale)
        return self._add_product(self.seen, layer.proj, self.inner)

    def _many_mlp(self, layer, added):
        self._add_norm(self.streams[::-1], layer.post1 or NO_NORM, layer.norm2, added)
        tile, row_tiles = self._many_tile()
        gate = (None, None) if layer.gate is None else layer.gate
        programs = row_tiles * triton.cdiv(self.hidden_width, tile[1])
        constants = (self.width, self.hidden_width, configs.precision(self.dtype), self.early, self.fetch)
        arguments = (self.x, *layer.up, *gate, self.hidden, self.rows)
        self._add(_up_many, programs, arguments, constants, tile, 4, self.config.stages)
        return self._add_product(self.hidden, layer.down, self.hidden_width)
