// Run-time choice between the copies of a *_kernel.cpp, which setup.py compiles once per instruction set.
//
// A kernel file puts its code into FLOWATTN_ISA_NAMESPACE; the plain op file declares the entry point with
// FA_ISA_DECLARE and calls it through FA_ISA_CALL.
#pragma once

#ifdef FLOWATTN_ISA
#  define FLOWATTN_ISA_NAMESPACE FLOWATTN_ISA
#else
#  include <cstdlib>
#  include <cstring>
#endif

#if defined(__x86_64__)
#  define FA_ISA_DECLARE(signature) \
    namespace flowattn::baseline {  \
    signature;                      \
    }                               \
    namespace flowattn::avx2 {      \
    signature;                      \
    }                               \
    namespace flowattn::avx512 {    \
    signature;                      \
    }
#  define FA_ISA_CALL(function, ...)                                        \
    (flowattn::isa_level() == 2   ? flowattn::avx512::function(__VA_ARGS__) \
     : flowattn::isa_level() == 1 ? flowattn::avx2::function(__VA_ARGS__)   \
                                  : flowattn::baseline::function(__VA_ARGS__))
#else
#  define FA_ISA_DECLARE(signature) \
    namespace flowattn::baseline {  \
    signature;                      \
    }
#  define FA_ISA_CALL(function, ...) flowattn::baseline::function(__VA_ARGS__)
#endif

#ifndef FLOWATTN_ISA  // kernels never ask, and must not emit this function's code
namespace flowattn {

// 0 baseline, 1 AVX2 + FMA + F16C (x86-64-v3), 2 AVX-512 F/BW/CD/DQ/VL (x86-64-v4): the best this machine runs, or
// less where FLOWATTN_CPU_ISA=baseline or avx2 says so.
inline int isa_level() {
#  if defined(__x86_64__)
  static const int level = [] {
    const int best = __builtin_cpu_supports("x86-64-v4") ? 2 : __builtin_cpu_supports("x86-64-v3") ? 1 : 0;
    const char* limit = std::getenv("FLOWATTN_CPU_ISA");
    if (limit && std::strcmp(limit, "baseline") == 0) return 0;
    return limit && std::strcmp(limit, "avx2") == 0 && best > 1 ? 1 : best;
  }();
  return level;
#  else
  return 0;
#  endif
}

inline const char* isa_name() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[isa_level()];
}

}  // namespace flowattn
#endif
