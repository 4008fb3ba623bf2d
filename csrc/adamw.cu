// Launch and registration of AdamW; what calls it is sft_kernels/ops/adamw/cuda_impl.py.
#include "adamw.cuh"
#include "torch.cuh"

namespace sft::adamw {

template <class GRAD>
__global__ void __launch_bounds__(THREADS, 12) sum_of_squares_kernel(const __grid_constant__ Norm p) {
  sum_of_squares<GRAD>(p);
}

template <class PARAM, class GRAD, class STATE, Master MASTER>
__global__ void __launch_bounds__(THREADS, 5) update_kernel(const __grid_constant__ Update p) {
  update<PARAM, GRAD, STATE, MASTER>(p);
}

// The rows, on the host, of `table`.
const int64_t* rows_of(const Tensor& table, int64_t first, int64_t last) {
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Long, "table: expected int64 on the host");
  STD_TORCH_CHECK(table.is_contiguous() && table.dim() == 2, "table: expected [rows, columns]");
  STD_TORCH_CHECK(table.size(1) == COLUMNS, "table: expected ", int(COLUMNS), " columns");
  STD_TORCH_CHECK(0 <= first && first < last && last <= table.size(0), "table: no rows ", first, " to ", last);
  return static_cast<const int64_t*>(table.const_data_ptr());
}

template <class T>
T* pointer(const Tensor& tensor, const char* name, ScalarType dtype) {
  const bool right = tensor.is_cuda() && tensor.scalar_type() == dtype && tensor.is_contiguous();
  STD_TORCH_CHECK(right, name, ": wrong device, dtype or layout");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* pointer(const std::optional<Tensor>& tensor, const char* name, ScalarType dtype) {
  return tensor ? pointer<T>(*tensor, name, dtype) : nullptr;
}

// Σ g² over the gradients of rows `first` to `last`, added to sums[0] unless `anew`.
void sum_of_squares_op(Tensor table, Tensor partials, Tensor sums, Tensor finished, int64_t first, int64_t last,
                       int64_t grad, bool anew) {
  const int64_t* rows = rows_of(table, first, last);
  const int32_t device = sums.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Norm p = {};
  p.partials = pointer<double>(partials, "partials", ScalarType::Double);
  p.sums = pointer<double>(sums, "sums", ScalarType::Double);
  p.finished = pointer<int32_t>(finished, "finished", ScalarType::Int);
  STD_TORCH_CHECK(partials.numel() >= NORM_BLOCKS, "partials: expected ", NORM_BLOCKS);
  const auto kernel = grad == 0   ? sum_of_squares_kernel<float>
                      : grad == 1 ? sum_of_squares_kernel<bf16>
                                  : sum_of_squares_kernel<fp16>;
  for (int64_t row = first; row < last; row += p.table.rows) {
    fill(p.table, rows, row, last);
    p.chunks = int32_t(chunks_of(p.table));
    p.first = anew && row == first;
    launch(kernel, p.chunks < NORM_BLOCKS ? p.chunks : NORM_BLOCKS, 1, THREADS, NORM_SHARED, current_stream(device), p);
  }
}

// One step of rows `first` to `last`, of one combination of dtypes.
void update_op(Tensor table, Tensor maps, Tensor hyper, Tensor sums, std::optional<Tensor> grad_scale,
               std::optional<Tensor> found_inf, std::optional<Tensor> norm_out, std::optional<Tensor> skipped,
               Tensor done, std::optional<Tensor> stats, int64_t first, int64_t last, int64_t param, int64_t grad,
               int64_t state, int64_t master, bool has_norm, bool clip, bool skip, bool shared_found, bool round) {
  const int64_t* rows = rows_of(table, first, last);
  const int32_t device = hyper.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Update p = {};
  p.maps = pointer<int64_t>(maps, "maps", ScalarType::Long);
  p.hyper = pointer<double>(hyper, "hyper", ScalarType::Double);
  p.sums = pointer<double>(sums, "sums", ScalarType::Double);
  p.grad_scale = pointer<float>(grad_scale, "grad_scale", ScalarType::Float);
  p.found_inf = pointer<float>(found_inf, "found_inf", ScalarType::Float);
  p.norm_out = pointer<float>(norm_out, "norm_out", ScalarType::Float);
  p.skipped = pointer<int64_t>(skipped, "skipped", ScalarType::Long);
  p.done = pointer<int32_t>(done, "done", ScalarType::Int);
  p.stats = pointer<float>(stats, "stats", ScalarType::Float);
  p.has_norm = has_norm, p.clip = clip, p.skip = skip, p.shared_found = shared_found, p.round = round;
  for (int64_t row = first; row < last; row += p.table.rows) {
    fill(p.table, rows, row, last);
    const bool carried = for_combination(param, grad, state, master, [&]<class P, class G, class S, Master M> {
      launch(update_kernel<P, G, S, M>, chunks_of(p.table), 1, THREADS, UPDATE_SHARED, current_stream(device), p);
    });
    STD_TORCH_CHECK(carried, "no kernel for this combination of dtypes");
    p.norm_out = nullptr;  // the first launch has written them
    p.skipped = nullptr;
  }
}

}  // namespace sft::adamw

STABLE_TORCH_LIBRARY_IMPL(sft_kernels_cuda, CUDA, m) {
  m.impl("adamw_sum_of_squares", TORCH_BOX(&sft::adamw::sum_of_squares_op));
  m.impl("adamw_update", TORCH_BOX(&sft::adamw::update_op));
}
