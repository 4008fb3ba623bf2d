// Launch and registration of the loss's core; schemas and fakes are in sft_kernels/ops/softmax_grad/cuda_impl.py.
#include "softmax_grad.cuh"
#include "torch.cuh"

#include <set>
#include <tuple>
#include <utility>

namespace sft::softmax_grad {

// Two blocks of 1024 threads would halve what the L2 cache can hold of each row until it is read again.
template <class T, Reads READS, bool CAPPED>
__global__ void __launch_bounds__(READS == Reads::twice ? THREADS_TWICE : THREADS_STAGED, READS == Reads::twice ? 1 : 4)
    softmax_grad_kernel(const __grid_constant__ Params p) {
  row<T, READS, CAPPED>(p);
}

template <class T>
auto kernel_of(Reads reads, bool capped) {
  switch (reads) {
    case Reads::staged:
      return capped ? softmax_grad_kernel<T, Reads::staged, true> : softmax_grad_kernel<T, Reads::staged, false>;
    case Reads::twice:
      return capped ? softmax_grad_kernel<T, Reads::twice, true> : softmax_grad_kernel<T, Reads::twice, false>;
    default:
      return capped ? softmax_grad_kernel<T, Reads::given, true> : softmax_grad_kernel<T, Reads::given, false>;
  }
}

// A block's slice of its row lies in shared memory, so an SM gives it all that it has: five blocks of 33 KB fit. The
// attribute is the kernel's on one device, and stays.
void prefer_shared_memory(const void* kernel, int32_t device) {
  thread_local std::set<std::pair<const void*, int32_t>> preferred;
  if (preferred.count({kernel, device})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "share of shared memory");
  preferred.insert({kernel, device});
}

using Fields = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

const void* pointer(const std::optional<Tensor>& tensor, const char* name, ScalarType dtype, int64_t N,
                    const Tensor& like) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, ": wrong dtype");
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == N && tensor->is_contiguous(), name, ": expected [N]");
  STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device() == like.get_device(), name, ": expected logits' device");
  return tensor->const_data_ptr();
}

Fields softmax_grad_out(Tensor logits, Tensor out, Tensor target, std::optional<Tensor> scale,
                        std::optional<Tensor> lse, std::optional<Tensor> keep, int64_t classes, double label_smoothing,
                        std::optional<double> softcap, std::optional<double> logit_scale, double z_loss, bool stats) {
  STD_TORCH_CHECK(!logit_scale && z_loss == 0, "logit_scale and z_loss are not in the CUDA kernels");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_cuda(), "logits: expected [N, V] on a GPU");
  const int64_t N = logits.size(0), V = logits.size(1);
  STD_TORCH_CHECK(V < int64_t(1) << 31, "logits: more than 2^31 columns");
  STD_TORCH_CHECK(logits.stride(1) == 1 || V < 2, "logits: expected adjacent columns");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == N && out.size(1) == V && (out.stride(1) == 1 || V < 2) &&
                      out.scalar_type() == logits.scalar_type() && out.get_device() == logits.get_device(),
                  "out: expected shape, dtype and device of logits, columns adjacent");
  STD_TORCH_CHECK(!lse || scale, "lse: given for a gradient, which needs scale");
  const int32_t device = logits.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);

  const auto field = [&](ScalarType dtype, bool wanted) {
    return torch::stable::new_empty(logits, {wanted && !lse ? N : 0}, dtype);
  };
  const Fields fields = {field(ScalarType::Double, true), field(ScalarType::Float, true),
                         field(ScalarType::Float, true), field(ScalarType::Double, stats),
                         field(ScalarType::Double, label_smoothing != 0)};
  if (N == 0) return fields;

  Params p = {};
  p.logits = logits.const_data_ptr();
  p.out = scale ? out.mutable_data_ptr() : nullptr;
  p.target = static_cast<const int64_t*>(pointer(target, "target", ScalarType::Long, N, logits));
  p.scale = static_cast<const float*>(pointer(scale, "scale", ScalarType::Float, N, logits));
  p.given_lse = static_cast<const double*>(pointer(lse, "lse", ScalarType::Double, N, logits));
  p.keep = static_cast<const bool*>(pointer(keep, "keep", ScalarType::Bool, N, logits));
  if (!lse) {
    p.lse = static_cast<double*>(std::get<0>(fields).mutable_data_ptr());
    p.target_logit = static_cast<float*>(std::get<1>(fields).mutable_data_ptr());
    p.max_logit = static_cast<float*>(std::get<2>(fields).mutable_data_ptr());
    if (stats) p.mean_logit = static_cast<double*>(std::get<3>(fields).mutable_data_ptr());
    if (label_smoothing != 0) p.sum_logit = static_cast<double*>(std::get<4>(fields).mutable_data_ptr());
  }
  p.stride = logits.stride(0);
  p.stride_out = out.stride(0);
  p.V = int32_t(V);
  p.softcap = float(softcap.value_or(0));
  p.smoothing = float(label_smoothing);
  p.uniform = float(label_smoothing / double(classes));

  for_dtype(logits.scalar_type(), "logits", [&](auto element) {
    using T = decltype(element);
    const bool clusters = architecture(reinterpret_cast<const void*>(kernel_of<T>(Reads::staged, false))) >= 90;
    const size_t limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const Plan how = plan(p.V, sizeof(T), p.given_lse != nullptr, clusters, limit);
    p.parts = how.parts;
    const unsigned cluster = how.reads == Reads::given ? 1 : how.parts;
    const auto kernel = kernel_of<T>(how.reads, softcap.has_value());
    if (how.reads == Reads::staged) prefer_shared_memory(reinterpret_cast<const void*>(kernel), device);
    launch(kernel, N * how.parts, cluster, how.threads, how.shared_bytes,
           current_stream(device), p);
  });
  return fields;
}

Fields softmax_grad_(Tensor logits, Tensor target, std::optional<Tensor> scale, std::optional<Tensor> lse,
                     std::optional<Tensor> keep, int64_t classes, double label_smoothing, std::optional<double> softcap,
                     std::optional<double> logit_scale, double z_loss, bool stats) {
  return softmax_grad_out(logits, logits, target, scale, lse, keep, classes, label_smoothing, softcap, logit_scale,
                          z_loss, stats);
}

}  // namespace sft::softmax_grad

STABLE_TORCH_LIBRARY_IMPL(sft_kernels_cuda, CUDA, m) {
  m.impl("softmax_stats", TORCH_BOX(&sft::softmax_grad::softmax_grad_));
  m.impl("softmax_grad_", TORCH_BOX(&sft::softmax_grad::softmax_grad_));
  m.impl("softmax_grad_out", TORCH_BOX(&sft::softmax_grad::softmax_grad_out));
}

// Why these kernels do not run on a device: a driver older than the CUDA that they were built with, or no code for it.
extern "C" __attribute__((visibility("default"))) const char* sft_kernels_error(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    const auto kernel = sft::softmax_grad::kernel_of<float>(sft::softmax_grad::Reads::staged, false);
    error = cudaFuncGetAttributes(&attributes, kernel);
    cudaSetDevice(before);
  }
  cudaGetLastError();  // which would otherwise be taken for the next launch's
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
