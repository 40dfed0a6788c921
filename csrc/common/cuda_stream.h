// Device guard, current stream and error check for CUDA launchers, on the stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"

// Weak: a library with CUDA kernels still loads beside a CPU-only torch, which does not have this symbol.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace flowattn {

// Makes the tensor's device current while alive and holds its current stream.
class CudaLaunch {
 public:
  explicit CudaLaunch(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// torch's own macro for this needs symbols that a CPU-only torch does not have.
inline void check_launch(const char* op, cudaError_t status) {
  FA_CHECK(status == cudaSuccess, op, "the kernel must launch", cudaGetErrorString(status));
}

}  // namespace flowattn
