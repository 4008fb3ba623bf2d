// AdamW over fibers, for ctypes: the launches as csrc/adamw.cu makes them.
#include "adamw.cuh"

#include <memory>

using namespace sft;
using namespace sft::adamw;

extern "C" {

int adamw_threads() { return THREADS; }
int adamw_norm_shared() { return NORM_SHARED; }
int adamw_update_shared() { return UPDATE_SHARED; }
int adamw_max_rows() { return MAX_ROWS; }

// What went wrong, or null.
const char* adamw_sum_of_squares(const int64_t* table, double* partials, double* sums, int32_t* finished, int64_t first,
                                 int64_t last, int64_t grad, bool anew, uint64_t seed) {
  auto p = std::make_unique<Norm>(Norm{partials, sums, finished, 0, false, {}});
  for (int64_t row = first; row < last; row += p->table.rows) {
    fill(p->table, table, row, last);
    p->chunks = int32_t(chunks_of(p->table));
    p->first = anew && row == first;
    const unsigned blocks = p->chunks < NORM_BLOCKS ? p->chunks : NORM_BLOCKS;
    const char* error = fibers::launch(blocks, 1, THREADS, NORM_SHARED, seed, [&] {
      grad == 0 ? sum_of_squares<float>(*p) : grad == 1 ? sum_of_squares<bf16>(*p) : sum_of_squares<fp16>(*p);
    });
    if (error) return error;
  }
  return nullptr;
}

const char* adamw_update(const Update* given, const int64_t* table, int64_t first, int64_t last, int64_t param,
                         int64_t grad, int64_t state, int64_t master, uint64_t seed) {
  auto p = std::make_unique<Update>();
  std::memcpy(p.get(), given, offsetof(Update, table));
  for (int64_t row = first; row < last; row += p->table.rows) {
    fill(p->table, table, row, last);
    const char* error = nullptr;
    const bool carried = for_combination(param, grad, state, master, [&]<class P, class G, class S, Master M> {
      const unsigned blocks = unsigned(chunks_of(p->table));
      error = fibers::launch(blocks, 1, THREADS, UPDATE_SHARED, seed, [&] { update<P, G, S, M>(*p); });
    });
    if (!carried) return "no kernel for this combination of dtypes";
    if (error) return error;
    p->norm_out = nullptr;
    p->skipped = nullptr;
  }
  return nullptr;
}
}
