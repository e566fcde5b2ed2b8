#include "core/isa.h"

#include <atomic>

#include "core/check.h"

namespace deepen {

Isa best_isa() {
#ifdef DEEPEN_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  // Every processor with AVX2 and FMA has F16C as well.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

bool is_intel() {
#ifdef DEEPEN_X86
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

static std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

Isa current_isa() { return isa_in_use().load(std::memory_order_relaxed); }

void set_isa(Isa isa) {
  DEEPEN_CHECK(isa <= best_isa(), "this processor has no ", isa_name(isa), "; its best is ",
               isa_name(best_isa()));
  isa_in_use().store(isa, std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "unknown";
}

}  // namespace deepen
