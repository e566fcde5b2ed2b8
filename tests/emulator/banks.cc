// Bank conflicts in shared memory. The kernels are compiled with GCC's -fsanitize=thread, which calls a
// function at each access to memory; these functions are here, in place of ThreadSanitizer's own.
//
// Lanes run one after another, so what a warp does as one instruction is put together afterwards: what its
// lanes do at one place, through the same calls and in the same turns of the loops around it, between two
// meetings of the lanes (a collective, a barrier). Calls and turns come from -fsanitize=thread's and
// -fsanitize-coverage's reports of functions and basic blocks.
//
// There are 32 banks of 4 bytes. Accesses of up to 4 bytes are served for the whole warp at once, of 8 for
// half of it, of 16 for a quarter. The degree is the largest number of different words in one bank: as many
// wavefronts it takes. One word is read for all its lanes at once; atomics at one word are not, which is
// counted apart and is in no degree.
//
// The kernels are compiled unoptimised, so an access is what the source says, and as wide; nothing is
// inlined, so that code lies in the order of the source. Not modelled: what nvcc keeps in registers, joins or
// moves; memcpy; where static arrays lie, so conflicts between two arrays in one instruction.
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

// What the lanes of a warp have done at one place, by one path, since the warp last met. More than one
// instruction if the path did not tell them apart.
struct Site {
  const void* place;
  Access access;
  unsigned bytes;
  std::vector<Instruction> instructions;
  size_t next[32] = {};  // by lane
};
using Sites = std::unordered_map<uint64_t, Site>;  // by path and place

struct Statistics {
  Access access;
  unsigned bytes;
  uint64_t instructions = 0, least = 0, wavefronts = 0;
  unsigned worst = 0;
  uint64_t worst_count = 0;
  unsigned same_word = 0;  // lanes of an atomic at one word, at most
};

static Sites warps[kMaxThreads / 32];
static std::map<std::string, std::map<const void*, Statistics>> kernels;

// --- Where a thread is
// -----------------------------------------------------------------------------------------------

// A loop is known from its first jump back on; its blocks lie from head to tail, because they are laid out as
// in the source.
struct Loop {
  uintptr_t head, tail;
  uint64_t turn;
};

struct Frame {
  uint64_t caller;   // the path up to the call
  const void* base;  // of its memory
  uintptr_t block;   // the last one
  std::vector<Loop> loops;
};

static std::vector<Frame> stacks[kMaxThreads];
static std::unordered_map<uintptr_t, uintptr_t> tails;  // the furthest jump back to each head so far

static uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15ull;
  return hash ^ hash >> 29;
}

static uint64_t path(const std::vector<Frame>& stack) {
  if (stack.empty()) return 0;
  uint64_t hash = stack.back().caller;
  for (const Loop& loop : stack.back().loops) hash = mix(mix(hash, loop.head), loop.turn);
  return hash;
}

static void enter_function(const void* call, const void* base) {
  std::vector<Frame>& stack = stacks[running_thread()];
  stack.push_back({mix(path(stack), uintptr_t(call)), base, 0, {}});
}

static void leave_function() {
  std::vector<Frame>& stack = stacks[running_thread()];
  if (!stack.empty()) stack.pop_back();
}

// Functions that touch no memory and call none do not report themselves: their blocks are left out.
static void enter_block(uintptr_t block, const void* base) {
  std::vector<Frame>& stack = stacks[running_thread()];
  if (stack.empty() || stack.back().base != base) return;
  Frame& frame = stack.back();
  std::vector<Loop>& loops = frame.loops;
  const uintptr_t from = frame.block;
  frame.block = block;
  if (block > from) {
    while (!loops.empty() && std::max(loops.back().tail, tails[loops.back().head]) < block) loops.pop_back();
    return;
  }
  uintptr_t& tail = tails[block];
  tail = std::max(tail, from);
  while (!loops.empty() && loops.back().head > block) loops.pop_back();
  if (loops.empty() || loops.back().head != block) loops.push_back({block, from, 0});
  ++loops.back().turn;
}

void forget_paths() {
  for (auto& stack : stacks) stack.clear();
}

// --- Accesses
// --------------------------------------------------------------------------------------------------------

static void record(Access access, const void* address, unsigned bytes, const void* place) {
  if (running_thread() == kNoThread || !is_shared(address)) return;
  const unsigned thread = running_thread(), lane = thread % 32;
  Sites& sites = warps[thread / 32];
  const uint64_t key = mix(path(stacks[thread]), uintptr_t(place));
  Site& site = sites.try_emplace(key, Site{place, access, bytes, {}, {}}).first->second;
  const size_t n = site.next[lane]++;
  if (n == site.instructions.size()) site.instructions.emplace_back();
  site.instructions[n].lanes |= 1u << lane;
  site.instructions[n].addresses[lane] = reinterpret_cast<uintptr_t>(address);
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
  auto& places = kernels[kernel];
  for (const auto& [key, site] : warps[number]) {
    Statistics& statistics =
        places.try_emplace(site.place, Statistics{site.access, site.bytes}).first->second;
    for (const Instruction& one : site.instructions) count(one, &statistics);
  }
  warps[number].clear();
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
#define DEEPEN_CALLERS_BASE (*static_cast<void**>(__builtin_frame_address(0)))  // there are frame pointers
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
DEEPEN_EXPORT void __tsan_func_entry(void* call) {
  if (running_thread() != kNoThread) enter_function(call, DEEPEN_CALLERS_BASE);
}
DEEPEN_EXPORT void __tsan_func_exit() {
  if (running_thread() != kNoThread) leave_function();
}
DEEPEN_EXPORT void __sanitizer_cov_trace_pc() {
  if (running_thread() != kNoThread) enter_block(uintptr_t(DEEPEN_PLACE), DEEPEN_CALLERS_BASE);
}
DEEPEN_EXPORT void __tsan_init() {}
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
