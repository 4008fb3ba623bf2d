// The core of the loss over fibers, for ctypes.
#include "softmax_grad.cuh"

using namespace sft;
using namespace sft::softmax_grad;

template <class T>
const char* run(Params p, int64_t N, bool clusters, size_t shared_limit, uint64_t seed, bool capped) {
  const Plan how = plan(p.V, sizeof(T), p.given_lse != nullptr, clusters, shared_limit);
  p.parts = how.parts;
  const unsigned blocks = how.reads == Reads::given ? 1 : how.parts;
  return fibers::launch(unsigned(N * how.parts), blocks, how.threads, how.shared_bytes, seed, [=] {
    switch (how.reads) {
      case Reads::staged: return capped ? row<T, Reads::staged, true>(p) : row<T, Reads::staged, false>(p);
      case Reads::twice: return capped ? row<T, Reads::twice, true>(p) : row<T, Reads::twice, false>(p);
      case Reads::given: return capped ? row<T, Reads::given, true>(p) : row<T, Reads::given, false>(p);
    }
  });
}

// `dtype`: 0 fp32, 1 bf16, 2 fp16. What went wrong, or null.
extern "C" const char* softmax_grad(const Params* p, int64_t N, int dtype, bool capped, bool clusters,
                                    size_t shared_limit, uint64_t seed) {
  switch (dtype) {
    case 0: return run<float>(*p, N, clusters, shared_limit, seed, capped);
    case 1: return run<bf16>(*p, N, clusters, shared_limit, seed, capped);
    default: return run<fp16>(*p, N, clusters, shared_limit, seed, capped);
  }
}

// parts, threads, bytes of shared memory and Reads of the plan.
extern "C" void softmax_grad_plan(int32_t V, int element_size, bool given, bool clusters, size_t shared_limit,
                                  int64_t* out) {
  const Plan how = plan(V, element_size, given, clusters, shared_limit);
  out[0] = how.parts, out[1] = how.threads, out[2] = int64_t(how.shared_bytes), out[3] = int64_t(how.reads);
}
