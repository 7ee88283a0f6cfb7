// What a CUDA call returned, as an exception.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace osf {

inline void check(cudaError_t status) {
    if (status == cudaSuccess) return;
    const char* remedy = status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice
                             ? "; this machine has no usable NVIDIA GPU and driver, so call the op on CPU tensors"
                             : "";
    throw std::runtime_error(std::string("CUDA error ") + cudaGetErrorName(status) + ": " + cudaGetErrorString(status) +
                             remedy);
}

}  // namespace osf
