// CUDA on the host, for tests: every CUDA thread is a fiber with a stack of its own, run until it waits.
//
// The order in which fibers run is shuffled by a seed, so is that of clusters, and by the seed a warp or a block runs
// far ahead of the others: what is right only in some order is wrong under some seed. Shared memory is full of 0xff when
// a block begins and out of reach when it has ended; behind it, and around global memory from memory.cpp, no byte can be
// touched. An asynchronous copy is done when it is waited for, no sooner. Behind a cluster's barrier at which someone
// arrived relaxed, no peer's memory may be read. A launch returns what went wrong, or nullptr. Not shown: fences, the
// asynchronous proxy.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "numbers.cuh"

#define __global__
#define __device__
#define __forceinline__ inline
#define __syncthreads() fibers::wait(fibers::current->block->barrier)
#define threadIdx (fibers::current->thread)
#define blockIdx (fibers::current->block->index)
#define blockDim (fibers::block_size)
#define gridDim (fibers::grid_size)

namespace fibers {

struct Index {
  unsigned x = 0;
};

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  bool releases = true;  // whether all arrivals of this generation do
  bool released = true;  // whether all of the last one did
};

struct Warp {
  Barrier barrier;
  uint64_t slot[2][32];  // by turns, so that nobody overwrites what another has yet to read
};

struct Block {
  Index index;
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  unsigned char* pages = nullptr;  // that it lies in
  unsigned running = 0;
};

struct Copy {
  sft::Vector* to;
  const sft::Vector* from;
};

struct Fiber {
  Index thread;
  Block* block = nullptr;
  jmp_buf resume;
  ucontext_t start;
  const Barrier* waits = nullptr;  // until its generation is no longer this:
  unsigned generation = 0;
  unsigned cluster_generation = 0;  // at this fiber's arrival
  unsigned exchanges = 0;
  bool started = false, done = false;
  std::vector<Copy> copies;
};

inline Index block_size, grid_size;
inline Fiber* current;
inline std::vector<Block>* cluster;
inline Barrier cluster_barrier;
inline const std::function<void()>* body;
inline jmp_buf scheduler;
inline sigjmp_buf escape;
inline const char* failure;
inline uint64_t random_state;

inline size_t pages(size_t bytes) {
  const size_t page = sysconf(_SC_PAGESIZE);
  return (bytes + page - 1) / page * page;
}

inline unsigned char* map(size_t bytes, int protection) {
  return static_cast<unsigned char*>(mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

inline unsigned below(unsigned n) {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return unsigned(random_state >> 33) % n;
}

template <class T>
void shuffle(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(unsigned(i))]);
}

[[noreturn]] inline void fail(const char* why) {
  failure = why;
  siglongjmp(escape, 1);
}

inline void on_fault(int) { fail("access out of bounds"); }

// ---- what a fiber calls

__attribute__((noinline)) inline void pause() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

inline unsigned arrive(Barrier& barrier, bool release = true) {
  const unsigned generation = barrier.generation;
  barrier.releases &= release;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    barrier.released = std::exchange(barrier.releases, true);
    ++barrier.generation;
  }
  return generation;
}

inline void wait_past(const Barrier& barrier, unsigned generation) {
  current->waits = &barrier;
  current->generation = generation;
  pause();  // also where nobody else is missing: any other may go first
}

inline void wait(Barrier& barrier) { wait_past(barrier, arrive(barrier)); }

// Every lane of the warp gives a value; the slots that hold all of them.
template <class T>
const uint64_t* exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffff) fail("a warp's exchange without some of its lanes");
  Warp& warp = current->block->warps[current->thread.x / 32];
  uint64_t* slot = warp.slot[current->exchanges++ % 2];
  std::memcpy(&slot[current->thread.x % 32], &value, sizeof value);
  wait(warp.barrier);
  return slot;
}

template <class T>
T from_lane(unsigned mask, T value, unsigned lane) {
  const uint64_t* slot = exchange(mask, value);
  if (lane < 32) std::memcpy(&value, &slot[lane], sizeof value);
  return value;
}

// ---- the scheduler

inline void enter() {
  (*body)();
  current->done = true;
  if (!current->copies.empty()) fail("a copy that nobody waited for");
  _longjmp(scheduler, 1);
}

constexpr size_t STACK = 64 << 10;

__attribute__((noinline)) inline void prepare(Fiber& fiber, unsigned char* stack) {
  getcontext(&fiber.start);
  fiber.start.uc_stack = {stack, 0, STACK};
  makecontext(&fiber.start, enter, 0);
}

__attribute__((noinline)) inline void run(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (!std::exchange(fiber.started, true)) setcontext(&fiber.start);
  _longjmp(fiber.resume, 1);
}

inline bool can_move(const Fiber& fiber) {
  return !fiber.done && !(fiber.waits && fiber.waits->generation == fiber.generation);
}

// By turns, or one warp, or one block, as far as it gets before any other moves.
inline void run_cluster(std::vector<Fiber*>& order, size_t shared_pages) {
  enum { BY_TURNS, BY_WARPS, BY_BLOCKS };
  const unsigned how = below(3);
  while (!order.empty()) {
    shuffle(order);
    const Fiber* first = nullptr;
    bool moved = true;
    while (moved) {
      moved = false;
      for (Fiber* fiber : order) {
        if (!can_move(*fiber)) continue;
        if (!first) first = fiber;
        if (how != BY_TURNS && fiber->block != first->block) continue;
        if (how == BY_WARPS && fiber->thread.x / 32 != first->thread.x / 32) continue;
        fiber->waits = nullptr;
        run(*fiber);
        moved = how != BY_TURNS;
        if (fiber->done && --fiber->block->running == 0) mprotect(fiber->block->pages, shared_pages, PROT_NONE);
      }
    }
    if (!first) fail("deadlock: a barrier that not all threads reach");
    std::erase_if(order, [](Fiber* fiber) { return fiber->done; });
  }
}

// Calls `all`; fail() ends it.
__attribute__((noinline)) inline void until_failure(const std::function<void()>& all) {
  struct sigaction action = {}, segv = {}, bus = {};
  action.sa_handler = on_fault;
  action.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &action, &segv);
  sigaction(SIGBUS, &action, &bus);
  if (sigsetjmp(escape, 1) == 0) all();
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
}

inline const char* launch(unsigned grid, unsigned blocks, unsigned threads, size_t shared_bytes, uint64_t seed,
                          const std::function<void()>& kernel) {
  if (grid % blocks || threads % 32 || threads > 1024 || blocks > 8) return "no such launch";
  const size_t shared_pages = pages(shared_bytes + 1), page = pages(1);
  static unsigned char* stacks = map(8 * 1024 * STACK, PROT_READ | PROT_WRITE);
  std::vector<Fiber> fibers(blocks * threads);
  std::vector<Block> members(blocks);
  std::vector<unsigned char*> shared(blocks);
  for (auto& memory : shared) memory = map(shared_pages + page, PROT_NONE);
  block_size = {threads}, grid_size = {grid};
  cluster = &members;
  body = &kernel;
  failure = nullptr;
  random_state = seed * 0x9e3779b97f4a7c15 + 0x2545f4914f6cdd1d;
  std::vector<unsigned> clusters(grid / blocks);
  for (unsigned i = 0; i < clusters.size(); ++i) clusters[i] = i;
  shuffle(clusters);

  until_failure([&] {
    for (unsigned which : clusters) {
      std::vector<Fiber*> order;
      cluster_barrier = {blocks * threads};
      for (unsigned b = 0; b < blocks; ++b) {
        mprotect(shared[b], shared_pages, PROT_READ | PROT_WRITE);
        std::memset(shared[b], 0xff, shared_pages);
        // Its end is the page's: the next byte is out of bounds.
        unsigned char* memory = shared[b] + shared_pages - (shared_bytes + 15) / 16 * 16;
        members[b] = {{which * blocks + b}, {threads}, std::vector<Warp>(threads / 32), memory, shared[b], threads};
        for (auto& warp : members[b].warps) warp.barrier.expected = 32;
        for (unsigned t = 0; t < threads; ++t) {
          Fiber& fiber = fibers[b * threads + t];
          fiber = Fiber{};
          fiber.thread.x = t;
          fiber.block = &members[b];
          prepare(fiber, stacks + (b * threads + t) * STACK);
          order.push_back(&fiber);
        }
      }
      run_cluster(order, shared_pages);
    }
  });
  for (auto* memory : shared) munmap(memory, shared_pages + page);
  return failure;
}

}  // namespace fibers

// ---- CUDA's names

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned lane) {
  return fibers::from_lane(mask, value, lane % 32);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits) {
  return fibers::from_lane(mask, value, fibers::current->thread.x % 32 ^ bits);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return fibers::from_lane(mask, value, fibers::current->thread.x % 32 + delta);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* slot = fibers::exchange(mask, uint64_t(vote));
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) ballot |= unsigned(slot[lane]) << lane;
  return ballot;
}

inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffff; }

template <class T>
T atomicAdd(T* at, T value) {
  return std::exchange(*at, *at + value);
}

inline void __threadfence() {}

namespace sft {

inline unsigned char* shared_memory() { return fibers::current->block->shared; }

inline void copy_async(Vector* shared, const Vector* global) { fibers::current->copies.push_back({shared, global}); }

inline void copy_wait() {
  for (auto [to, from] : fibers::current->copies) *to = *from;
  fibers::current->copies.clear();
}

inline void cluster_arrive() { fibers::current->cluster_generation = fibers::arrive(fibers::cluster_barrier); }
inline void cluster_arrive_relaxed() {
  fibers::current->cluster_generation = fibers::arrive(fibers::cluster_barrier, false);
}
inline void cluster_wait() { fibers::wait_past(fibers::cluster_barrier, fibers::current->cluster_generation); }

template <class T>
const T* cluster_peer(const T* own, unsigned rank) {
  if (!fibers::cluster_barrier.released) fibers::fail("a peer's memory behind a relaxed arrival");
  const auto offset = reinterpret_cast<const unsigned char*>(own) - shared_memory();
  return reinterpret_cast<const T*>((*fibers::cluster)[rank].shared + offset);
}

}  // namespace sft
