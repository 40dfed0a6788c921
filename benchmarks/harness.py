"""Runs the cases of one op: checks every provider against the truth, then puts it on the clocks.

A bench module holds
  OP         name of the op
  PROVIDERS  pairs of a name and a function from a case to a `Bound`; the first is ours
  MINE       names of all of ours
  NOTE       a sentence under its table
  cases      function of (device, quick) that yields `Case`s one at a time, so that only one lives
"""

import gc
from typing import NamedTuple

import torch

from benchmarks import timing

# Largest error against the truth, as a multiple of plain torch's in the same dtype. A gradient is rounded more often.
ERROR_FACTOR = {"fwd": 2.0, "bwd": 3.0}
SECONDS = 0.2  # samples of one clock are taken for this long


class Unsupported(Exception):
    """A provider does not do this case; the text says why."""


class Case(NamedTuple):
    """One op on one set of inputs. Dicts have the keys "fwd" and, where a gradient is timed, "bwd"."""

    name: str
    inputs: tuple  # tensors; those of a floating dtype get gradients if "bwd" is timed
    grad_output: torch.Tensor | None
    truth: dict  # direction -> tensors: results, or gradients of the inputs; float64
    plain: dict  # the same from plain torch in the case's dtype: sets how large an error is allowed
    bytes: dict  # direction -> bytes that have to move
    flops: dict  # direction -> floating-point operations
    context: object  # whatever the providers need besides the inputs
    atol: float = 0.0  # error allowed beyond the multiple of plain torch's
    resident: int = 0  # bytes that every call reads besides the inputs, such as weights: they empty the caches too

    @property
    def dtype(self):
        return self.inputs[0].dtype


class Bound(NamedTuple):
    """A provider bound to a case. What `prepare` and `collect` do (padding, say) lies outside the clock."""

    call: object  # (*inputs) -> tensor or tuple of tensors; this is timed
    prepare: object = lambda x: x  # one input or output gradient in the case's layout -> the provider's layout
    collect: object = lambda x: x  # result, or one input's gradient, in the provider's layout -> the case's layout
    unlike: str | None = None  # why the results are not those of the case, and not compared: noted beside the times


def tuple_of(result):
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def inputs_of(case, bound, grad):
    """A fresh copy of the inputs in the provider's layout."""
    copies = (bound.prepare(x).detach().clone() for x in case.inputs)
    return tuple(x.requires_grad_(grad and x.is_floating_point()) for x in copies)


def make_call(case, bound, direction):
    """A function of no arguments: the forward without gradients, or the backward of a forward that has already run."""
    backward = direction == "bwd"
    inputs = inputs_of(case, bound, backward)
    if not backward:

        def forward():
            with torch.no_grad():
                return bound.call(*inputs)

        return forward
    output = bound.call(*inputs)
    grad_output = bound.prepare(case.grad_output).clone()  # cold like the inputs
    leaves = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True)


def worst_error(case, bound, direction):
    """None if the provider is right, else one line on the result that breaks the error bound."""
    got = make_call(case, bound, direction)()
    collected = tuple_of(bound.collect(got)) if direction == "fwd" else [bound.collect(x) for x in got]
    triples = zip(collected, case.truth[direction], case.plain[direction], strict=True)
    for index, (result, truth, plain) in enumerate(triples):
        if result.shape != truth.shape:
            return f"result {index} has shape {tuple(result.shape)} instead of {tuple(truth.shape)}"
        if not truth.numel():
            continue
        error = (result.to(truth.dtype) - truth).abs().max().item()
        plain_error = (plain.to(truth.dtype) - truth).abs().max().item()
        allowed = ERROR_FACTOR[direction] * plain_error + case.atol
        if not error <= allowed:  # a NaN is wrong too
            return f"result {index} is off by {error:.3g}; allowed {allowed:.3g} (plain torch {plain_error:.3g})"
    return None


def measure(case, bound, direction, device, quick=False, seconds=SECONDS):
    """The clocks and the memory of one provider in one direction, as the fields of a record."""
    budget = 0.01 if quick else seconds
    calls = [make_call(case, bound, direction)]
    bytes_per_call = case.resident + sum(x.numel() * x.element_size() for x in case.inputs)
    for _ in range(2):  # compilers and autotuners finish, the allocator gets its blocks
        once = timing.once(calls[0], device)
    fields = {"peak_mem_bytes": timing.peak_memory(calls[0], device)}
    alone = device.type == "cuda" and once > timing.LONG_MS
    count = 2 if quick else 1 if alone else timing.copies(bytes_per_call, device)
    calls += [make_call(case, bound, direction) for _ in range(count - 1)]
    wall = timing.wall_times(calls, device, budget)
    fields |= dict(zip(("wall_ms", "wall_p20", "wall_p80"), wall))
    graph, why = (None, None, None), None
    if once > timing.SLOW_MS:
        why = f"no graph time, a call takes {once * 1e-3:.1f} s"
    elif device.type == "cuda":
        try:
            graph = timing.graph_times(calls, budget, 1 if alone else timing.GRAPH_CALLS)
        except Exception as error:  # whatever a peer raises, it keeps its wall time
            why = f"no graph time, capture failed: {_first_line(error)}"
            torch.cuda.synchronize()
    return fields | dict(zip(("ms", "ms_p20", "ms_p80"), graph)), why


def run(module, device, *, environment, floors, quick=False, seconds=SECONDS, only="", say=print):
    """Measure the cases of a bench module whose names contain `only`; yield the records, one for each provider and
    direction, as they come."""
    with timing.own_stream(device):
        for case in module.cases(device, quick):
            if only not in case.name:
                continue
            say(f"{module.OP}: {case.name}")
            for name, build in module.PROVIDERS:
                bound = _bind(name, build, case, say)
                for direction in case.bytes if bound else ():
                    line = _record(module, case, direction, name, environment, floors)
                    line |= _attempt(case, bound, direction, device, quick, seconds, line["floor_ms"])
                    say(_describe(line))
                    _free(device)
                    yield line


def _bind(name, build, case, say):
    try:
        return build(case)
    except ImportError as error:
        say(f"  {name}: skipped, not installed ({_first_line(error)})")
    except Unsupported as reason:
        say(f"  {name}: skipped, {reason}")
    return None


def _attempt(case, bound, direction, device, quick, seconds, floor):
    """Status, note, clocks: a provider that fails or is wrong is reported and not timed."""
    try:
        wrong = None if bound.unlike else worst_error(case, bound, direction)
        if wrong:
            return {"status": "wrong", "note": wrong}
        fields, note = measure(case, bound, direction, device, quick, seconds)
    except Exception as error:  # one broken peer must not end the run of the others
        return {"status": "failed", "note": f"{type(error).__name__}: {_first_line(error)}"}
    best = fields["wall_ms"] if fields["ms"] is None else fields["ms"]
    if bound.unlike:
        fields, note = fields | {"unlike": True}, note or bound.unlike
    return fields | {"status": "ok", "note": note, "pct_floor": 100 * floor / best}


def _record(module, case, direction, name, environment, floors):
    count_bytes, count_flops = case.bytes[direction], case.flops.get(direction, 0)
    empty = ("ms", "ms_p20", "ms_p80", "wall_ms", "wall_p20", "wall_p80", "pct_floor", "peak_mem_bytes")
    return {
        "op": module.OP,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": direction,
        "provider": name,
        "ours": name in module.MINE,
        **dict.fromkeys(empty),
        "bytes": count_bytes,
        "flops": count_flops,
        "floor_ms": timing.floor_ms(count_bytes, count_flops, floors),
        "copy_bytes_per_s": floors["copy"],
        "matmul_flops_per_s": floors["matmul"],
        "matmul_dtype": floors["dtype"],
        **environment,
    }


def _describe(line):
    if line["status"] != "ok":
        return f"  {line['provider']} {line['direction']}: {line['status']}: {line['note']}"
    graph = "" if line["ms"] is None else f"{line['ms']:.4g} ms, "
    note = f" ({line['note']})" if line["note"] else ""
    times = f"{graph}wall {line['wall_ms']:.4g} ms, {line['pct_floor']:.0f} % of the floor"
    return f"  {line['provider']} {line['direction']}: {times}{note}"


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _free(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
