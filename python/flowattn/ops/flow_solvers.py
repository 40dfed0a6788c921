"""Solvers of x = z sigma(x_<t) + mu(x_<t): token by token, or sweeping over windows of tokens at once.

All sweeping methods are one loop. For each sample, `front` is the first step whose token is not accepted, and a sweep
runs the steps lo .. hi around it. The token at `front` is exact after a sweep, since all it reads is final; so a sweep
accepts at least one token, and no method needs more sweeps than there are steps.

Keys and values that a sweep writes belong to the iterate it read. Those of the steps up to `front` are therefore
final, and the next sweep starts behind them: it recomputes what was accepted by tolerance, from the accepted values
(commit="exact"), and thereby measures |z - F(x)| of the result. commit="stale" skips that.
"""

import enum
from typing import NamedTuple

import torch

from flowattn.ops.flow_affine import affine_inverse
from flowattn.reference import flow_affine as columns


class InverseStatus(enum.IntEnum):
    CONVERGED = 0
    CAP_REACHED = 1  # max_sweeps ended some window before it met the tolerance
    STALLED = 2  # updates stopped falling close above the tolerance: rounding sets the limit
    NONFINITE = 3  # a token that depends on final tokens alone is not finite, or one was at the cap


class Problem(NamedTuple):
    network: object  # ops.flow_network
    z: torch.Tensor  # (B, T, D) in the order of the block, float32 or float64
    guidance: torch.Tensor | None  # (B, T), with two streams
    rule: str
    what: str
    scale: str
    soft_clip: float
    clamp: float | None
    limit: torch.Tensor  # (B,), bound of iterates that are not final

    def affine(self, z, raw, guidance, previous):
        """(new tokens, statistics) from raw outputs (S, n, 2D)."""
        batch = z.shape[0]
        other = raw[batch:] if self.network.conditions.streams == 2 else None
        guidance = None if other is None else guidance
        options = (self.rule, self.what, self.scale, self.soft_clip)
        return affine_inverse(z, raw[:batch], other, guidance, previous, *options)


class Solution(NamedTuple):
    tokens: torch.Tensor
    status: torch.Tensor  # the rest (B,)
    sweeps: torch.Tensor
    rows: torch.Tensor  # steps that ran, counting repetitions
    update: torch.Tensor
    residual: torch.Tensor
    first_bad: torch.Tensor
    max_log_scale: torch.Tensor
    clamped: torch.Tensor
    not_positive: torch.Tensor


class Windows(NamedTuple):
    """Which steps a sweep covers: `size` from the front on, or whole segments: of `size` steps, or up to `ends`."""

    size: int
    segments: bool = False
    ends: torch.Tensor | None = None

    def end(self, front, steps):
        """hi (B,) for the fronts (B,)."""
        if not self.segments:
            return (front + self.size).clamp(max=steps)
        if self.ends is None:
            return ((front // self.size + 1) * self.size).clamp(max=steps)
        return self.ends[torch.searchsorted(self.ends, front, right=True).clamp(max=self.ends.shape[0] - 1)]

    def most(self, steps):
        """Steps that one sweep can cover at most, those repeated for an exact commit included."""
        return min(2 * self.size, steps)


def segments_of(steps, segments, device):
    """Windows of `segments` equal segments, the last one shorter, or of those that end before the given steps."""
    if isinstance(segments, int):
        return Windows(-(-steps // segments), True)
    ends = sorted({min(int(end), steps) for end in segments if end > 0} | {steps})
    return Windows(max(b - a for a, b in zip((0, *ends), ends)), True, torch.tensor(ends, device=device))


class Rule(NamedTuple):
    """When a token counts as settled, and what ends a window early."""

    atol: float
    rtol: float
    criterion: str  # "max": per sample; "fro" and "rel_mse": over the batch, whole windows
    commit: str
    max_sweeps: int | None  # of a segment; of the whole inverse without segments
    patience: int = 3  # sweeps without a fall of the update after which a window near the tolerance has stalled


def sequential(problem, tokens, begin):
    """One step after the other from `begin` on, exact; writes into `tokens`."""
    network, batch = problem.network, tokens.shape[0]
    count = network.steps - begin
    if network.sequential is not None:
        guided = (problem.guidance, begin, problem.rule, problem.what, problem.clamp)
        info = network.sequential(tokens, problem.z, *guided)
    else:
        info = _step_by_step(problem, tokens, begin)
    first_bad = info[:, 0].long()
    status = torch.where(first_bad >= 0, InverseStatus.NONFINITE.value, InverseStatus.CONVERGED.value)
    whole, zero = torch.full((batch,), count, device=tokens.device), tokens.new_zeros(batch)
    rest = (info[:, 1].to(tokens.dtype), info[:, 2].long(), info[:, 3].long())
    return Solution(tokens, status, whole, whole, zero, zero, first_bad, *rest)


def _step_by_step(problem, tokens, begin):
    """The loop in plain torch; on a GPU one step is captured as a CUDA graph, whose position lives on the device."""
    network, (batch, _, features), device = problem.network, tokens.shape, tokens.device
    lo = torch.full((batch,), begin, dtype=torch.int64, device=device)
    hi = lo + 1
    info = torch.zeros(batch, 4, dtype=torch.float64, device=device)
    info[:, 0], info[:, 1] = -1, float("-inf")

    def step():
        target = (lo + network.first).unsqueeze(1)
        index = target.unsqueeze(-1).expand(-1, -1, features)
        guidance = None if problem.guidance is None else problem.guidance.gather(1, target)
        raw = network.window(tokens, lo, hi, 1)
        new, found = problem.affine(problem.z.gather(1, index), raw, guidance, None)
        if problem.clamp:
            info[:, 2] += (new.abs() > problem.clamp).sum((1, 2))
            new = new.clamp(-problem.clamp, problem.clamp)
        tokens.scatter_(1, index, new)
        found = found[:, 0].double()
        bad = (info[:, 0] < 0) & (found[:, columns.NOT_FINITE] > 0)
        info[:, 0] = torch.where(bad, target[:, 0].double(), info[:, 0])
        info[:, 1] = torch.fmax(info[:, 1], found[:, columns.MAX_LOG_SCALE])
        info[:, 3] += found[:, columns.NOT_POSITIVE]
        lo.add_(1), hi.add_(1)

    count = network.steps - begin
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing() or count < 3:
        for _ in range(count):
            step()
        return info
    step()  # libraries must be set up before a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(count - 1):
        graph.replay()
    return info


class _Poll:
    """Whether a flag on the device is set, asked without waiting: the answer is that of an earlier question."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.capturing = self.cuda and torch.cuda.is_current_stream_capturing()
        self.host = torch.zeros((), dtype=torch.bool, pin_memory=True) if self.cuda and not self.capturing else None
        self.event, self.asked = None, 0

    def __call__(self, flag, every=4):
        if not self.cuda:
            return bool(flag)
        self.asked += 1
        if self.capturing or self.asked % every:
            return False
        done = self.event is not None and self.event.query() and bool(self.host)
        if self.event is None or self.event.query():
            self.host.copy_(flag, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        return done


def sweep(problem, tokens, front, windows, rule):
    """Sweep until every sample is solved, capped or has failed. front (B,): the first step of each that is open."""
    network, device = problem.network, tokens.device
    batch, length, features = tokens.shape
    steps, first = network.steps, network.first
    state = _State(problem, front, windows, rule)
    poll, every = _Poll(device), torch.arange(length, device=device)
    for _ in range(steps if rule.max_sweeps != 0 else 0):
        if poll(~state.active.any()):
            break
        lo, hi = state.lo, state.hi
        width = windows.most(steps) if device.type == "cuda" else max(int((hi - lo).max()), 1)
        at = lo.unsqueeze(1) + torch.arange(width, device=device)
        targets = (at + first).clamp(max=length - 1)
        index = targets.unsqueeze(-1).expand(-1, -1, features)
        old = tokens.gather(1, index)
        guidance = None if problem.guidance is None else problem.guidance.gather(1, targets)
        raw = network.window(tokens, lo, hi, width)
        new, found = problem.affine(problem.z.gather(1, index), raw, guidance, old)
        new, is_open = state.judge(at, new, old, found)
        # Each token is read from its own row of the window, so that no two rows write to one token.
        row = every - first - lo.unsqueeze(1)
        inside = (row >= 0) & (row < width)
        row = row.clamp(0, width - 1)
        inside = inside & is_open.gather(1, row)
        tokens = torch.where(inside.unsqueeze(-1), new.gather(1, row.unsqueeze(-1).expand(-1, -1, features)), tokens)
    return state.solution(tokens)


class _State:
    """Where each sample stands. All of it lives on the device; nothing here asks for a value."""

    def __init__(self, problem, front, windows, rule):
        self.problem, self.windows, self.rule = problem, windows, rule
        self.steps, self.first = problem.network.steps, problem.network.first
        wide = problem.z.new_zeros(front.shape)
        self.front, self.lo, self.active = front, front, front < self.steps
        if rule.max_sweeps == 0:
            self.active = torch.zeros_like(self.active)
        self.hi = torch.where(self.active, windows.end(front, self.steps), front)
        self.sweeps, self.in_window, self.rows = (torch.zeros_like(front) for _ in range(3))
        self.clamped, self.not_positive = torch.zeros_like(front), torch.zeros_like(front)
        self.update, self.residual, self.pending = wide, wide, wide
        self.max_log_scale, self.least = wide - torch.inf, wide + torch.inf
        self.since = torch.zeros_like(front)  # sweeps since the update was least
        self.first_bad = torch.full_like(front, -1)
        capped = (front < self.steps) & (rule.max_sweeps == 0)
        self.status = torch.where(capped, InverseStatus.CAP_REACHED.value, InverseStatus.CONVERGED.value)

    def judge(self, at, new, old, found):
        """(new tokens, mask of the rows to write); moves front, lo and hi. at (B, n): the steps of the rows."""
        front, hi, active = self.front, self.hi, self.active.unsqueeze(1)
        meant = (at < hi.unsqueeze(1)) & active
        frozen, at_front = meant & (at < front.unsqueeze(1)), meant & (at == front.unsqueeze(1))
        is_open = meant & ~frozen

        def largest(column, rows):
            return torch.where(rows, found[..., column], 0.0).amax(1)

        bad = found[..., columns.NOT_FINITE] > 0
        limit = self.problem.limit[:, None, None]
        too_large = (found[..., columns.SIZE] > limit[..., 0]) & ~at_front
        kept = torch.where(torch.isfinite(new), new, old)
        kept = torch.where(at_front.unsqueeze(-1), kept, torch.minimum(torch.maximum(kept, -limit), limit))
        cut = 0
        if self.problem.clamp:
            cut = (kept.abs() > self.problem.clamp).sum(-1)
            kept = kept.clamp(-self.problem.clamp, self.problem.clamp)

        update = largest(columns.UPDATE, is_open)
        # Relative to the tokens up to this one: a later iterate that overflows must not loosen the test.
        sizes = torch.where(meant, found[..., columns.SIZE], 0.0).cummax(1).values
        tolerance = self.rule.atol + self.rule.rtol * sizes
        settled = (found[..., columns.UPDATE] <= tolerance) & ~bad & ~too_large
        whole = self._whole_window(settled, is_open, found, bad | too_large)
        if not self.windows.segments:
            leading = ((settled | frozen) & meant).long().cumprod(1).sum(1)
            moved = torch.maximum(self.lo + leading, front + 1)
        else:
            moved = torch.where(whole, hi, front + 1)
        failed = (at_front & bad).any(1)
        after, status = self._give_up(moved, update, tolerance[:, -1])
        self._record(at, after, frozen, at_front, is_open, found, bad, cut, failed, status, update)

        step = self.active & ~failed
        self.lo = front + 1 if self.rule.commit == "exact" else after
        self.in_window = torch.where(after >= hi, 0, self.in_window + 1)
        restart = after >= hi
        self.least = torch.where(restart, torch.inf, self.least)
        self.since = torch.where(restart, 0, self.since)
        self.front = torch.where(step, after, front)
        self.active = step & (self.front < self.steps)
        self.lo = torch.where(self.active, self.lo, self.front)
        self.hi = torch.where(self.active, self.windows.end(self.front, self.steps), self.front)
        return kept, is_open

    def _whole_window(self, settled, is_open, found, wrong):
        """(B,), whether the open rows meet the criterion together."""
        if self.rule.criterion == "max":
            return (settled | ~is_open).all(1)
        squares, updates = (
            torch.where(is_open, found[..., c], 0.0).sum() for c in (columns.SQUARES, columns.UPDATE_SQUARES)
        )
        batch, _, features = self.problem.z.shape
        if self.rule.criterion == "fro":
            met = updates.sqrt() <= self.rule.atol * batch * features
        else:
            met = updates <= self.rule.rtol * squares
        return met & ~(wrong & is_open).any(1)

    def _give_up(self, moved, update, tolerance):
        """The front where a cap or a stall ends a window early, and the status that this means."""
        fell = update < self.least
        self.least = torch.where(fell, update, self.least)
        self.since = torch.where(fell, 0, self.since + 1)
        whole = self.windows.segments
        stopped = (self.since >= self.rule.patience) & (update <= 10 * tolerance) & (moved < self.hi) & whole
        status = torch.where(stopped, InverseStatus.STALLED.value, 0)
        after = torch.where(stopped, self.hi, moved)
        if self.rule.max_sweeps is not None:
            counted, end = (self.in_window, self.hi) if whole else (self.sweeps, self.steps)
            capped = (counted + 1 >= self.rule.max_sweeps) & (moved < end)
            status = torch.where(capped, InverseStatus.CAP_REACHED.value, status)
            after = torch.where(capped, end, after)
        return after, status

    def _record(self, at, after, frozen, at_front, is_open, found, bad, cut, failed, status, update):
        """Measurements of this sweep. The token at the front is exact: its residual is rounding, and counts as 0."""
        accepted = is_open & (at < after.unsqueeze(1))
        loose = accepted & ~at_front

        def worst(rows):
            return torch.where(rows, found[..., columns.RESIDUAL], 0.0).amax(1)

        self.residual = torch.maximum(self.residual, worst(frozen))
        previous = self.pending if self.rule.commit == "stale" else torch.where(self.active, 0.0, self.pending)
        self.pending = torch.maximum(worst(loose), previous)
        highest = torch.where(accepted, found[..., columns.MAX_LOG_SCALE], -torch.inf).amax(1)
        self.max_log_scale = torch.fmax(self.max_log_scale, highest)
        self.clamped = self.clamped + torch.where(accepted, cut, 0).sum(1)
        self.not_positive = self.not_positive + torch.where(accepted, found[..., columns.NOT_POSITIVE], 0).sum(1).long()
        self.update = torch.where(self.active, update, self.update)
        self.sweeps = self.sweeps + self.active
        self.rows = self.rows + (self.hi - self.lo)
        left = (accepted & bad).any(1)  # not finite, and nothing will look at it again
        wrong = failed | left
        target = at.gather(1, (accepted & bad).int().argmax(1, keepdim=True)).squeeze(1) + self.first
        self.first_bad = torch.where(self.active & wrong & (self.first_bad < 0), target, self.first_bad)
        status = torch.where(wrong, InverseStatus.NONFINITE.value, status)
        self.status = torch.where(self.active, torch.maximum(self.status, status), self.status)

    def solution(self, tokens):
        residual = torch.maximum(self.residual, self.pending)
        rest = (self.first_bad, self.max_log_scale, self.clamped, self.not_positive)
        return Solution(tokens, self.status, self.sweeps, self.rows, self.update, residual, *rest)
