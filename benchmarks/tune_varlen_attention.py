"""Times every tile shape of the Triton varlen_attention kernels on the cases of bench_varlen_attention and prints the
best; the winners are kept by hand in triton_kernels/varlen_attention_configs.py with the GPU and the date.

    python -m benchmarks.tune_varlen_attention fwd dq dkv
"""

import itertools
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.bench_varlen_attention import GPU_SHAPES, make_inputs
from benchmarks.timing import copies, graph_times
from flowattn.triton_kernels import varlen_attention, varlen_attention_bwd

CONFIGS = {
    "fwd": (varlen_attention, "forward_config"),
    "dq": (varlen_attention_bwd, "dq_config"),
    "dkv": (varlen_attention_bwd, "dkv_config"),
}
STAGES = {"fwd": (1, 2, 3, 4), "dq": (1, 2, 3), "dkv": (1, 2, 3)}


def candidates(kernel):
    """(BM, BN, num_warps, num_stages); the tile that a program keeps is the larger one."""
    kept, streamed = (64, 128), (32, 64, 128)
    blocks = itertools.product(streamed, kept) if kernel == "dkv" else itertools.product(kept, streamed)
    return [(*block, *rest) for block in blocks for rest in itertools.product((4, 8), STAGES[kernel])]


def calls(kernel, shape, config, count=None):
    """One closure per copy of the inputs that runs the pass of `kernel` with this configuration."""
    (q, k, v, grad), batch = make_inputs(*shape, torch.bfloat16, torch.device("cuda"))
    count = count or copies(4 * q.numel() * q.element_size(), q.device)
    sets = [[x.clone() for x in (q, k, v, grad)] for _ in range(count)]
    longest, scale, right = batch.max_seqlen, q.shape[2] ** -0.5, 0 if batch.causal else -1
    offsets = (batch.cu_seqlens, batch.cu_seqlens, batch.plan.tiles, longest, longest, scale, -1, right, False)
    setattr(*CONFIGS[kernel], lambda *args: config)
    if kernel == "fwd":
        return [lambda x=x: varlen_attention.varlen_attention_fwd(*x[:3], *offsets) for x in sets]
    saved = [varlen_attention.varlen_attention_fwd(*x[:3], *offsets) for x in sets]

    def backward(x, out, lse):
        return varlen_attention_bwd.varlen_attention_bwd(x[3], None, *x[:3], out, lse, *offsets, False)

    return [lambda x=x, s=s: backward(x, *s) for x, s in zip(sets, saved)]


def compile_one(job):
    """Fill Triton's cache in a process of its own; a shape that does not fit the chip is reported, not tuned."""
    kernel, shape, config = job
    before = getattr(*CONFIGS[kernel])
    try:
        calls(kernel, shape, config, count=1)[0]()
        torch.cuda.synchronize()
        return job
    except Exception:  # out of shared memory or registers
        return None
    finally:
        setattr(*CONFIGS[kernel], before)


def time_one(kernel, shape, config):
    before = getattr(*CONFIGS[kernel])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run = calls(kernel, shape, config)
        for call in run:
            call()
        median = graph_times(run, budget=0.05).median
    setattr(*CONFIGS[kernel], before)
    return median


def main():
    chosen = sys.argv[1:] or list(CONFIGS)
    jobs = [job for kernel in chosen for job in itertools.product([kernel], GPU_SHAPES, candidates(kernel))]
    with ProcessPoolExecutor() as pool:
        fits = [job for job in pool.map(compile_one, jobs, chunksize=4) if job]
    print(f"{torch.cuda.get_device_name()}: {len(fits)} of {len(jobs)} configurations compile", flush=True)
    for kernel, shape in itertools.product(chosen, GPU_SHAPES):
        timed = [(time_one(*job), job[2]) for job in fits if job[:2] == (kernel, shape)]
        for ms, config in sorted(timed)[:6]:
            print(f"{kernel} | {shape} | {ms:.4f} ms | {config}", flush=True)


if __name__ == "__main__":
    main()
