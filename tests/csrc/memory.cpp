// Global memory between two pages that cannot be touched.
#include <map>

#include "fibers.h"

struct Allocation {
  unsigned char *begin, *end, *data_end;
};
static std::map<unsigned char*, Allocation> allocations;

extern "C" {

// `bytes` at an address that is `phase` modulo 16: as near to the end of its pages as that allows, or to their start.
unsigned char* allocate(size_t bytes, unsigned phase, bool at_end) {
  const size_t page = fibers::pages(1), inside = fibers::pages(bytes + 16);
  unsigned char* begin = fibers::map(inside + 2 * page, PROT_NONE) + page;
  mprotect(begin, inside, PROT_READ | PROT_WRITE);
  std::memset(begin, 0xa5, inside);
  size_t offset = at_end ? inside - bytes : phase;
  offset -= (offset - phase) % 16;
  allocations[begin + offset] = {begin, begin + inside, begin + offset + bytes};
  return begin + offset;
}

// Gives it back; whether nothing beside its bytes was written.
bool release(unsigned char* data) {
  const auto [begin, end, data_end] = allocations.at(data);
  bool intact = true;
  for (auto* p = begin; p < data; ++p) intact = intact && *p == 0xa5;
  for (auto* p = data_end; p < end; ++p) intact = intact && *p == 0xa5;
  munmap(begin - fibers::pages(1), end - begin + 2 * fibers::pages(1));
  allocations.erase(data);
  return intact;
}
}
