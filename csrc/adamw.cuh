// AdamW over many tensors at once: a sum of squares, and the update. Which tensors travels by value with the launch.
//
// The formula and the order of its operations are those of sft_kernels/ops/adamw/README.md, to the bit: compiled without
// contraction, and no operation but + − × ÷ √.
#pragma once

#include "device.cuh"

namespace sft::adamw {

constexpr int CHUNK = 16384;  // elements of a tensor that one block updates, as in tables.py
constexpr int THREADS = 128;
constexpr int NORM_BLOCKS = 1024;  // at most, on every machine: the order of a sum must not depend on it

// Columns of a row of tables.py, and of a group.
enum Column {
  PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, MASTER, STEP,
  NUMEL, FIRST_CHUNK, GROUP, INDEX, COPIES, ALIGNED, OFFSET, FIRST_MAP, MAPS,
  COLUMNS
};
enum Aligned { GRAD_ALIGNED = 1, REST_ALIGNED = 2 };
enum Hyper { LR, BETA1, BETA2, EPS, WEIGHT_DECAY, SIGN, MAX_NORM, SEED, HYPERS };

struct Row {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  void* master;          // fp32, or the remainders, int16; null without either
  float* step;
  int64_t numel;
  int64_t offset;  // of its first element in the whole
  int32_t first_chunk, group, index, copies;
  int32_t first_map;
  int16_t maps;
  bool grad_aligned;  // its address is a multiple of 16
  bool rest_aligned;  // all others are
};

// The bytes of arguments that CUDA passes; 256 of them are for what else there is.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int ARGUMENTS = 4096;
#else
constexpr int ARGUMENTS = 32764;
#endif
constexpr int MAX_ROWS = (ARGUMENTS - 256) / int(sizeof(Row));

struct Table {
  int32_t first_row, rows, first_chunk;  // of this launch, in the whole table
  Row row[MAX_ROWS];
};

struct Norm {
  double* partials;   // [NORM_BLOCKS]
  double* sums;       // the first is the sum of squares
  int32_t* finished;  // blocks; 0 before and after
  int32_t chunks;
  bool first;  // of the launches: the sum begins anew
  Table table;
};

struct Update {
  const int64_t* maps;     // [·, 2]
  const double* hyper;     // [groups, HYPERS]
  const double* sums;      // the sum of squares; how many ranks found infinities
  const float* grad_scale; // or null
  const float* found_inf;  // or null
  float* norm_out;         // null unless it is this launch's to write
  int64_t* skipped;        // the same
  int32_t* done;           // [rows] chunks; 0 before and after
  float* stats;            // [chunks, 3], or null
  bool has_norm, clip, skip, shared_found, round;
  Table table;
};

static_assert(sizeof(Norm) <= ARGUMENTS && sizeof(Update) <= ARGUMENTS);

// As many rows from `from` on as a launch takes, of the `count` there are; the rows taken.
inline int fill(Table& table, const int64_t* rows, int64_t from, int64_t count) {
  table.first_row = int32_t(from);
  table.rows = int32_t(count - from < MAX_ROWS ? count - from : MAX_ROWS);
  table.first_chunk = int32_t(rows[from * COLUMNS + FIRST_CHUNK]);
  const auto pointer = [](int64_t address) { return reinterpret_cast<void*>(address); };
  for (int i = 0; i < table.rows; ++i) {
    const int64_t* r = rows + (from + i) * COLUMNS;
    table.row[i] = {pointer(r[PARAM]), pointer(r[GRAD]), pointer(r[EXP_AVG]), pointer(r[EXP_AVG_SQ]),
                    pointer(r[MAX_EXP_AVG_SQ]), pointer(r[MASTER]), static_cast<float*>(pointer(r[STEP])), r[NUMEL],
                    r[OFFSET], int32_t(r[FIRST_CHUNK]), int32_t(r[GROUP]), int32_t(r[INDEX]), int32_t(r[COPIES]),
                    int32_t(r[FIRST_MAP]), int16_t(r[MAPS]), (r[ALIGNED] & GRAD_ALIGNED) != 0,
                    (r[ALIGNED] & REST_ALIGNED) != 0};
  }
  return table.rows;
}

// Chunks of a row; an empty tensor has one, for its step.
inline int64_t chunks_of(int64_t numel) { return numel > 0 ? (numel + CHUNK - 1) / CHUNK : 1; }

// Of a filled table.
inline int64_t chunks_of(const Table& table) {
  const Row& last = table.row[table.rows - 1];
  return last.first_chunk + chunks_of(last.numel) - table.first_chunk;
}

SFT_BODY int row_of(const Table& table, int chunk) {
  int low = 0, high = table.rows - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.row[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <class T, int COUNT>
SFT_BODY void load(const T* from, float (&x)[COUNT]) {
  if constexpr (COUNT == 1) {
    x[0] = to_float(*from);
  } else {
#pragma unroll
    for (int j = 0; j < COUNT / VEC<T>; ++j) {
      float part[VEC<T>];
      unpack<T>(read(reinterpret_cast<const Vector*>(from) + j), part);
#pragma unroll
      for (int k = 0; k < VEC<T>; ++k) x[j * VEC<T> + k] = part[k];
    }
  }
}

// As many from any address.
template <class T, int COUNT>
SFT_BODY void load_each(const T* from, float (&x)[COUNT]) {
#pragma unroll
  for (int k = 0; k < COUNT; ++k) x[k] = to_float(from[k]);
}

template <class T, int COUNT>
SFT_BODY void store(T* to, const float (&x)[COUNT]) {
  if constexpr (COUNT == 1) {
    *to = from_float<T>(x[0]);
  } else {
#pragma unroll
    for (int j = 0; j < COUNT / VEC<T>; ++j) {
      float part[VEC<T>];
#pragma unroll
      for (int k = 0; k < VEC<T>; ++k) part[k] = x[j * VEC<T> + k];
      write(reinterpret_cast<Vector*>(to) + j, pack<T>(part));
    }
  }
}

// The same of 16 bits that are no numbers.
template <int COUNT>
SFT_BODY void load(const uint16_t* from, uint32_t (&x)[COUNT]) {
  if constexpr (COUNT == 1) {
    x[0] = *from;
  } else {
    const Vector v = read(reinterpret_cast<const Vector*>(from));
#pragma unroll
    for (int k = 0; k < COUNT; ++k) x[k] = (v.word[k / 2] >> (16 * (k % 2))) & 0xffff;
  }
}

template <int COUNT>
SFT_BODY void store(uint16_t* to, const uint32_t (&x)[COUNT]) {
  if constexpr (COUNT == 1) {
    *to = uint16_t(x[0]);
  } else {
    Vector v;
#pragma unroll
    for (int k = 0; k < 4; ++k) v.word[k] = (x[2 * k] & 0xffff) | (x[2 * k + 1] << 16);
    write(reinterpret_cast<Vector*>(to), v);
  }
}

// The sum over the block, in thread 0. `memory`: one T a warp.
template <class T>
SFT_BODY T block_sum(T x, T* memory) {
  for (unsigned bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffff, x, bits);
  __syncthreads();  // what was in the memory has been read
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    x = memory[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) x += memory[warp];
  }
  return x;
}

// ---- the norm

template <class GRAD>
SFT_BODY void sum_of_squares(const Norm& p) {
  auto* memory = reinterpret_cast<double*>(shared_memory());
  const int thread = int(threadIdx.x);
  double total = 0;
  for (int chunk = int(blockIdx.x); chunk < p.chunks; chunk += int(gridDim.x)) {
    const Row& row = p.table.row[row_of(p.table, p.table.first_chunk + chunk)];
    const int64_t start = int64_t(p.table.first_chunk + chunk - row.first_chunk) * CHUNK;
    const int left = int(row.numel - start < CHUNK ? row.numel - start : CHUNK);
    const GRAD* g = static_cast<const GRAD*>(row.grad) + start;
    const int whole = row.grad_aligned ? left / VEC<GRAD> : 0;
    float squares = 0;
#pragma unroll 4
    for (int i = thread; i < whole; i += THREADS) {
      float x[VEC<GRAD>];
      load(g + i * VEC<GRAD>, x);
#pragma unroll
      for (int k = 0; k < VEC<GRAD>; ++k) squares += x[k] * x[k];
    }
    for (int i = whole * VEC<GRAD> + thread; i < left; i += THREADS) {
      const float x = to_float(g[i]);
      squares += x * x;
    }
    total += row.copies == 1 ? double(squares) : double(squares) / row.copies;
  }
  total = block_sum(total, memory);
  auto* last = reinterpret_cast<bool*>(memory + 32);
  if (thread == 0) {
    p.partials[blockIdx.x] = total;
    __threadfence();
    *last = atomicAdd(p.finished, 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  if (!*last) return;
  // The block that finishes last, whichever it is, adds up all of them in the one order.
  __threadfence();
  total = 0;
  for (int i = thread; i < int(gridDim.x); i += THREADS) total += const_cast<const volatile double*>(p.partials)[i];
  total = block_sum(total, memory);
  if (thread == 0) {
    *p.sums = p.first ? total : *p.sums + total;
    *p.finished = 0;
  }
}

// ---- the update

struct Scalars {
  float c, omega1, beta2, alpha2, eps, q, a, d;
  uint32_t key;
  bool skip;
};

// βᵗ by squaring.
SFT_BODY double power(double beta, int t) {
  double r = 1;
  for (; t > 0; t /= 2) {
    if (t % 2) r = r * beta;
    beta = beta * beta;
  }
  return r;
}

SFT_BODY uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

SFT_BODY Scalars scalars(const Update& p, const Row& row, float step, bool report) {
  Scalars s = {};
  const double* group = p.hyper + int64_t(row.group) * HYPERS;
  const double scale = p.grad_scale ? double(*p.grad_scale) : 1.0;
  double clip = 1;
  if (p.has_norm) {
    const double n = sqrt(p.sums[0]) / scale;
    if (p.clip) {
      const double over = (n + 1e-6) / group[MAX_NORM];
      clip = over <= 1 ? 1 : over;  // NaN stays NaN
    }
    s.skip = p.skip && !(fabs(n) < INFINITY);
    if (report && p.norm_out) *p.norm_out = float(n);
  }
  if (p.shared_found) {
    s.skip = s.skip || p.sums[1] > 0;
  } else if (p.found_inf) {
    s.skip = s.skip || *p.found_inf > 0;
  }
  if (report && p.skipped && s.skip) ++*p.skipped;
  const int t = int(step) + 1;
  const double lr = group[LR], beta1 = group[BETA1], beta2 = group[BETA2];
  s.c = float(group[SIGN] / (clip * scale));
  s.omega1 = float(beta1 <= 0.5 ? -beta1 : 1 - beta1);
  s.beta2 = float(beta2);
  s.alpha2 = float(1 - beta2);
  s.eps = float(group[EPS]);
  s.q = float(1 / sqrt(1 - power(beta2, t)));
  s.a = float(lr / (1 - power(beta1, t)));
  s.d = float(lr * group[WEIGHT_DECAY]);
  s.key = mix(mix(mix(uint32_t(int64_t(group[SEED])) + 0x9e3779b9u) ^ uint32_t(t)) ^ uint32_t(row.index));
  return s;
}

enum class Master { none, fp32, remainder };

struct Moved {
  float update = 0, weight = 0, lost = 0;  // Σ δ², Σ θ², updates rounded away
};

SFT_BODY bool is_finite(uint32_t b) { return (b & 0x7fffffff) < 0x7f800000; }
SFT_BODY bool is_nan(uint32_t b) { return (b & 0x7fffffff) > 0x7f800000; }

// 32 random bits for an element, by its place in the whole: in the shard where that is not MAPPED.
template <bool MAPPED>
SFT_BODY uint32_t random_bits(const Update& p, const Row& row, int64_t i, uint32_t key) {
  if constexpr (MAPPED) {
#pragma unroll 1
    for (int k = 0; k < row.maps; ++k) {
      const int64_t* map = p.maps + 2 * (row.first_map + k);
      i = i / map[0] * map[1] + i % map[0];
    }
  }
  i += row.offset;
  return mix(uint32_t(i) ^ (uint32_t(uint64_t(i) >> 32) * 0x9e3779b1u) ^ key);
}

// COUNT elements from `at` on, as vectors, except a gradient that is not aligned; where COUNT is 1, of any alignment.
template <class PARAM, class GRAD, class STATE, Master MASTER, int COUNT>
SFT_BODY void elements(const Update& p, const Row& row, const Scalars& s, int64_t at, Moved& moved) {
  auto* param = static_cast<PARAM*>(row.param) + at;
  auto* exp_avg = static_cast<STATE*>(row.exp_avg) + at;
  auto* exp_avg_sq = static_cast<STATE*>(row.exp_avg_sq) + at;
  auto* largest = static_cast<STATE*>(row.max_exp_avg_sq) + at;
  float g[COUNT], m[COUNT], v[COUNT], w[COUNT], theta[COUNT], next[COUNT];
  load(exp_avg, m);
  load(exp_avg_sq, v);
  if (row.max_exp_avg_sq) load(largest, w);
  if constexpr (MASTER == Master::fp32) {
    load(static_cast<const float*>(row.master) + at, theta);
  } else {
    load(param, theta);
  }
  uint32_t low[COUNT];
  if constexpr (MASTER == Master::remainder) load(static_cast<const uint16_t*>(row.master) + at, low);
  // Last: if the compiler makes a branch of it, everything else is under way by then.
  auto* grad = static_cast<const GRAD*>(row.grad) + at;
  if (COUNT == 1 || row.grad_aligned) {
    load(grad, g);
  } else {
    load_each(grad, g);
  }
  if constexpr (MASTER == Master::remainder) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      theta[k] = bits_to_float(float_to_bits(theta[k]) + uint32_t(int32_t(int16_t(low[k]))));
    }
  }

#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    g[k] = g[k] * s.c;
    const float mean = (s.omega1 <= 0 ? g[k] : m[k]) + s.omega1 * (g[k] - m[k]);
    m[k] = s.omega1 == 0 ? g[k] : mean;
    v[k] = s.beta2 == 0 ? g[k] * g[k] : (s.beta2 * v[k]) + (s.alpha2 * (g[k] * g[k]));
    w[k] = row.max_exp_avg_sq && (w[k] > v[k] || w[k] != w[k]) ? w[k] : v[k];
    const float delta = (s.a * (m[k] / (sqrtf(w[k]) * s.q + s.eps))) + (s.d * theta[k]);
    next[k] = theta[k] - delta;
    g[k] = delta;
  }
  store(exp_avg, m);
  store(exp_avg_sq, v);
  if (row.max_exp_avg_sq) store(largest, w);

  float kept[COUNT];  // of the new parameter
  if constexpr (MASTER == Master::remainder) {
    uint32_t high[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      const uint32_t b = float_to_bits(next[k]);
      high[k] = is_nan(b) ? 0x7fc0 : (b + 0x8000) >> 16;
      low[k] = is_nan(b) ? 0 : b & 0xffff;
      kept[k] = next[k];
    }
    store(static_cast<uint16_t*>(row.master) + at, low);
    store(reinterpret_cast<uint16_t*>(param), high);
  } else {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) kept[k] = next[k];
    if constexpr (std::is_same_v<PARAM, bf16>) {
      if (p.round) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
          const uint32_t b = float_to_bits(next[k]);
          const uint32_t rounded = (b + (random_bits<COUNT == 1>(p, row, at + k, s.key) >> 16)) & 0xffff0000;
          if (is_finite(b)) kept[k] = bits_to_float(rounded);
        }
      }
    }
    store(param, kept);
    if constexpr (MASTER == Master::fp32) store(static_cast<float*>(row.master) + at, next);
  }
  if (p.stats) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      const float stays = MASTER == Master::none ? to_float(from_float<PARAM>(kept[k])) : next[k];
      moved.update += g[k] * g[k];
      moved.weight += theta[k] * theta[k];
      moved.lost += g[k] != 0 && stays == theta[k] ? 1.0f : 0.0f;
    }
  }
}

template <class PARAM, class GRAD, class STATE, Master MASTER>
SFT_BODY void update(const Update& p) {
  constexpr bool HALF = sizeof(PARAM) == 2 || sizeof(GRAD) == 2 || sizeof(STATE) == 2;
  constexpr int COUNT = HALF ? 8 : 4;  // 16 bytes of the narrowest
  const int thread = int(threadIdx.x), chunk = p.table.first_chunk + int(blockIdx.x);
  const int local = row_of(p.table, chunk);
  const Row& row = p.table.row[local];
  auto& shared = *reinterpret_cast<Scalars*>(shared_memory());
  float step = 0;
  if (thread == 0) {
    step = *row.step;
    shared = scalars(p, row, step, blockIdx.x == 0);
  }
  __syncthreads();
  const Scalars s = shared;
  if (s.skip) return;

  const int64_t start = int64_t(chunk - row.first_chunk) * CHUNK;
  const int left = int(row.numel - start < CHUNK ? row.numel - start : CHUNK);
  const int whole = row.rest_aligned && !row.maps ? left / COUNT : 0;  // a map's divisions are worse than narrow accesses
  Moved moved;
  for (int i = thread; i < whole; i += THREADS) {
    elements<PARAM, GRAD, STATE, MASTER, COUNT>(p, row, s, start + i * COUNT, moved);
  }
  for (int i = whole * COUNT + thread; i < left; i += THREADS) {
    elements<PARAM, GRAD, STATE, MASTER, 1>(p, row, s, start + i, moved);
  }
  if (p.stats) {
    auto* memory = reinterpret_cast<float*>(shared_memory() + sizeof(Scalars));
    float* out = p.stats + int64_t(chunk) * 3;
    const float sums[3] = {moved.update, moved.weight, moved.lost};
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const float sum = block_sum(sums[k], memory);
      if (thread == 0) out[k] = sum;
    }
  }

  // Every block of the tensor has read the step before the last one writes it.
  if (thread == 0) {
    const int chunks = int((row.numel + CHUNK - 1) / CHUNK);
    int32_t* done = p.done + p.table.first_row + local;
    __threadfence();
    if (chunks <= 1) {
      *row.step = step + 1;
    } else if (atomicAdd(done, 1) == chunks - 1) {
      *row.step = step + 1;
      *done = 0;
    }
  }
}

// Calls `function` with the types of a combination: parameters, gradients and moments 0 fp32, 1 bf16, 2 fp16, and what
// they have beside, a Master. Whether there is such a kernel: moments in fp32 or in the dtype of the parameters (bf16 for
// fp32), gradients of that dtype or, for bf16, fp32.
template <class Function>
bool for_combination(int64_t param, int64_t grad, int64_t state, int64_t master, Function&& function) {
  const auto with_master = [&]<class PARAM, class GRAD, class STATE>(PARAM, GRAD, STATE) {
    using Kind = Master;
    switch (Kind(master)) {
      case Kind::none: function.template operator()<PARAM, GRAD, STATE, Kind::none>(); return true;
      case Kind::fp32:
        if constexpr (sizeof(PARAM) == 2) function.template operator()<PARAM, GRAD, STATE, Kind::fp32>();
        return sizeof(PARAM) == 2;
      case Kind::remainder:
        if constexpr (std::is_same_v<PARAM, bf16>) function.template operator()<PARAM, GRAD, STATE, Kind::remainder>();
        return std::is_same_v<PARAM, bf16>;
    }
    return false;
  };
  switch (100 * param + 10 * grad + state) {
    case 000: return with_master(float{}, float{}, float{});
    case 001: return with_master(float{}, float{}, bf16{});
    case 110: return with_master(bf16{}, bf16{}, float{});
    case 111: return with_master(bf16{}, bf16{}, bf16{});
    case 100: return with_master(bf16{}, float{}, float{});
    case 101: return with_master(bf16{}, float{}, bf16{});
    case 220: return with_master(fp16{}, fp16{}, float{});
    case 222: return with_master(fp16{}, fp16{}, fp16{});
    default: return false;
  }
}

constexpr size_t NORM_SHARED = 33 * sizeof(double), UPDATE_SHARED = sizeof(Scalars) + 32 * sizeof(float);

}  // namespace sft::adamw
