// factorized_attention on one line: matrix products straight on the strided rows of the grid; only the transpose that
// the gradient of a kernel needs is packed.
#include "cpu/factorized_attention.h"
#include "cpu/gemm.h"

namespace flowattn::FLOWATTN_ISA_NAMESPACE {
namespace {

template <typename T>
int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
void apply(const FactorizedLine& line) {
  for (int64_t h = 0; h < line.heads; ++h) {
    const T* kernel = static_cast<const T*>(line.kernel) + h * line.n_out * line.n_in;
    const T* in = static_cast<const T*>(line.in) + h * line.in_head;
    T* out = static_cast<T*>(line.out) + h * line.out_head;
    gemm<T>(line.n_out, line.width, line.n_in, kernel, line.n_in, 1, in, line.in_row, out, line.out_row, false);
  }
}

template <typename T>
void value_gradient(const FactorizedLine& line) {
  for (int64_t h = 0; h < line.heads; ++h) {
    const T* kernel = static_cast<const T*>(line.kernel) + h * line.n_out * line.n_in;
    T* in = static_cast<T*>(line.in) + h * line.in_head;
    const T* out = static_cast<const T*>(line.out) + h * line.out_head;
    gemm<T>(line.n_in, line.width, line.n_out, kernel, 1, line.n_in, out, line.out_row, in, line.in_row, line.add);
  }
}

template <typename T>
void kernel_gradient(const FactorizedLine& line, int64_t head, void* scratch) {
  T* transposed = static_cast<T*>(scratch);
  const int64_t ld = padded<T>(line.n_in);
  pack_transposed<T>(static_cast<const T*>(line.in) + head * line.in_head, line.in_row, line.n_in, line.width,
                     transposed, ld);
  gemm<T>(line.n_out, line.n_in, line.width, static_cast<const T*>(line.out) + head * line.out_head, line.out_row, 1,
          transposed, ld, static_cast<T*>(line.dkernel) + head * line.n_out * line.n_in, line.n_in, true);
}

}  // namespace

int64_t factorized_scratch(const FactorizedLine& line) {
  return line.storage == Storage::kDouble ? padded<double>(line.n_in) * line.width * sizeof(double)
                                          : padded<float>(line.n_in) * line.width * sizeof(float);
}

void factorized_apply(const FactorizedLine& line) {
  line.storage == Storage::kDouble ? apply<double>(line) : apply<float>(line);
}

void factorized_value_gradient(const FactorizedLine& line) {
  line.storage == Storage::kDouble ? value_gradient<double>(line) : value_gradient<float>(line);
}

void factorized_kernel_gradient(const FactorizedLine& line, int64_t head, void* scratch) {
  line.storage == Storage::kDouble ? kernel_gradient<double>(line, head, scratch)
                                   : kernel_gradient<float>(line, head, scratch);
}

}  // namespace flowattn::FLOWATTN_ISA_NAMESPACE
