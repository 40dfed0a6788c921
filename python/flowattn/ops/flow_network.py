"""A flow block's network over a static cache of keys and values: in C++ on a CPU, in plain torch anywhere.

Both run a window of steps for each sample, `window(tokens, lo, hi, width)`, and write its keys and values in place; the
next window overwrites or follows them. Nothing grows, and nothing is concatenated.
"""

from typing import NamedTuple

import torch

from flowattn import checks
from flowattn._library import fake, op
from flowattn.reference import flow_affine
from flowattn.reference import flow_inverse as reference

_pack, _window, _sequential = op("flow_pack"), op("flow_window"), op("flow_sequential")
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
    sequential = None  # or a method that does all steps itself: (tokens, z, guidance, begin, rule, what, clamp) -> info

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
    attention = staticmethod(reference.attention)

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
            memory = (self.keys, self.values, steps, valid, used)
            return reference.window(self.block, tokens, self.conditions, *memory, self.attention)


class _Packed:
    """Weights as the kernel reads them, in the order of csrc/cpu/flow_inverse.cpp: products as panels of 64 columns,
    each (depth, 64), biases and norms one after the other."""

    def __init__(self, work):
        self.work, self.products, self.vectors = work, [], []

    def linear(self, layer):
        self.products.append(layer.weight.detach())
        columns = layer.weight.shape[0]
        self.vectors.append(layer.weight.new_zeros(columns) if layer.bias is None else layer.bias.detach())

    def norm(self, norm):
        if norm is not None:
            weight = norm.weight.detach()
            self.vectors += [weight, torch.zeros_like(weight) if norm.bias is None else norm.bias.detach()]

    def tensors(self):
        sizes = [-(-w.shape[0] // _PANEL) * _PANEL * w.shape[1] for w in self.products]
        packed, offset = torch.empty(sum(sizes), dtype=self.work), 0
        for weight, size in zip(self.products, sizes):
            if torch.float64 in (self.work, weight.dtype):
                weight = weight.to(self.work)
            _pack(weight.contiguous(), packed, offset)
            offset += size
        return packed, torch.cat([vector.to(self.work) for vector in self.vectors])


class NativeNetwork(Network):
    native = True

    def __init__(self, block, z, conditions, cache=None):
        super().__init__(block, z, conditions, cache)
        spec, first, work = block.spec, block.layers[0], z.dtype
        packed = _Packed(work)
        packed.linear(block.proj_in)
        for layer in block.layers:
            packed.norm(layer.norm1), packed.linear(layer.qkv), packed.norm(layer.q_norm), packed.norm(layer.k_norm)
            packed.linear(layer.proj), packed.norm(layer.post1), packed.norm(layer.norm2)
            if layer.gate is not None:
                packed.linear(layer.gate)
            packed.linear(layer.up), packed.linear(layer.down), packed.norm(layer.post2)
        packed.norm(block.final_norm), packed.linear(block.proj_out)
        # enum Config in csrc/cpu/flow_inverse.cpp
        config = [block.width, block.features, block.proj_out.weight.shape[0], spec.heads, spec.kv_heads, spec.head_dim]
        config += [first.up.weight.shape[0], len(block.layers), spec.norm == "rms", spec.mlp == "gated"]
        config += [first.q_norm is not None, first.post1 is not None, block.final_norm is not None, block.first]

        def dense(x):
            return None if x is None else x.detach().to(work).contiguous()

        rope = None if block.rope is None else dense(torch.stack([part[: self.slots] for part in block.rope]))
        self.arguments = (
            *packed.tensors(), torch.tensor(config), dense(conditions.positions), dense(conditions.cond),
            dense(conditions.prefix), rope, dense(block.start), dense(conditions.scale), self.keys, self.values,
        )  # fmt: skip

    def shaped(self, part):
        spec, rows = self.block.spec, self.batch * self.conditions.streams
        return part[: len(self.block.layers) * rows * spec.kv_heads * self.slots * spec.head_dim]

    def window(self, tokens, lo, hi, width):
        outputs = self.block.proj_out.weight.shape[0]
        eps = self.block.spec.eps
        return _window(tokens, *self.arguments, lo.contiguous(), hi.contiguous(), width, outputs, eps)

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


@fake("flow_pack")
def _pack_fake(weight, packed, offset):
    return None


@fake("flow_window")
def _window_fake(tokens, weights, vectors, config, positions, cond, prefix, rope, start, scale, keys, values, lo, hi,
                 width, outputs, eps):  # fmt: skip
    return tokens.new_empty((scale.shape[0], width, outputs))


@fake("flow_sequential")
def _sequential_fake(tokens, *rest):
    return tokens.new_empty((tokens.shape[0], 4), dtype=torch.float64)
