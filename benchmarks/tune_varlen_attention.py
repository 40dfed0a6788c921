"""Times every tile shape of the Triton varlen_attention kernels on the cases of bench_varlen_attention and prints the
best; the winners are kept by hand in triton_kernels/varlen_attention_configs.py with the GPU and the date.

    python benchmarks/tune_varlen_attention.py fwd dq dkv
"""

import itertools
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

import flowattn as fa
from flowattn.triton_kernels import varlen_attention as kernels

CASES = {  # name: (batch, longest, heads, width, causal)
    "B64 max256 H12 D64": (64, 256, 12, 64, False),
    "B64 max512 H12 D64": (64, 512, 12, 64, False),
    "B32 max1024 H16 D64": (32, 1024, 16, 64, False),
    "B16 max4096 H16 D128": (16, 4096, 16, 128, False),
    "B16 max4096 H16 D128 causal": (16, 4096, 16, 128, True),
}
CONFIGS = {"fwd": "forward_config", "dq": "dq_config", "dkv": "dkv_config"}
COPIES = 4  # rotated inside the graph, so that inputs do not stay in L2


def inputs(case, copies=COPIES):
    batch, longest, heads, width, causal = CASES[case]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 10, longest + 1, (batch,), generator=generator)
    plan = fa.pack_plan(cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int().cuda())
    sets = [torch.randn(4, plan.total, heads, width, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    return plan, sets, (longest, longest, width**-0.5, -1, 0 if causal else -1, False)


def candidates(kernel):
    grid = itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4))
    if kernel == "dkv":
        grid = ((m, n, w, s) for n, m, w, s in itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)))
    if kernel == "dq":
        grid = itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    return list(grid)


def calls(kernel, case, config, copies=COPIES):
    """One closure per input copy that runs the pass of `kernel` with this configuration."""
    plan, sets, options = inputs(case, copies)
    cu, tiles = plan.cu_seqlens, plan.tiles
    setattr(kernels, CONFIGS[kernel], lambda *args: config)
    if kernel == "fwd":
        return [lambda x=x: kernels.varlen_attention_fwd(*x[:3], cu, cu, tiles, *options) for x in sets]
    saved = [kernels.varlen_attention_fwd(*x[:3], cu, cu, tiles, *options) for x in sets]

    def backward(x, out, lse):
        return kernels.varlen_attention_bwd(x[3], None, *x[:3], out, lse, cu, cu, tiles, *options, False)

    return [lambda x=x, s=s: backward(x, *s) for x, s in zip(sets, saved)]


def graph_ms(functions, repeats=20):
    """Median milliseconds of one call by replay of a graph that holds every function once."""
    for function in functions:
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(functions))
    return sorted(times)[len(times) // 2]


def compile_one(job):
    """Fill Triton's cache in a process of its own; a shape that does not fit the chip is reported, not tuned."""
    kernel, case, config = job
    before = getattr(kernels, CONFIGS[kernel])
    try:
        calls(kernel, case, config, copies=1)[0]()
        torch.cuda.synchronize()
        return job
    except Exception:  # out of shared memory or registers
        return None
    finally:
        setattr(kernels, CONFIGS[kernel], before)


def main():
    chosen = sys.argv[1:] or ["fwd", "dq", "dkv"]
    compiled_cases = (
        "B64 max256 H12 D64",
        "B32 max1024 H16 D64",
        "B16 max4096 H16 D128",
        "B16 max4096 H16 D128 causal",
    )
    jobs = [(k, c, x) for k in chosen for c in compiled_cases for x in candidates(k)]
    with ProcessPoolExecutor(14) as pool:
        fits = [job for job in pool.map(compile_one, jobs, chunksize=4) if job]
    print(f"{len(fits)} of {len(jobs)} configurations compile", flush=True)
    for kernel, case in itertools.product(chosen, CASES):
        width, causal = CASES[case][3:]
        configs = [x for k, c, x in fits if k == kernel and CASES[c][3:] == (width, causal)]
        configs = [x for i, x in enumerate(configs) if x not in configs[:i]]
        before = getattr(kernels, CONFIGS[kernel])
        timed = [(graph_ms(calls(kernel, case, config)), config) for config in configs]
        setattr(kernels, CONFIGS[kernel], before)
        for ms, config in sorted(timed, key=lambda pair: pair[0])[:6]:
            print(
                f"{torch.cuda.get_device_name()} | {kernel} | {case} | {ms:.4f} ms | {config}",
                flush=True,
            )


if __name__ == "__main__":
    main()
