"""Which method inverts a block fastest: measured sweeps, the cost model, and the published ranking metrics."""

import time
from typing import NamedTuple

import torch

from flowattn import checks
from flowattn.ops import flow_block
from flowattn.ops.flow_inverse import BlockPlan, flow_forward, flow_inverse
from flowattn.reference import flow_affine as columns
from flowattn.reference import flow_inverse as reference

WINDOWS, SEGMENTS = (8, 16, 32, 64, 128), (2, 4, 8)
MARGIN = 0.9  # a sweeping method must promise this part of the sequential time: sweeps vary from batch to batch


class Measured(NamedTuple):
    """What one method took on the calibration batch."""

    plan: BlockPlan
    sweeps: int  # of the slowest sample
    rows: float  # tokens through the network, mean over the samples


class Calibration(NamedTuple):
    """What `calibrate` found out about one block. Metrics: see `crm` and `igm`."""

    tokens: int
    measured: tuple  # of Measured; the first is Jacobi
    crm: float
    igm: dict  # guess -> value


class Rates(NamedTuple):
    """What this device reaches on this kind of block."""

    bytes: float  # a second, weights and cache of single steps
    flops: float  # a second, many tokens at once
    launch: float  # seconds of a sweep besides


@torch.no_grad()
def calibrate(block, x, *, permutation=None, cond=None, prefix=None, windows=WINDOWS, segments=SEGMENTS, **tolerances):
    """Invert the block's own output on data x (B, T, D) by every sweeping method; (Calibration, z of the next block).

    tolerances: atol, rtol, commit of flow_inverse. Cost: about ten inverses of the batch.
    """
    options = {"permutation": permutation, "cond": cond, "prefix": prefix}
    z, _ = flow_forward(x, block, **options)
    metrics = {guess: igm(block, x, guess, **options) for guess in ("z", "zero")}
    guess = min(metrics, key=metrics.get)
    steps = flow_block.block_of("calibrate", block).steps(x.shape[1])
    plans = [BlockPlan("jacobi", guess=guess)]
    plans += [BlockPlan("gs_jacobi", count, guess=guess) for count in segments if 1 < count < steps]
    plans += [BlockPlan("frontier", window=window, guess=guess) for window in windows if 1 < window <= max(steps, 2)]
    measured = []
    for candidate in plans:
        _, info = flow_inverse(z, block, plan=candidate, return_info=True, **options, **tolerances)
        measured.append(Measured(candidate, int(info.sweeps.max()), float(info.rows.double().mean())))
    return Calibration(x.shape[1], tuple(measured), crm(block, x, **options), metrics), z


def cost(block, rates, sweeps, rows, batch, tokens, launches):
    """Seconds of `sweeps` passes that bring `rows` tokens of each of `batch` samples through the block.

    A pass reads the weights and on average half of the cache once, and multiplies every row by the weights.
    """
    block = flow_block.block_of("cost", block)
    weights, spec, layers = block.weight_numbers(), block.spec, len(block.layers)
    size = block.proj_in.weight.element_size()
    cached = tokens / 2
    read = size * (weights + 2 * batch * layers * spec.kv_heads * spec.head_dim * cached)
    flops = batch * rows * (2 * weights + 4 * layers * spec.heads * spec.head_dim * cached)
    return max(sweeps * read / rates.bytes, flops / rates.flops) + launches * rates.launch


def plan(block, calibration, rates, batch):
    """The BlockPlan of least cost for `batch` samples. Deterministic in its arguments."""
    steps = flow_block.block_of("plan", block).steps(calibration.tokens)
    arguments = (batch, calibration.tokens)
    best, least = BlockPlan(), MARGIN * cost(block, rates, steps, steps, *arguments, 0)
    for found in calibration.measured:
        seconds = cost(block, rates, found.sweeps, found.rows, *arguments, found.sweeps)
        if seconds < least:
            best, least = found.plan, seconds
    return best


_rates = {}


@torch.no_grad()
def measure_rates(block, z, repeats=3):
    """Rates of this device for blocks of this size; z (B, T, D), of which the shape matters. Remembered.

    Times a sequential inverse, a sweep over all tokens, and sweeps over one token; the best of `repeats` each.
    """
    weights = flow_block.block_of("measure_rates", block)
    kind = (z.device, z.shape[1:], weights.spec, weights.width, len(weights.layers), torch.get_num_threads())
    if kind in _rates:
        return _rates[kind]
    steps = weights.steps(z.shape[1])
    noise = torch.zeros_like(z[:1])
    many = noise.expand(8, -1, -1)

    def seconds(z, **options):
        times = []
        for _ in range(repeats + 1):
            if z.is_cuda:
                torch.cuda.synchronize(z.device)
            start = time.perf_counter()
            flow_inverse(z, block, **options)
            if z.is_cuda:
                torch.cuda.synchronize(z.device)
            times.append(time.perf_counter() - start)
        return max(min(times[1:]), 1e-7)

    if steps < 2:
        return Rates(1e10, 1e11, 1e-4)
    unit = Rates(1.0, 1.0, 0.0)
    nothing = seconds(noise, method="jacobi", max_sweeps=0)
    one = max((seconds(noise, method="sequential") - nothing) / steps, 1e-7)
    sweep = max(seconds(many, method="jacobi", max_sweeps=1) - nothing, 1e-7)
    some = min(8, steps)
    single = (seconds(noise, method="frontier", window=1, max_sweeps=some) - nothing) / some
    read = cost(block, unit._replace(flops=float("inf")), 1, 1, 1, z.shape[1], 0)
    flops = cost(block, unit._replace(bytes=float("inf")), 1, steps, 8, z.shape[1], 0)
    _rates[kind] = Rates(read / one, flops / sweep, max(single - one, 1e-6))
    return _rates[kind]


def _maps(block, v, x, permutation, cond, prefix):
    """(log sigma, mu) at the tokens v, both (B, T, D) in the order of the block, 0 where a token passes unchanged."""
    conditions = flow_block.conditions("igm", block, x, permutation, cond, None, prefix, None, 1.0, False)
    if not block.steps(x.shape[1]):
        return torch.zeros_like(x), torch.zeros_like(x)
    raw = reference.parallel(block, v, conditions)
    maps = columns.split(raw, x.shape[2], block.spec.scale, block.spec.soft_clip)
    return [torch.nn.functional.pad(part, (0, 0, block.first, 0)) for part in maps]


def _ordered(block, x, permutation):
    block = flow_block.block_of("igm", block)
    flow_block.check_block("igm", block, x)
    permutation = flow_block.permutation_of("igm", permutation, x)
    return block, flow_block.permute(x.to(checks.state_dtype(x)), permutation).contiguous(), permutation


def _norm(maps, mean_of_norms):
    """The spectral norm of the mean over samples, or the mean of their norms."""
    matrices = maps if mean_of_norms else maps.mean(0, keepdim=True)
    return float(torch.linalg.matrix_norm(matrices, 2).mean())


@torch.no_grad()
def igm(block, x, guess="z", *, permutation=None, cond=None, prefix=None, mean_of_norms=False):
    """The initial-guess metric: the error after one sweep from guess "z" or "zero", over data x (B, T, D).

    || mean over samples of (z sigma(v) + mu(v) - x) ||_2, a T x D matrix; errors of opposite sign cancel in that mean,
    as published. mean_of_norms=True averages the norms instead. Source: Liu and Qin 2025, section 3.3.
    """
    block, u, permutation = _ordered(block, x, permutation)
    log_scale, mu = _maps(block, u, u, permutation, cond, prefix)
    z = (u - mu) * torch.exp(-log_scale)
    v = z if guess == "z" else torch.zeros_like(z)
    v[:, : block.first] = u[:, : block.first]
    log_scale, mu = _maps(block, v, u, permutation, cond, prefix)
    return _norm(z * torch.exp(log_scale) + mu - u, mean_of_norms)


@torch.no_grad()
def crm(block, x, *, permutation=None, cond=None, prefix=None, mean_of_norms=False):
    """The convergence-ranking metric: || mean of x / sigma ||_2 ||W_alpha||_2 + ||W_mu||_2 over data x (B, T, D).

    W_alpha, W_mu: the rows of the output layer for scales and means. A block with most of the sum over the blocks is
    the one that takes many sweeps. mean_of_norms: as igm. Source: Liu and Qin 2025, section 3.2.
    """
    block, u, permutation = _ordered(block, x, permutation)
    log_scale, _ = _maps(block, u, u, permutation, cond, prefix)
    weight = block.proj_out.weight.to(u.dtype)
    w_alpha, w_mu = weight[: -u.shape[2]], weight[-u.shape[2] :]
    norms = [float(torch.linalg.matrix_norm(part, 2)) if part.numel() else 0.0 for part in (w_alpha, w_mu)]
    return _norm(u * torch.exp(-log_scale), mean_of_norms) * norms[0] + norms[1]


def shares(values):
    """Each of the values in percent of their sum."""
    total = sum(values) or 1.0
    return [100 * value / total for value in values]
