// Hopper building blocks: bulk copies of tiles into swizzled shared memory, their barriers, and warpgroup products.
//
// A tile is rows of 64 16-bit elements, 128 bytes each, whose eight 16-byte chunks are permuted by the row:
// chunk c of row r lies at r * 128 + (c ^ (r % 8)) * 16. Tiles start at multiples of 1024 bytes.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace flowattn {

constexpr int kChunkBytes = 16;
constexpr int kTileRowBytes = 128;
constexpr int kTileRowChunks = kTileRowBytes / kChunkBytes;

// wgmma and its descriptors exist for sm_90a alone; elsewhere the kernels compile to nothing and are never launched.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#  define FA_HOPPER 1
#endif

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline uint32_t swizzled(int row, int chunk) {
  return row * kTileRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

// Makes this thread's shared-memory writes visible to wgmma and bulk copies; a barrier must follow.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#ifdef FA_HOPPER

// ---- barriers in shared memory: `arrivals` threads and any expected bytes complete a phase

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the barrier's phase of this parity; the phase before the first has parity 1.
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Barrier among the 128 threads of a warpgroup; 0 is that of __syncthreads.
__device__ inline void warpgroup_sync(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

// Starts the copy of a box of 64 rows from `row` on of one head; rows and columns outside the tensor arrive as zeros.
__device__ inline void copy_tile(uint32_t tile, const CUtensorMap* map, int head, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(tile),
      "l"(map), "r"(0), "r"(head), "r"(row), "r"(barrier)
      : "memory");
}

// Descriptor of a tile as a wgmma operand: 128-byte swizzle, 1024 bytes between groups of 8 rows.
__device__ inline uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t layout = uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16;
  return layout | ((address & 0x3ffff) >> 4);
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `Pending` of the committed groups are unfinished.
template <int Pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

#  define FA_ACCUMULATORS_32(d)                                                                                 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#  define FA_ACCUMULATOR_NAMES_32                                                                                    \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23," \
    " %24, %25, %26, %27, %28, %29, %30, %31}, "
// Rows 64 of A from shared memory (K-major), 64 columns of B from shared memory (K-major): d (+)= A B^T.
#  define FA_WGMMA_SS(type)                                                                     \
    asm volatile(                                                                               \
        "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"                                               \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " FA_ACCUMULATOR_NAMES_32 \
        "%32, %33, p, 1, 1, 0, 0;}"                                                             \
        : FA_ACCUMULATORS_32(d)                                                                 \
        : "l"(a), "l"(b), "r"(accumulate))
// A from registers, B (K rows of 64 columns, so MN-major) from shared memory: d += A B.
#  define FA_WGMMA_RS(type)                                                                              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " FA_ACCUMULATOR_NAMES_32 \
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                                \
                 : FA_ACCUMULATORS_32(d)                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// Products of one warpgroup, 64 x 64 with 16 terms; asynchronous: fence before, commit and wait after.
template <class T>
__device__ inline void wgmma_ss(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    FA_WGMMA_SS("f16");
  } else {
    FA_WGMMA_SS("bf16");
  }
}

template <class T>
__device__ inline void wgmma_rs(float (&d)[32], const uint32_t* a, uint64_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    FA_WGMMA_RS("f16");
  } else {
    FA_WGMMA_RS("bf16");
  }
}

#endif  // FA_HOPPER

// Two floats as one register of T, the first in the low half.
template <class T>
__device__ inline uint32_t pack_pair(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    packed = *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    packed = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return packed;
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flowattn
