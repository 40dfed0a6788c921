"""What the kernels of a decode step share: the residual stream, norms, what follows a product, and the launch order.

Between two products the residual stream is a tensor and `PARTS` partial sums of what the last product adds to it.
Whoever needs the stream adds them up, in order, and one program writes the sum down: a product split along its depth
needs neither atomics nor a kernel of its own to finish, and a norm of the added part has its whole row at hand.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """With programmatic launches the next kernel starts once all programs were here, and waits in `wait_for_last`."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(EARLY: tl.constexpr):
    """Until the kernel before is through. Nothing but weights may be read above it, and nothing written."""
    if EARLY:
        gdc_wait()


@triton.jit
def depth(first, BK: tl.constexpr):
    """first .. first + BK - 1, four of them a thread: half-precision weights and the float32 rows they meet then lie
    in the same threads, and neither has to pass through shared memory."""
    return first + tl.max_contiguous(tl.arange(0, BK), 4)


@triton.jit
def norm_weights(norm, at, WIDTH: tl.constexpr):
    """(weight, bias) at `at` (K), the bias 0 where there is none."""
    weight = tl.load(norm[0] + at, mask=at < WIDTH, other=0.0)
    bias = tl.zeros_like(weight)
    if norm[1] is not None:
        bias = tl.load(norm[1] + at, mask=at < WIDTH, other=0.0)
    return weight, bias


@triton.jit
def normalise(x, live, norm, WIDTH: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr):
    """Rows of x (..., 1, K), 0 outside `live`, over the last dim. norm: of norm_weights."""
    weight, bias = norm
    if not RMS:
        x = tl.where(live, x - (tl.sum(x, 2) / WIDTH)[:, :, None], 0.0)
    x *= tl.rsqrt((tl.sum(x * x, 2) / WIDTH)[:, :, None] + EPS)
    x *= weight.to(tl.float32)[None, None, :]
    return tl.where(live, x + bias.to(tl.float32)[None, None, :], 0.0)


@triton.jit
def stream_rows(
    stream, parts, post, row, rows, at, WIDTH: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr
):  # fmt: skip
    """(the residual stream of `row` (R) as (R, 1, K), its offsets, which of them exist), with what was added last."""
    live = (row < rows)[:, None, None] & (at < WIDTH)[None, None, :]
    offsets = row[:, None, None] * WIDTH + at[None, None, :]
    x = tl.load(stream + offsets, mask=live, other=0.0)
    if PARTS > 0:
        added = tl.load(parts + offsets, mask=live, other=0.0)
        for part in tl.static_range(1, PARTS):
            added += tl.load(parts + part * rows * WIDTH + offsets, mask=live, other=0.0)
        if post[0] is not None:
            added = normalise(added, live, post, WIDTH, EPS, RMS)
        x += added
    return x, offsets, live


@triton.jit
def add_bias(y, bias, n, N: tl.constexpr):
    """y (R, BN) of the columns n."""
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh y) is x sigmoid(2 y)."""
    y = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * y))


@triton.jit
def store_heads(
    y, row, rows, n, rope, slot, q, keys, values, slots, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Queries to q (S, H d) in float32, keys and values to their slot of the cache (S, Hkv, slots, d).

    y (R, BN): the columns n of a QKV product, all of one head or of whole heads, of which queries and keys are turned.
    """
    R: tl.constexpr = y.shape[0]
    BN: tl.constexpr = y.shape[1]
    cos, sin = rope
    if cos is not None:
        half = slot * (D // 2) + (n % D) // 2
        turned = n < (HEADS + KV_HEADS) * D
        even_n = tl.reshape(half, (BN // 2, 2))
        pair, _ = tl.split(even_n)
        c = tl.load(cos + pair).to(tl.float32)[None, :]
        s = tl.load(sin + pair).to(tl.float32)[None, :]
        even, odd = tl.split(tl.reshape(y, (R, BN // 2, 2)))
        rotated = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (R, BN))
        y = tl.where(turned[None, :], rotated, y)
    head = n // D
    live = (row < rows)[:, None]
    asks = head < HEADS
    tl.store(q + row[:, None] * (HEADS * D) + n[None, :], y, mask=live & asks[None, :])
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    own = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
    to = ((row.to(tl.int64) * KV_HEADS)[:, None] + own[None, :]) * slots + slot
    to = to * D + (n % D)[None, :]
    y = y.to(keys.dtype.element_ty)
    tl.store(keys + to, y, mask=live & is_key[None, :])
    tl.store(values + to, y, mask=live & is_value[None, :])
