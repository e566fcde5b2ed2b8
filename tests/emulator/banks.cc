// Bank conflicts in shared memory. The kernels are compiled with GCC's -fsanitize=thread, which calls a
// function at each access to memory; these functions are here, in place of ThreadSanitizer's own.
//
// Lanes run one after another, so what a warp does as one instruction is put together afterwards: between two
// meetings of its lanes (a collective, a barrier) the n-th access of each lane at one place in the code.
// Where lanes skip different turns of a loop, accesses of different turns come together. There are 32 banks
// of 4 bytes; accesses of up to 4 bytes are served for the whole warp at once, of 8 for half of it, of 16 for
// a quarter. The degree is the largest number of different words in one bank: as many wavefronts it takes.
// One word is read for all its lanes at once; atomics at one word are not, which is counted apart and is in
// no degree.
//
// Not modelled: what the compiler keeps in registers, makes wider or moves (kernels are compiled unoptimised,
// so an access is what the source says); memcpy; where static arrays lie, so conflicts between two arrays in
// one instruction.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "internal.h"

namespace deepen {
namespace emulator {

enum class Access { read, write, atomic };

// A warp's access, if its lanes run side by side.
struct Instruction {
  uint32_t lanes = 0;
  uintptr_t addresses[32];
};

// What the lanes of a warp have done at one place since the warp last met.
struct Site {
  Access access;
  unsigned bytes;
  std::vector<Instruction> instructions;
  size_t next[32] = {};  // by lane
};

struct WarpAccesses {
  std::unordered_map<const void*, Site> sites;
  std::vector<const void*> used;
};

struct Statistics {
  Access access;
  unsigned bytes;
  uint64_t instructions = 0, least = 0, wavefronts = 0;
  unsigned worst = 0;
  uint64_t worst_count = 0;
  unsigned same_word = 0;  // lanes of an atomic at one word, at most
};

static std::map<unsigned, WarpAccesses> warps;
static std::map<std::string, std::map<const void*, Statistics>> kernels;

static void record(Access access, const void* address, unsigned bytes, const void* place) {
  const unsigned thread = thread_with_shared(address);
  if (thread == kNoThread) return;
  WarpAccesses& warp = warps[thread / 32];
  const auto [found, is_new] = warp.sites.try_emplace(place, Site{access, bytes, {}, {}});
  Site& site = found->second;
  if (site.instructions.empty()) warp.used.push_back(place);
  const size_t n = site.next[thread % 32]++;
  if (n == site.instructions.size()) site.instructions.emplace_back();
  site.instructions[n].lanes |= 1u << thread % 32;
  site.instructions[n].addresses[thread % 32] = reinterpret_cast<uintptr_t>(address);
}

// The largest number of different words in one bank, for the lanes `first` to `first + count - 1`; 0 if none
// of them takes part.
static unsigned degree(const Instruction& instruction, unsigned bytes, unsigned first, unsigned count) {
  std::vector<uintptr_t> words;
  for (unsigned lane = first; lane < first + count; ++lane) {
    if (!(instruction.lanes >> lane & 1)) continue;
    const uintptr_t begin = instruction.addresses[lane] / 4,
                    last = (instruction.addresses[lane] + bytes - 1) / 4;
    for (uintptr_t word = begin; word <= last; ++word) words.push_back(word);
  }
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  unsigned in_bank[32] = {}, most = 0;
  for (const uintptr_t word : words) most = std::max(most, ++in_bank[word % 32]);
  return most;
}

static unsigned most_at_one_word(const Instruction& instruction) {
  std::map<uintptr_t, unsigned> lanes;
  unsigned most = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (instruction.lanes >> lane & 1) most = std::max(most, ++lanes[instruction.addresses[lane] / 4]);
  }
  return most;
}

static void count(const Instruction& instruction, Statistics* statistics) {
  const unsigned parts = statistics->bytes > 8 ? 4 : statistics->bytes > 4 ? 2 : 1;
  unsigned worst = 0;
  for (unsigned part = 0; part < parts; ++part) {
    const unsigned one = degree(instruction, statistics->bytes, part * (32 / parts), 32 / parts);
    statistics->least += one > 0;
    statistics->wavefronts += one;
    worst = std::max(worst, one);
  }
  ++statistics->instructions;
  if (worst > statistics->worst) {
    statistics->worst = worst;
    statistics->worst_count = 0;
  }
  statistics->worst_count += worst == statistics->worst;
  if (statistics->access == Access::atomic)
    statistics->same_word = std::max(statistics->same_word, most_at_one_word(instruction));
}

void warp_met(unsigned number, const char* kernel) {
  WarpAccesses& warp = warps[number];
  if (warp.used.empty()) return;
  auto& places = kernels[kernel];
  for (const void* const place : warp.used) {
    Site& site = warp.sites.at(place);
    Statistics& statistics = places.try_emplace(place, Statistics{site.access, site.bytes}).first->second;
    for (const Instruction& one : site.instructions) count(one, &statistics);
    site.instructions.clear();
    std::fill(std::begin(site.next), std::end(site.next), 0);
  }
  warp.used.clear();
}

void record_atomic(const void* address, unsigned bytes, const void* place) {
  record(Access::atomic, address, bytes, place);
}

}  // namespace emulator
}  // namespace deepen

using namespace deepen::emulator;

// --- What the instrumented kernels call
// ----------------------------------------------------------------------------------

#define DEEPEN_PLACE __builtin_extract_return_addr(__builtin_return_address(0))
#define DEEPEN_ACCESSES(bytes)                                                                               \
  DEEPEN_EXPORT void __tsan_read##bytes(void* p) { record(Access::read, p, bytes, DEEPEN_PLACE); }           \
  DEEPEN_EXPORT void __tsan_write##bytes(void* p) { record(Access::write, p, bytes, DEEPEN_PLACE); }         \
  DEEPEN_EXPORT void __tsan_unaligned_read##bytes(void* p) { record(Access::read, p, bytes, DEEPEN_PLACE); } \
  DEEPEN_EXPORT void __tsan_unaligned_write##bytes(void* p) { record(Access::write, p, bytes, DEEPEN_PLACE); }
DEEPEN_ACCESSES(1)
DEEPEN_ACCESSES(2)
DEEPEN_ACCESSES(4)
DEEPEN_ACCESSES(8)
DEEPEN_ACCESSES(16)

// Of structs: a word at a time.
static void record_words(Access access, void* p, unsigned long bytes, const void* place) {
  for (unsigned long at = 0; at < bytes; at += 4) record(access, static_cast<char*>(p) + at, 4, place);
}
DEEPEN_EXPORT void __tsan_read_range(void* p, unsigned long bytes) {
  record_words(Access::read, p, bytes, DEEPEN_PLACE);
}
DEEPEN_EXPORT void __tsan_write_range(void* p, unsigned long bytes) {
  record_words(Access::write, p, bytes, DEEPEN_PLACE);
}
DEEPEN_EXPORT void __tsan_init() {}
DEEPEN_EXPORT void __tsan_func_entry(void*) {}
DEEPEN_EXPORT void __tsan_func_exit() {}
DEEPEN_EXPORT void __tsan_vptr_update(void**, void*) {}

// --- For tests in Python
// ---------------------------------------------------------------------------------------------

DEEPEN_EXPORT void deepen_emulator_forget_banks() { kernels.clear(); }

// A line for each kernel and place, tabs between: kernel, offset of the call in this file (hexadecimal),
// kind, bytes, instructions, wavefronts without conflicts, wavefronts, worst degree, instructions that had
// it, most lanes of an atomic at one word.
DEEPEN_EXPORT const char* deepen_emulator_bank_report() {
  static std::string text;
  text.clear();
  for (const auto& [kernel, places] : kernels) {
    for (const auto& [place, found] : places) {
      Dl_info where{};
      dladdr(place, &where);
      const char* const kinds[] = {"read", "write", "atomic"};
      char line[256];
      std::snprintf(line, sizeof line, "\t%lx\t%s\t%u\t%llu\t%llu\t%llu\t%u\t%llu\t%u\n",
                    (unsigned long)((const char*)place - 1 - (const char*)where.dli_fbase),
                    kinds[int(found.access)], found.bytes, (unsigned long long)found.instructions,
                    (unsigned long long)found.least, (unsigned long long)found.wavefronts, found.worst,
                    (unsigned long long)found.worst_count, found.same_word);
      text += kernel + line;
    }
  }
  return text.c_str();
}
