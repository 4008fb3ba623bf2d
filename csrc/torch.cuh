// What the launchers use of torch: its stable ABI alone, so that one library serves every torch from 2.11 on.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "numbers.cuh"

// In torch's CUDA library; its header declares it for builds against such a torch alone.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace sft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The architecture that a kernel's code was made for, not the device's: what was made for 8.0 knows no clusters.
inline int architecture(const void* kernel) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// `blocks` of `threads`, in clusters of `cluster` where that is more than one.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, unsigned cluster, unsigned threads, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "a grid of ", blocks, " blocks is more than CUDA has");
  if (shared_bytes > 48 << 10) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), "shared memory");
  }
  cudaLaunchAttribute shape[1];
  shape[0].id = cudaLaunchAttributeClusterDimension;
  shape[0].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = unsigned(blocks);
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = shape;
  config.numAttrs = cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "kernel launch");
}

// `values` for T in fp32, bf16 and fp16: calls `function` with one of the three.
template <class Function>
void for_dtype(ScalarType dtype, const char* name, Function&& function) {
  switch (dtype) {
    case ScalarType::Float: return function(float{});
    case ScalarType::BFloat16: return function(bf16{});
    case ScalarType::Half: return function(fp16{});
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

}  // namespace sft
