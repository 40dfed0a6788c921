"""A barrier of all programs of a launch, which run at once (a cooperative launch), and reads ahead of it.

A barrier is two halves: what does not depend on the other programs is asked for between them.
"""

import triton
import triton.language as tl

# Only the first thread counts and polls; the other threads of the program wait at its own barrier, which makes
# what it released and acquired theirs. 2^24 polls take seconds: a program that never came is an error, not a hang.
_ARRIVE: tl.constexpr = tl.constexpr("""{
    .reg .pred first;
    .reg .u32 thread;
    bar.sync 0;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    @first red.release.gpu.global.add.u32 [$1], 1;
    mov.u32 $0, 0;
}""")
_WAIT: tl.constexpr = tl.constexpr("""{
    .reg .pred again;
    .reg .u32 thread, polls;
    .reg .s32 missing;
    mov.u32 polls, 0;
    mov.u32 thread, %tid.x;
    setp.ne.u32 again, thread, 0;
    @again bra all_here;
poll:
    ld.acquire.gpu.global.s32 missing, [$1];
    sub.s32 missing, $2, missing;
    add.u32 polls, polls, 1;
    setp.eq.u32 again, polls, 16777216;
    @again trap;
    setp.gt.s32 again, missing, 0;
    @again bra poll;
all_here:
    bar.sync 0;
    mov.u32 $0, 0;
}""")


@triton.jit
def arrive(counter):
    """What this program wrote is there for all that wait for it."""
    tl.inline_asm_elementwise(_ARRIVE, "=r,l", [counter.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_all(counter, arrivals):
    """Until the counter, an int32 that may wrap around, has come to `arrivals`."""
    args = [counter.to(tl.int64), arrivals.to(tl.int32)]
    tl.inline_asm_elementwise(_WAIT, "=r,l,r", args, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fetch(pointers):
    """Bring the cache lines of these addresses into L2."""
    code: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(code, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
