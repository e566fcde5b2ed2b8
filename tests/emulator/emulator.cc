// See emulator.h. One launch at a time in the whole process: kernels see threadIdx and its like as plain
// globals.
#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <sstream>
#include <string>
#include <vector>

#include "internal.h"

#ifdef DEEPEN_SANITIZED
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace deepen {
namespace emulator {

constexpr size_t kStackBytes = 256 * 1024;  // address space; what is touched is far less

Settings settings;
thread_local int current_device = 0;
static std::vector<std::string> launches;  // a line for each
static std::mutex launch_mutex;

// --- Contexts
// --------------------------------------------------------------------------------------------------------
// One stack and where it was left. Switching costs no system call on x86-64.

struct Context {
  void* pointer = nullptr;  // the saved stack pointer
  char* stack = nullptr;    // lowest address; null until known for the scheduler's own
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#ifndef __x86_64__
  ucontext_t machine;
#endif
};

#ifdef __x86_64__
extern "C" void deepen_emulator_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.type deepen_emulator_switch, @function
deepen_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size deepen_emulator_switch, .-deepen_emulator_switch
)");
#endif

static void start(Context* context, void (*entry)()) {
  if (context->stack == nullptr) {
    const size_t guard = size_t(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, guard, PROT_NONE);
    context->stack = static_cast<char*>(memory) + guard;
    context->stack_bytes = kStackBytes;
  }
#ifdef DEEPEN_SANITIZED
  __asan_unpoison_memory_region(context->stack, context->stack_bytes);  // of what a failed launch left there
#endif
  context->fake_stack = nullptr;
#ifdef __x86_64__
  auto** top = reinterpret_cast<void**>(context->stack + context->stack_bytes);
  top[-2] = reinterpret_cast<void*>(entry);  // where deepen_emulator_switch returns to, the stack aligned
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  context->pointer = top - 8;
#else
  getcontext(&context->machine);
  context->machine.uc_stack.ss_sp = context->stack;
  context->machine.uc_stack.ss_size = context->stack_bytes;
  context->machine.uc_link = nullptr;
  makecontext(&context->machine, entry, 0);
#endif
}

static Context* leaving;  // who switched last

// On the new stack, before anything else there.
static void arrived([[maybe_unused]] Context* here) {
#ifdef DEEPEN_SANITIZED
  const void* bottom = nullptr;
  __sanitizer_finish_switch_fiber(here->fake_stack, &bottom, &leaving->stack_bytes);
  leaving->stack = static_cast<char*>(const_cast<void*>(bottom));  // news for the scheduler's own
#endif
}

static void go(Context* from, Context* to) {
  leaving = from;
#ifdef DEEPEN_SANITIZED
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_bytes);
#endif
#ifdef __x86_64__
  deepen_emulator_switch(&from->pointer, to->pointer);
#else
  swapcontext(&from->machine, &to->machine);
#endif
  arrived(from);
}

// --- The block that runs
// ---------------------------------------------------------------------------------------------

enum class State { ready, waiting, exited };

// Lanes at a collective, and lanes that have exited or never were.
struct Warp {
  unsigned waiting, exited;
};

// What a fiber waits for.
struct Wait {
  Kind kind;
  unsigned mask;
  uint64_t value;
  int source;
  const char* file;
  int line;
};

static bool same_place(const Wait& one, const Wait& other) {
  return one.line == other.line && (one.file == other.file || std::strcmp(one.file, other.file) == 0);
}

struct Fiber {
  Context context;
  unsigned number;  // within the block
  uint3 index;
  State state;
  Wait wait;
  uint64_t result;
};

struct StaticArray {
  const void* key;
  char* memory;
  size_t bytes;
};

struct Free {
  void operator()(char* pointer) const { std::free(pointer); }
};

struct Machine {
  const Launch* launch = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Fiber>>
      fibers;  // kept from launch to launch; the block has the first `threads`
  unsigned threads = 0;
  Warp warps[kMaxThreads / 32] = {};
  unsigned exited = 0, at_barrier = 0;
  std::vector<unsigned> turn, ready;  // who runs in this round, from `position` on; and in the next
  size_t position = 0;
  Fiber* current = nullptr;
  Context scheduler;
  std::unique_ptr<char, Free> shared;
  std::vector<StaticArray> static_arrays;
  std::string error;  // what the fiber that just stopped did wrong
  uint64_t luck = 0;  // state of the generator
};

static Machine machine;

static uint64_t random_bits() {  // xorshift64*
  machine.luck ^= machine.luck >> 12;
  machine.luck ^= machine.luck << 25;
  machine.luck ^= machine.luck >> 27;
  return machine.luck * 2685821657736338717ull;
}

template <class T>
static void arrange(std::vector<T>* items) {
  if (settings.seed <= 1) {
    std::sort(items->begin(), items->end());
    if (settings.seed == 1) std::reverse(items->begin(), items->end());
    return;
  }
  for (size_t i = items->size(); i > 1; --i) std::swap((*items)[i - 1], (*items)[random_bits() % i]);
}

char* poisoned(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes) != 0) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

void poison(char* memory, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) memory[i] = char(kPoison >> (8 * (i % 4)));
}

// --- Reports
// ---------------------------------------------------------------------------------------------------------

static std::string triple(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

static std::string place() {
  const Launch& launch = *machine.launch;
  std::ostringstream text;
  text << "kernel " << launch.kernel << " (launched at " << launch.file << ":" << launch.line << "), block "
       << triple(blockIdx.x, blockIdx.y, blockIdx.z);
  return text.str();
}

static const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::sync_threads: return "__syncthreads";
    case Kind::sync_warp: return "__syncwarp";
    case Kind::shuffle: return "a shuffle";
    case Kind::ballot: return "__ballot_sync";
    case Kind::any: return "__any_sync";
    case Kind::all: return "__all_sync";
    case Kind::match_any: return "__match_any_sync";
    case Kind::multiply: return "a tensor-core product";
  }
  return "?";
}

static std::string whereabouts(const Fiber& fiber) {
  if (fiber.state == State::exited) return "has exited";
  std::ostringstream text;
  text << "waits at " << name_of(fiber.wait.kind);
  if (fiber.wait.kind != Kind::sync_threads)
    text << std::hex << " of lanes 0x" << fiber.wait.mask << std::dec;
  text << " in " << fiber.wait.file << ":" << fiber.wait.line;
  return text.str();
}

// Every place some thread is at, with how many and the first of them.
static std::string everyone() {
  std::vector<std::pair<std::string, std::pair<unsigned, unsigned>>> places;
  for (unsigned i = 0; i < machine.threads; ++i) {
    const std::string where = whereabouts(*machine.fibers[i]);
    auto known = std::find_if(places.begin(), places.end(), [&](auto& one) { return one.first == where; });
    if (known == places.end()) {
      places.push_back({where, {i, 1u}});
    } else {
      ++known->second.second;
    }
  }
  std::ostringstream text;
  for (const auto& [where, who] : places) {
    const uint3 index = machine.fibers[who.first]->index;
    text << "\n  thread " << triple(index.x, index.y, index.z);
    if (who.second > 1) text << " and " << who.second - 1 << " more";
    text << ": " << where;
  }
  return text.str();
}

// --- What kernels call
// -----------------------------------------------------------------------------------------------

// Null if there is nothing to run: all wait, all have exited, or one did something wrong.
static Fiber* next_fiber() {
  if (!machine.error.empty()) return nullptr;
  if (machine.position == machine.turn.size()) {
    if (machine.ready.empty()) return nullptr;
    machine.turn.swap(machine.ready);
    machine.ready.clear();
    machine.position = 0;
    arrange(&machine.turn);
  }
  return machine.fibers[machine.turn[machine.position++]].get();
}

static void resume(Context* from, Fiber* fiber) {
  machine.current = fiber;
  threadIdx = fiber->index;
  go(from, &fiber->context);
}

static void suspend() {
  Fiber* const me = machine.current;
  Fiber* const next = next_fiber();
  if (next == nullptr) return go(&me->context, &machine.scheduler);
  if (next != me) resume(&me->context, next);
}

// The scheduler throws; this fiber is never resumed.
[[noreturn]] static void fail(const std::string& what, const std::string& details = "") {
  const uint3 index = machine.current->index;
  machine.error = what + ": " + place() + ", thread " + triple(index.x, index.y, index.z) + details;
  suspend();
  std::abort();
}

static void make_ready(Fiber* fiber) {
  fiber->state = State::ready;
  machine.ready.push_back(fiber->number);
}

static Fiber* lane_of_warp(unsigned warp, unsigned lane) {
  const unsigned number = warp * 32 + lane;
  return number < machine.threads ? machine.fibers[number].get() : nullptr;
}

static uint64_t result_for(Kind kind, unsigned warp, unsigned lane, unsigned lanes) {
  const Fiber& fiber = *lane_of_warp(warp, lane);
  if (kind == Kind::shuffle) {
    const unsigned source = unsigned(fiber.wait.source);
    // Undefined in CUDA if that lane takes no part.
    return lanes >> source & 1 ? lane_of_warp(warp, source)->wait.value : uint64_t(kPoison) << 32 | kPoison;
  }
  unsigned same = 0, set = 0;
  for (unsigned other = 0; other < 32; ++other) {
    if (!(lanes >> other & 1)) continue;
    const uint64_t value = lane_of_warp(warp, other)->wait.value;
    same |= unsigned(value == fiber.wait.value) << other;
    set |= unsigned(value != 0) << other;
  }
  switch (kind) {
    case Kind::ballot: return set;
    case Kind::any: return set != 0;
    case Kind::all: return set == lanes;
    case Kind::match_any: return same;
    default: return 0;
  }
}

// PTX ISA, mma.m16n8k8 for .tf32. With lane = 4 g + t, a lane holds
//   a: [g][t], [g + 8][t], [g][t + 4], [g + 8][t + 4]    b: [t][g], [t + 4][g]
//   c: [g][2t], [g][2t + 1], [g + 8][2t], [g + 8][2t + 1]
static void multiply(unsigned warp, unsigned lanes) {
  if (lanes != 0xffffffffu) fail("a tensor-core product without the whole warp");
  float a[16][8], b[8][8];
  const auto fragments = [warp](unsigned lane) {
    return *reinterpret_cast<const Fragments*>(uintptr_t(lane_of_warp(warp, lane)->wait.value));
  };
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    const Fragments mine = fragments(lane);
    for (unsigned i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = bits<float>(mine.a[i]);
    for (unsigned i = 0; i < 2; ++i) b[t + 4 * i][g] = bits<float>(mine.b[i]);
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
      double sum = 0.0;
      for (unsigned k = 0; k < 8; ++k) sum += double(a[g + i / 2 * 8][k]) * double(b[k][2 * t + i % 2]);
      float& c = fragments(lane).c[i];
      c = float(double(c) + sum);
    }
  }
}

// Lets the lanes of this fiber's collective go on if all have come. Lanes that exited are not waited for.
static bool complete(const Fiber& arrival) {
  const Wait& wait = arrival.wait;
  const unsigned warp = arrival.number / 32, lanes = wait.mask & ~machine.warps[warp].exited;
  if (lanes & ~machine.warps[warp].waiting) return false;
  bool alike = true;
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    const Wait& other = lane_of_warp(warp, unsigned(__builtin_ctz(left)))->wait;
    if (other.mask != wait.mask) return false;
    alike = alike && other.kind == wait.kind && same_place(other, wait);
  }
  if (!alike) fail("lanes meet at different warp collectives", everyone());
  if (wait.kind == Kind::multiply) multiply(warp, lanes);
  warp_met(warp, machine.launch->kernel);
  uint64_t results[32];
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) results[lane] = result_for(wait.kind, warp, lane, lanes);
  }
  machine.warps[warp].waiting &= ~lanes;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    lane_of_warp(warp, lane)->result = results[lane];
    make_ready(lane_of_warp(warp, lane));
  }
  return true;
}

uint64_t collective(Kind kind, unsigned mask, uint64_t value, int source, const char* file, int line) {
  Fiber* me = machine.current;
  me->wait = {kind, mask, value, source, file, line};
  if (!(mask >> (me->number % 32) & 1))
    fail(std::string("a lane calls ") + name_of(kind) + " without being in its mask");
  me->state = State::waiting;
  machine.warps[me->number / 32].waiting |= 1u << me->number % 32;
  complete(*me);
  suspend();
  return me->result;
}

void sync_threads(const char* file, int line) {
  Fiber* me = machine.current;
  me->wait = {Kind::sync_threads, 0, 0, 0, file, line};
  me->state = State::waiting;
  ++machine.at_barrier;
  suspend();
}

void maybe_yield() {
  if (settings.seed <= 1 || random_bits() >> 62 != 0) return;
  make_ready(machine.current);
  suspend();
}

unsigned running_thread() { return machine.launch == nullptr ? kNoThread : machine.current->number; }

bool is_shared(const void* address) {
  const auto within = [address](const char* begin, size_t bytes) {
    return uintptr_t(address) - uintptr_t(begin) < bytes;
  };
  if (within(machine.shared.get(), machine.launch->shared_bytes)) return true;
  return std::any_of(machine.static_arrays.begin(), machine.static_arrays.end(),
                     [&](const StaticArray& array) { return within(array.memory, array.bytes); });
}

int lane() { return int(machine.current->number % 32); }

void* dynamic_shared() { return machine.shared.get(); }

void* static_shared(const void* key, size_t bytes) {
  size_t total = machine.launch->shared_bytes + bytes;
  for (const StaticArray& array : machine.static_arrays) {
    if (array.key == key) return array.memory;
    total += array.bytes;
  }
  if (total > settings.max_shared_bytes) fail("static and dynamic shared memory exceed the device's limit");
  char* memory = poisoned(bytes);
  poison(memory, bytes);
  machine.static_arrays.push_back({key, memory, bytes});
  return memory;
}

// --- Running
// ---------------------------------------------------------------------------------------------------------

static void fiber_main() {
  arrived(&machine.current->context);
  for (;;) {
    (*machine.body)();
    Fiber* me = machine.current;
    me->state = State::exited;
    ++machine.exited;
    machine.warps[me->number / 32].exited |= 1u << me->number % 32;
    const bool awaited = machine.warps[me->number / 32].waiting != 0;
    for (unsigned lane = 0; awaited && lane < 32; ++lane) {  // some may have waited for this one alone
      const Fiber* other = lane_of_warp(me->number / 32, lane);
      if (other != nullptr && other->state == State::waiting && other->wait.kind != Kind::sync_threads)
        complete(*other);
    }
    suspend();
  }
}

static void all_warps_met() {
  for (unsigned warp = 0; warp * 32 < machine.threads; ++warp) warp_met(warp, machine.launch->kernel);
}

// All threads wait or have exited.
static void open_barrier() {
  const Wait& first = machine.fibers[0]->wait;
  bool together = machine.at_barrier == machine.threads;
  for (unsigned i = 0; together && i < machine.threads; ++i) {
    const Wait& wait = machine.fibers[i]->wait;
    together = same_place(wait, first);
  }
  if (!together) {
    const char* what = machine.at_barrier > 0 ? "divergent barrier" : "deadlock";
    throw Error(std::string(what) + ": " + place() + everyone());
  }
  machine.at_barrier = 0;
  all_warps_met();
  for (unsigned i = 0; i < machine.threads; ++i) make_ready(machine.fibers[i].get());
}

static void run_block() {
  for (const StaticArray& array : machine.static_arrays) poison(array.memory, array.bytes);
  poison(machine.shared.get(), machine.launch->shared_bytes);
  machine.exited = machine.at_barrier = 0;
  forget_paths();
  for (unsigned i = 0; i < kMaxThreads; i += 32) {
    const unsigned lanes = machine.threads <= i ? 0 : machine.threads - i;
    machine.warps[i / 32] = {0, lanes >= 32 ? 0 : ~0u << lanes};
  }
  machine.turn.clear();
  machine.ready.clear();
  machine.position = 0;
  for (unsigned i = 0; i < machine.threads; ++i) make_ready(machine.fibers[i].get());
  while (machine.exited < machine.threads) {
    if (machine.ready.empty()) open_barrier();
    resume(&machine.scheduler, next_fiber());
    if (!machine.error.empty()) throw Error(machine.error);
  }
  all_warps_met();
}

static void prepare(unsigned threads) {
  for (size_t i = machine.fibers.size(); i < threads; ++i) {
    machine.fibers.push_back(std::make_unique<Fiber>());
    machine.fibers[i]->number = unsigned(i);
    start(&machine.fibers[i]->context, fiber_main);
  }
  machine.threads = threads;
  for (unsigned i = 0; i < threads; ++i) {
    machine.fibers[i]->index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  }
}

static void clean_up(bool failed) {
  if (failed) {
    // Fibers in the middle of a kernel start anew.
    for (auto& fiber : machine.fibers) start(&fiber->context, fiber_main);
  }
  for (const StaticArray& array : machine.static_arrays) std::free(array.memory);
  machine.static_arrays.clear();
  machine.shared.reset();
  machine.error.clear();
  machine.launch = nullptr;
}

static bool possible(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  return threads >= 1 && threads <= kMaxThreads && block.z <= 64 && grid.x >= 1 && grid.y >= 1 &&
         grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
}

void run(Launch launch, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  launch.device = current_device;
  if (!possible(launch)) return void(failed(cudaErrorInvalidConfiguration));
  if (launch.shared_bytes > allowed_shared_bytes(launch.function, launch.device))
    return void(failed(cudaErrorInvalidValue));
  if (launch.stream == nullptr) end_copies();
  std::ostringstream line;
  line << launch.kernel << " grid " << triple(launch.grid.x, launch.grid.y, launch.grid.z) << " block "
       << triple(launch.block.x, launch.block.y, launch.block.z) << " shared " << launch.shared_bytes
       << " device " << launch.device << " stream " << reinterpret_cast<uintptr_t>(launch.stream);
  launches.push_back(line.str());

  gridDim = launch.grid;
  blockDim = launch.block;
  machine.launch = &launch;
  machine.body = &body;
  machine.luck = (settings.seed + 1) * 0x9e3779b97f4a7c15ull;
  prepare(launch.block.x * launch.block.y * launch.block.z);
  machine.shared.reset(poisoned(launch.shared_bytes));
  std::vector<uint64_t> blocks(uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  arrange(&blocks);
  try {
    for (const uint64_t i : blocks) {
      blockIdx = {unsigned(i % gridDim.x), unsigned(i / gridDim.x % gridDim.y),
                  unsigned(i / (uint64_t(gridDim.x) * gridDim.y))};
      run_block();
    }
  } catch (...) {
    clean_up(true);
    throw;
  }
  clean_up(false);
}

}  // namespace emulator
}  // namespace deepen

using namespace deepen::emulator;

// --- For tests in Python, by ctypes
// ----------------------------------------------------------------------------------

DEEPEN_EXPORT void deepen_emulator_set_seed(uint64_t seed) { settings.seed = seed; }

static void become_another_device() {
  forget_allowed();
  forget_devices();
}
DEEPEN_EXPORT void deepen_emulator_set_max_shared_bytes(int64_t bytes) {
  settings.max_shared_bytes = size_t(bytes);
  become_another_device();
}
DEEPEN_EXPORT void deepen_emulator_set_multiprocessors(int count) {
  settings.multiprocessors = count;
  become_another_device();
}
DEEPEN_EXPORT void deepen_emulator_set_devices(int count) { settings.devices = count; }
DEEPEN_EXPORT void deepen_emulator_forget_launches() { launches.clear(); }
DEEPEN_EXPORT int64_t deepen_emulator_launch_count() { return int64_t(launches.size()); }
DEEPEN_EXPORT const char* deepen_emulator_launch(int64_t i) { return launches.at(size_t(i)).c_str(); }
DEEPEN_EXPORT int deepen_emulator_current_device() { return current_device; }
