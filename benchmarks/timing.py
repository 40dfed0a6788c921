"""Clocks (CUDA-graph replay and eager wall time, both with cold caches), peak memory, and the floors of the same run.

Cold caches: a list of calls walks over several copies of the inputs, enough of them that a copy has left the cache by
the time its turn comes again. A flush between calls is not used: its dirty lines are written back while the measured
kernel runs, and its own time (tens of microseconds) would have to be subtracted from kernels that take ten.
"""

import contextlib
import gc
import itertools
import math
import os
import time
from typing import NamedTuple

import torch

GRAPH_CALLS = 16  # fewest calls in one graph: they share the few microseconds that starting a graph takes
LONG_MS = 10.0  # calls longer than this stand alone: they share nothing, and leave the caches cold themselves
SLOW_MS = 1000.0  # calls longer than this are timed once, and not captured
MAX_COPIES = 256  # inputs below about 0.5 MB stay partly in a 50 MB cache
CPU_COLD_BYTES = 64 << 20  # a core's share of any last-level cache, many times over


class Times(NamedTuple):
    """Milliseconds a call."""

    median: float
    p20: float
    p80: float


def summarise(samples):
    """Median, 20th and 80th percentile of a list of milliseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Times(*(ordered[round(last * fraction)] for fraction in (0.5, 0.2, 0.8)))


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def own_stream(device):
    """Context for all work on a GPU: capture refuses the default stream, and a backward runs where its forward ran."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def copies(bytes_per_call, device):
    """How many copies of the inputs a list of calls has to walk over for each to find them out of the cache."""
    if device.type == "cuda":
        cold = 3 * torch.cuda.get_device_properties(device).L2_cache_size
    else:
        cold = CPU_COLD_BYTES
    return min(MAX_COPIES, 1 + math.ceil(cold / max(bytes_per_call, 1)))


def graph_times(calls, budget, least=GRAPH_CALLS):
    """Capture at least `least` calls, `calls` in turn, in one CUDA graph, replay it for `budget` seconds; times of one.

    The current stream must be that of own_stream. Every result stays alive during the capture, so no call writes to
    memory that the one before it left in the cache.
    """
    calls = calls * math.ceil(least / len(calls))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]
    del kept

    def replay():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(calls)

    return summarise(_repeat(replay, budget))


def once(call, device):
    """Milliseconds of one call by the host clock."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def wall_times(calls, device, budget):
    """Host clock: around a walk over all `calls`, synchronised at both ends, on a GPU; around each in turn on a CPU."""
    groups = itertools.cycle([calls] if device.type == "cuda" else [[call] for call in calls])

    def walk():
        group = next(groups)

        def all_of_it():
            for call in group:
                call()

        return once(all_of_it, device) / len(group)

    return summarise(_repeat(walk, budget))


def _repeat(sample, budget, fewest=3, most=200):
    """Samples taken for `budget` seconds after one that is thrown away, unless it is slow."""
    first = sample()
    if first > SLOW_MS:
        return [first]
    samples, end = [], time.perf_counter() + budget
    while len(samples) < fewest or (time.perf_counter() < end and len(samples) < most):
        samples.append(sample())
    return samples


def peak_memory(call, device):
    """Bytes a call takes at its peak beyond what was allocated before; None on the CPU, where torch does not count."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def measure_floors(device, dtype, quick=False):
    """{"copy": bytes/s, read plus written; "matmul": FLOP/s in "dtype"}, by the clock that times the ops."""
    megabytes, size = (8, 256) if quick else (512, 8192) if device.type == "cuda" else (128, 2048)
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(a)
    budget = 0.02 if quick else 0.5

    def seconds(call):
        call()
        times = graph_times([call], budget) if device.type == "cuda" else wall_times([call], device, budget)
        return times.median * 1e-3

    with own_stream(device):
        copy, matmul = seconds(lambda: target.copy_(source)), seconds(lambda: torch.mm(a, b, out=product))
    rates = {"copy": 2 * source.numel() / copy, "matmul": 2 * size**3 / matmul}
    return rates | {"dtype": str(dtype).removeprefix("torch.")}


def floor_ms(count_bytes, count_flops, floors):
    """The time no kernel can beat: the larger of moving the bytes and doing the FLOPs at the measured rates."""
    return 1e3 * max(count_bytes / floors["copy"], count_flops / floors["matmul"])


def device_name(device):
    """The device as people call it, with the thread count on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    return f"{model or 'CPU'}, {torch.get_num_threads()} threads"
