// The core of both losses for one row of logits, by a cluster of blocks that hold it in their shared memory: one read and
// one write of each logit. Where the row does not fit, or there are no clusters, a block reads it twice.
//
// Formulas and order are those of sft_kernels/ops/softmax_grad/triton_impl.py, without logit_scale and z_loss.
#pragma once

#include "device.cuh"

namespace sft::softmax_grad {

struct Params {
  const void* logits;        // [N, V]
  void* out;                 // [N, V]: dlogits, may be logits
  const int64_t* target;     // [N]
  const float* scale;        // [N], or null: no gradient
  const double* given_lse;   // [N], or null: of these logits
  const bool* keep;          // [N], or null: all rows
  double* lse;               // [N], and what follows of RowStats; null where it is given
  float* target_logit;       // [N]
  float* max_logit;          // [N]
  double* mean_logit;        // [N], or null
  double* sum_logit;         // [N], or null
  int64_t stride;            // elements from one row of logits to the next
  int64_t stride_out;
  int32_t V;
  unsigned parts;            // blocks of a row
  float softcap;
  float smoothing;           // ε
  float uniform;             // ε / classes
};

enum class Reads {
  staged,  // once, into shared memory
  twice,
  given,   // once: the logsumexp is known
};

// Over some of a row's logits u. Where a sum is of exponentials, all but the target's: where the model is sure, p_y − 1
// is made of the rest, which would lose its digits beside 1.
struct Sums {
  float largest = -INFINITY;
  float exponentials = 0;  // Σ exp(u − base)
  float away = 0;          // Σ exp(u − base) (u − base)
  float offset = 0;        // Σ (u − base): of one sign, so that no digits cancel
  float count = 0;         // of what is in it
  float target = 0;        // the target's u, once
};

struct Row {
  float base;
  float factor;     // of exp(u − base) in the gradient
  float at_target;  // the target's entry
};

// Ahead of the staged logits.
struct alignas(16) Shared {
  Sums sums[32];  // of each warp
  Row row;
};

constexpr int THREADS_STAGED = 256, THREADS_TWICE = 1024;

// How a row of V logits is taken. A function of nothing else, so that a row's sums do not depend on its neighbours.
struct Plan {
  Reads reads;
  unsigned parts, threads;
  size_t shared_bytes;
};

// `clusters`: whether blocks can read each other's shared memory, of which each can have `shared_limit` bytes.
inline Plan plan(int32_t V, int element_size, bool given, bool clusters, size_t shared_limit) {
  const int64_t groups = V / (16 / element_size);
  // A slice of 32 KB leaves room for four blocks or more: while one waits another loads or stores. One of 80 KB for two.
  constexpr int64_t SLICE = (32 << 10) / 16;
  const int64_t most = (int64_t(shared_limit < (81 << 10) ? shared_limit : 81 << 10) - int64_t(sizeof(Shared))) / 16;
  unsigned parts = 1;
  const unsigned most_parts = given ? 1024 : clusters ? 8 : 1;
  while (parts < most_parts && groups > SLICE * parts) parts *= 2;
  const int64_t slice = (groups + parts - 1) / parts;
  const Reads reads = given ? Reads::given : slice <= most ? Reads::staged : Reads::twice;
  if (reads == Reads::twice) parts = 1;
  const int64_t limit = reads == Reads::twice ? THREADS_TWICE : THREADS_STAGED;
  int64_t threads = ((reads == Reads::twice ? groups : slice) / 4 + 31) / 32 * 32;  // four vectors a thread and more
  threads = threads < 32 ? 32 : threads > limit ? limit : threads;
  const size_t staged = reads == Reads::staged ? 16 * size_t(slice) : 0;
  return {reads, parts, unsigned(threads), sizeof(Shared) + staged};
}

// exp(x) as 2^(x log2 e), in two instructions. Its relative error grows as |x| of a negative x: far slower than exp(x)
// falls, so that sums and gradients see nothing of it.
SFT_BODY float exp_of(float x) {
  x *= 1.4426950408889634f;
#ifdef __CUDACC__
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x));
  return e;
#else
  return exp2f(x);
#endif
}

// What is subtracted before exponentials: the maximum, but 0 where all is ruled out.
SFT_BODY float base_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// How far below `base` a part's own base lies, at most as far as exp of it is 0: beyond, its product with a part's
// exponentials could be infinite, and 0 times that is NaN.
SFT_BODY float below_of(float largest, float base) { return fmaxf(base_of(largest) - base, -200.0f); }

// tanh to fp32's precision: from exp(−2 |x|), near 0 by its series.
SFT_BODY float tanh_of(float x) {
  const float e = exp_of(-2.0f * fabsf(x));
  const float far = (1.0f - e) / (1.0f + e);
  const float q = x * x;
  const float near = fmaf(q, fmaf(q, fmaf(q, fmaf(q, 62.0f / 2835, -17.0f / 315), 2.0f / 15), -1.0f / 3), 1.0f);
  return q < 0.0625f ? x * near : copysignf(far, x);
}

// 1 − tanh² of a capped logit's argument, with its digits also where the cap is reached.
SFT_BODY float slope_of(float x, float softcap) {
  const float e = exp_of(fabsf(x) * (-2.0f / softcap));
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}

template <bool CAPPED>
SFT_BODY float shape(float x, float softcap) {
  if constexpr (CAPPED) return tanh_of(x / softcap) * softcap;
  return x;
}

// More logits; the target is the one at `y`, if it is among them. What nobody asked for is not summed.
template <int COUNT>
SFT_BODY void add(Sums& sums, const Params& p, const float (&u)[COUNT], int y) {
  float largest = sums.largest;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) largest = fmaxf(largest, u[k]);
  const float base = base_of(largest);
  if (largest > sums.largest) {
    const float r = exp_of(sums.largest - base);
    sums.away = r * fmaf(sums.exponentials, below_of(sums.largest, base), sums.away);
    sums.exponentials *= r;
    sums.offset += sums.count * (base_of(sums.largest) - base);
    sums.largest = largest;
  }
  float e[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    e[k] = k == y ? 0.0f : exp_of(u[k] - base);
    sums.exponentials += e[k];
    if (k == y) sums.target = u[k];
  }
  if (p.mean_logit) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) sums.away += e[k] > 0.0f ? e[k] * (u[k] - base) : 0.0f;
  }
  if (p.sum_logit) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) sums.offset += u[k] - base;
    sums.count += COUNT;
  }
}

SFT_BODY Sums merge(const Sums& a, const Sums& b) {
  Sums sum;
  sum.largest = fmaxf(a.largest, b.largest);
  const float base = base_of(sum.largest), r_a = exp_of(a.largest - base), r_b = exp_of(b.largest - base);
  const float away_a = fmaf(a.exponentials, below_of(a.largest, base), a.away);
  const float away_b = fmaf(b.exponentials, below_of(b.largest, base), b.away);
  sum.exponentials = r_a * a.exponentials + r_b * b.exponentials;
  sum.away = r_a * away_a + r_b * away_b;
  const float offset_a = a.offset + a.count * (base_of(a.largest) - base);
  const float offset_b = b.offset + b.count * (base_of(b.largest) - base);
  sum.offset = offset_a + offset_b;
  sum.count = a.count + b.count;
  sum.target = a.target + b.target;
  return sum;
}

// The sum over a warp, in its lane 0.
SFT_BODY Sums warp_sum(Sums sums) {
#pragma unroll
  for (unsigned bits = 16; bits > 0; bits /= 2) {
    Sums other;
    other.largest = __shfl_xor_sync(0xffffffff, sums.largest, bits);
    other.exponentials = __shfl_xor_sync(0xffffffff, sums.exponentials, bits);
    other.away = __shfl_xor_sync(0xffffffff, sums.away, bits);
    other.offset = __shfl_xor_sync(0xffffffff, sums.offset, bits);
    other.count = __shfl_xor_sync(0xffffffff, sums.count, bits);
    other.target = __shfl_xor_sync(0xffffffff, sums.target, bits);
    sums = merge(sums, other);
  }
  return sums;
}

// What the gradient needs of a row whose sums are complete; the statistics are written where `write`.
SFT_BODY Row finish(const Params& p, int64_t i, const Sums& sums, bool here, bool write) {
  const float target = here ? sums.target : -INFINITY;
  const float base = base_of(sums.largest), e_y = exp_of(target - base);
  const double total = double(sums.exponentials) + double(e_y);
  if (write) {
    p.lse[i] = double(base) + log(total);
    p.target_logit[i] = target;
    p.max_logit[i] = sums.largest;
    if (p.mean_logit) {
      const float away = sums.away + (e_y > 0.0f ? e_y * (target - base) : 0.0f);
      p.mean_logit[i] = double(base) + double(away) / (total > 0 ? total : 1.0);
    }
    if (p.sum_logit) p.sum_logit[i] = double(base) * p.V + double(sums.offset);
  }
  const float a = p.scale ? p.scale[i] : 0.0f;
  const float minus = -sums.exponentials / float(total);  // p_y − 1
  return {base, a / float(total), a * (minus + p.smoothing - p.uniform)};
}

template <class T, Reads READS, bool CAPPED>
SFT_BODY void row(const Params& p) {
  constexpr int COUNT = VEC<T>;
  const unsigned part = blockIdx.x % p.parts, thread = threadIdx.x, threads = blockDim.x;
  const int64_t i = blockIdx.x / p.parts;
  const T* x = static_cast<const T*>(p.logits) + i * p.stride;
  T* d = static_cast<T*>(p.out) + i * p.stride_out;
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  auto* stage = reinterpret_cast<Vector*>(shared_memory() + sizeof(Shared));

  // Whole vectors begin `skip` columns into a row, at 16 bytes. The columns before and behind are the edges: each a
  // thread's of the last block.
  const int until = int(-reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T)), skip = until < p.V ? until : p.V;
  const int groups = (p.V - skip) / COUNT, share = (groups + int(p.parts) - 1) / int(p.parts);
  const int begin = int(part) * share < groups ? int(part) * share : groups;
  const int end = begin + share < groups ? begin + share : groups;
  const auto* x_vector = reinterpret_cast<const Vector*>(x + skip);
  const bool edge = part == p.parts - 1 && int(thread) < p.V - groups * COUNT;
  const int c_edge = int(thread) < skip ? int(thread) : int(thread) + groups * COUNT;
  const bool alike = (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(d)) % 16 == 0;
  const int mine = begin + int(thread);

  const bool kept = !p.keep || p.keep[i];
  const int64_t y_long = kept ? p.target[i] : -1;
  const bool here = y_long >= 0 && y_long < p.V;
  const int y = here ? int(y_long) : -COUNT - 1;  // in no vector

  auto write_group = [&](int g, const float(&value)[COUNT]) {
    if (alike) {
      write(reinterpret_cast<Vector*>(d + skip) + g, pack<T>(value));
    } else {
#pragma unroll
      for (int k = 0; k < COUNT; ++k) d[skip + g * COUNT + k] = from_float<T>(value[k]);
    }
  };

  if (!kept) {
    if (READS != Reads::given && part == 0 && thread == 0) {
      p.lse[i] = 0;
      p.target_logit[i] = p.max_logit[i] = 0;
      if (p.mean_logit) p.mean_logit[i] = 0;
      if (p.sum_logit) p.sum_logit[i] = 0;
    }
    if (p.scale) {
      const float zeros[COUNT] = {};
      for (int g = mine; g < end; g += int(threads)) write_group(g, zeros);
      if (edge) d[c_edge] = from_float<T>(0.0f);
    }
    return;
  }

  Row row;
  float x_edge = edge ? to_float(x[c_edge]) : 0.0f;
  if constexpr (READS == Reads::given) {
    const double lse = p.given_lse[i];
    row.base = float(lse);
    if (thread == 0) {
      const float a = p.scale[i];
      shared.row.factor = a / exp_of(float(lse - double(row.base)));
      shared.row.at_target = 0;
      if (here) {  // read before any thread of the one block that writes there
        const double u_y = shape<CAPPED>(to_float(x[y]), p.softcap);
        shared.row.at_target = a * (float(expm1(u_y - lse)) + p.smoothing - p.uniform);
      }
    }
    __syncthreads();
    row.factor = shared.row.factor;
    row.at_target = shared.row.at_target;
  } else {
    if constexpr (READS == Reads::staged) {
      for (int g = mine; g < end; g += int(threads)) copy_async(&stage[g - begin], &x_vector[g]);
      copy_wait();
    }
    Sums sums;
#pragma unroll 2
    for (int g = mine; g < end; g += int(threads)) {
      float u[COUNT];
      unpack<T>(read(READS == Reads::staged ? stage + (g - begin) : x_vector + g), u);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) u[k] = shape<CAPPED>(u[k], p.softcap);
      add(sums, p, u, y - skip - g * COUNT);
    }
    if (edge) {
      const float u[1] = {shape<CAPPED>(x_edge, p.softcap)};
      add(sums, p, u, y - c_edge);
    }

    sums = warp_sum(sums);
    if (thread % 32 == 0) shared.sums[thread / 32] = sums;
    const bool cluster = READS == Reads::staged && p.parts > 1;
    if (cluster) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
    if (thread < 32) {  // in the same order in every block of the cluster
      const unsigned warps = threads / 32;
      Sums all;
      for (unsigned j = thread; j < p.parts * warps; j += 32) {
        const Sums* theirs = &shared.sums[j % warps];
        all = merge(all, cluster ? *cluster_peer(theirs, j / warps) : *theirs);
      }
      all = warp_sum(all);
      if (thread == 0) shared.row = finish(p, i, all, here, part == 0);
    }
    __syncthreads();
    row = shared.row;
    // The others' sums are read; no block ends before the last has read its own. Relaxed is enough, for nothing is
    // published: warp 0 alone read the others' memory, its shuffles had every value in a register, and the row that
    // came of them went through the barrier above. A load whose value was used is over. PTX has no relaxed wait.
    if (cluster) cluster_arrive_relaxed();
  }

  if (p.scale) {
    // ∂loss/∂u_v = p_v − (1 − ε) [v = y] − ε / V. From the back: what was read last may still be in the cache.
    const float minus_uniform = -p.scale[i] * p.uniform;
    const int last = mine < end ? mine + (end - 1 - mine) / int(threads) * int(threads) : -1;
    auto gradient = [&](float x, bool at_target) {
      float g = fmaf(row.factor, exp_of(shape<CAPPED>(x, p.softcap) - row.base), minus_uniform);
      if (at_target) g = row.at_target;
      return CAPPED ? g * slope_of(x, p.softcap) : g;
    };
#pragma unroll 2
    for (int g = last; g >= mine; g -= int(threads)) {
      float value[COUNT];
      unpack<T>(read(READS == Reads::staged ? stage + (g - begin) : x_vector + g), value);
      const int k_y = y - skip - g * COUNT;
#pragma unroll
      for (int k = 0; k < COUNT; ++k) value[k] = gradient(value[k], k == k_y);
      write_group(g, value);
    }
    if (edge) d[c_edge] = from_float<T>(gradient(x_edge, c_edge == y));
  }
  if (READS == Reads::staged && p.parts > 1) cluster_wait();
}

}  // namespace sft::softmax_grad
