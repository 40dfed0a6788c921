"""A flow block's network over a static cache of keys and values: in C++ on a CPU, in plain torch anywhere.

Both run a window of steps for each sample, `window(tokens, lo, hi, width)`, and write its keys and values in place; the
next window overwrites or follows them. Nothing grows, and nothing is concatenated.
"""

from typing import NamedTuple

import torch

from flowattn import checks
from flowattn._library import op
from flowattn.reference import flow_affine
from flowattn.reference import flow_inverse as reference

_window, _sequential = op("flow_window"), op("flow_sequential")
_PANEL = 64  # kFlowPanel in csrc/cpu/flow_inverse.h
_NAME = "flow_inverse"


class FlowCache(NamedTuple):
    """Memory for keys and values that several calls may share, one after the other; see flow_cache."""

    keys: torch.Tensor  # flat
    values: torch.Tensor

    @property
    def bytes(self):
        return 2 * self.keys.numel() * self.keys.element_size()


def cache_numbers(block, batch, tokens, streams=1, prefix=0):
    """Numbers of keys; as many of values."""
    spec = block.spec
    slots = prefix + block.steps(tokens) + 1  # one more than steps: see reference.window
    return len(block.layers) * batch * streams * spec.kv_heads * slots * spec.head_dim


def cache_dtype(block, work, native):
    """Keys and values have the type of the products: the weights', except where those are widened."""
    dtype = block.proj_in.weight.dtype
    return dtype if dtype in reference.HALF and work != torch.float64 and not native else work


def flow_cache(block, batch, tokens, *, streams=1, prefix=0, dtype=None, device=None):
    """A FlowCache for flow_inverse(..., cache=): fits `batch` samples of `tokens` tokens, and whatever is smaller.

    streams: 2 with guidance. prefix: conditioning tokens in front. dtype: by default
        that of half-precision weights, else float32; pass float64 for float64 z, float32 on a CPU.
    """
    dtype = cache_dtype(block, torch.float32, False) if dtype is None else dtype
    numbers = cache_numbers(block, batch, tokens, streams, prefix)
    device = block.proj_in.weight.device if device is None else device
    return FlowCache(*(torch.empty(numbers, dtype=dtype, device=device) for _ in range(2)))


class Network:
    """What the solvers need of a block under given conditions, for tokens like `z` (B, T, D)."""

    native = False

    def __init__(self, block, z, conditions, cache=None):
        self.block, self.conditions = block, conditions
        self.batch, self.tokens = z.shape[:2]
        self.steps, self.first = block.steps(self.tokens), block.first
        self.slots = conditions.prefix_length + self.steps
        dtype = cache_dtype(block, z.dtype, self.native)
        numbers = cache_numbers(block, self.batch, self.tokens, conditions.streams, conditions.prefix_length)
        if cache is None:
            cache = FlowCache(*(torch.empty(numbers, dtype=dtype, device=z.device) for _ in range(2)))
        got = f"{cache.keys.numel()} of {cache.keys.dtype}"
        fits = cache.keys.numel() >= numbers and cache.keys.dtype == dtype and cache.keys.device == z.device
        checks.require(fits, _NAME, f"cache must hold {numbers} numbers of {dtype}", got, "make it with flow_cache")
        self.cache_bytes = 2 * numbers * cache.keys.element_size()
        self.keys, self.values = (self.shaped(part) for part in cache)

    def prefill(self, tokens, end=0):
        """Keys and values of the prefix and of the steps before `end`, in one window."""
        begin = -self.conditions.prefix_length
        if begin < end:
            lo, hi = (torch.full((self.batch,), x, dtype=torch.int64, device=tokens.device) for x in (begin, end))
            self.window(tokens, lo, hi, end - begin)


class ReferenceNetwork(Network):
    def shaped(self, part):
        spec, rows = self.block.spec, self.batch * self.conditions.streams
        shape = (len(self.block.layers), rows, spec.kv_heads, self.slots + 1, spec.head_dim)
        return part[: torch.Size(shape).numel()].view(shape)

    def window(self, tokens, lo, hi, width):
        """Raw outputs (S, width, 2D) of steps lo .. hi of each sample; what lies beyond hi is unspecified."""
        steps = lo.unsqueeze(1) + torch.arange(width, device=lo.device)
        valid = steps < hi.unsqueeze(1)
        used = self.slots  # all of them where asking would need a host sync
        if tokens.device.type == "cpu" and hi.numel():
            used = max(min(int(hi.max()) + self.conditions.prefix_length, self.slots), 1)
        with torch.autocast(tokens.device.type, enabled=False):
            return reference.window(self.block, tokens, self.conditions, self.keys, self.values, steps, valid, used)


def _linear(layer):
    """A product as its panels (columns / 64, depth, 64), zeros behind the last column, and its bias."""
    columns, depth = layer.weight.shape
    weight = torch.nn.functional.pad(layer.weight, (0, 0, 0, -columns % _PANEL))
    panels = weight.view(-1, _PANEL, depth).transpose(1, 2)
    return [panels, weight.new_zeros(columns) if layer.bias is None else layer.bias]


def _norm(norm):
    return [] if norm is None else [norm.weight, torch.zeros_like(norm.weight) if norm.bias is None else norm.bias]


class NativeNetwork(Network):
    native = True

    def __init__(self, block, z, conditions, cache=None):
        super().__init__(block, z, conditions, cache)
        parts = _linear(block.proj_in)
        for layer in block.layers:
            parts += _norm(layer.norm1) + _linear(layer.qkv) + _norm(layer.q_norm) + _norm(layer.k_norm)
            parts += _linear(layer.proj) + _norm(layer.post1) + _norm(layer.norm2)
            parts += [] if layer.gate is None else _linear(layer.gate)
            parts += _linear(layer.up) + _linear(layer.down) + _norm(layer.post2)
        parts += _norm(block.final_norm) + _linear(block.proj_out)
        spec, layer, work = block.spec, block.layers[0], z.dtype
        # CONFIG: enum Config in csrc/cpu/flow_inverse.cpp
        config = [block.width, block.features, block.proj_out.weight.shape[0], spec.heads, spec.kv_heads, spec.head_dim]
        config += [layer.up.weight.shape[0], len(block.layers), spec.norm == "rms", spec.mlp == "gated"]
        config += [layer.q_norm is not None, layer.post1 is not None, block.final_norm is not None, block.first]
        weights = torch.cat([part.detach().to(work).reshape(-1) for part in parts])

        def dense(x):
            return None if x is None else x.detach().to(work).contiguous()

        rope = None if block.rope is None else dense(torch.stack([part[: self.slots] for part in block.rope]))
        self.arguments = (
            weights, torch.tensor(config), dense(conditions.positions), dense(conditions.cond),
            dense(conditions.prefix), rope, dense(block.start), dense(conditions.scale), self.keys, self.values,
        )  # fmt: skip

    def shaped(self, part):
        spec, rows = self.block.spec, self.batch * self.conditions.streams
        return part[: len(self.block.layers) * rows * spec.kv_heads * self.slots * spec.head_dim]

    def window(self, tokens, lo, hi, width):
        return _window(tokens, *self.arguments, lo.contiguous(), hi.contiguous(), width, self.block.spec.eps)

    def sequential(self, tokens, z, guidance, begin, rule, what, clamp):
        """Overwrite the tokens of the steps from `begin` on; (B, 4) of csrc/cpu/flow_inverse.cpp."""
        spec, which = self.block.spec, flow_affine.RULES.index(rule)
        softplus, guided = spec.scale == "softplus", ("a" in what, "b" in what)
        guidance = guidance.contiguous() if self.conditions.streams == 2 else None
        return _sequential(
            tokens,
            *self.arguments,
            z,
            guidance,
            begin,
            which,
            *guided,
            softplus,
            spec.soft_clip,
            clamp or 0.0,
            spec.eps,
        )
