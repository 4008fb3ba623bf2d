// Kernels with a fault each, which the harness must show, and the same without.
#include "device.cuh"

using namespace sft;

enum Fault {
  NONE,
  NO_BARRIER,         // between writing shared memory and reading a neighbour's
  NO_SECOND_BARRIER,  // before the same memory is written again
  NO_CLUSTER_BARRIER, // before a peer's memory is read
  EARLY_END,          // of a block whose memory a peer still reads
  NO_COPY_WAIT,       // before what was copied is read
  READ_BEHIND,        // of the input
  WRITE_BEHIND,       // of the output
  WRITE_BEFORE,       // the output
  SHARED_BEHIND,      // of the block's shared memory
  LEFT_OUT,           // one thread never reaches a barrier
  RELAXED,            // arrival before a peer's memory is read
};

// out[i] = Σ in over the cluster + Σ in over the block + the count of positive ones in the warp, all twice.
static void sum_over_cluster(const float* in, float* out, unsigned blocks, int fault) {
  const unsigned thread = threadIdx.x, threads = blockDim.x, at = blockIdx.x * threads + thread;
  auto* values = reinterpret_cast<float*>(shared_memory());
  float total = 0;
  for (int round = 0; round < 2; ++round) {
    // Sixteen bytes a thread, of which the first four are its own.
    auto* stage = reinterpret_cast<Vector*>(shared_memory() + 32 * sizeof(float)) + thread;
    copy_async(stage, reinterpret_cast<const Vector*>(in) + at);
    if (fault != NO_COPY_WAIT) copy_wait();
    float x = bits_to_float(stage->word[0]);
    if (fault == NO_COPY_WAIT) copy_wait();
    const unsigned positive = __ballot_sync(0xffffffff, x > 0);
    for (unsigned bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffff, x, bits);
    if (thread % 32 == 0) values[thread / 32] = x;
    if (fault == LEFT_OUT && thread == 5) return;
    if (fault != NO_BARRIER) __syncthreads();
    float block = 0;
    for (unsigned w = 0; w < threads / 32; ++w) block += values[w];
    if (fault != NO_SECOND_BARRIER) __syncthreads();
    if (thread == 0) values[0] = block;
    if (fault == RELAXED) cluster_arrive_relaxed(), cluster_wait();
    else if (fault != NO_CLUSTER_BARRIER) cluster_arrive(), cluster_wait();
    for (unsigned b = 0; b < blocks; ++b) total += *cluster_peer(values, b);
    total += block + float(std::popcount(positive));
    if (round == 0) cluster_arrive(), cluster_wait();
    else if (fault != EARLY_END) cluster_arrive_relaxed(), cluster_wait();
  }
  const unsigned last = gridDim.x * threads - 1;
  if (fault == READ_BEHIND && at == last) total += in[4 * last + 4];
  if (fault == WRITE_BEFORE && at == 0) out[-1] = total;
  if (fault == SHARED_BEHIND && at == last) reinterpret_cast<Vector*>(shared_memory() + 128)[threads] = {};
  out[fault == WRITE_BEHIND && at == last ? at + 1 : at] = total;
}

extern "C" const char* planted(const float* in, float* out, unsigned grid, unsigned blocks, unsigned threads, int fault,
                               uint64_t seed) {
  return fibers::launch(grid, blocks, threads, 128 + 16 * threads, seed,
                        [=] { sum_over_cluster(in, out, blocks, fault); });
}
