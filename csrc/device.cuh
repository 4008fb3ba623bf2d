// What kernel bodies use of a GPU beyond CUDA's own names: clusters, distributed shared memory, asynchronous copies.
// On the host tests/csrc/fibers.h gives both, so that every body also runs in the test suite.
#pragma once

#include "numbers.cuh"

#ifdef __CUDACC__
#define SFT_BODY __device__ __forceinline__

namespace sft {

// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Sixteen bytes from global to shared memory; the copying thread alone may read them after its copy_wait.
__device__ __forceinline__ void copy_async(Vector* shared, const Vector* global) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// All threads of a cluster arrive; past the wait each sees what every other wrote before it arrived.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// The same without that order: nobody may read past the wait what was written before. It costs no MEMBAR.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The same place in the shared memory of the cluster's block `rank`.
template <class T>
__device__ __forceinline__ const T* cluster_peer(const T* own, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(own), "r"(rank));
  return reinterpret_cast<const T*>(address);
#else
  return own;
#endif
}

}  // namespace sft

#else
#define SFT_BODY inline
#include "fibers.h"
#endif
