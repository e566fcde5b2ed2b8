// The CPU twins are compiled once per instruction set from the same sources (CMakeLists.txt), each copy in a
// namespace of its own; the processor's best one is picked when the library loads.
//
// A file compiled per instruction set must not instantiate templates or inline functions with external
// linkage (no std containers or algorithms): the linker keeps one copy of such a function for the whole
// library, and it could be the AVX-512 one, run on a processor that has none. tests/test_build.py looks for
// them.
#pragma once

namespace deepen {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

Isa best_isa();         // what this processor has
Isa current_isa();      // what the operations use now
void set_isa(Isa isa);  // for tests and benchmarks; throws ArgumentError if the processor lacks it
const char* isa_name(Isa isa);

bool is_intel();  // who made this processor: MKL, which torch multiplies with, has code for Intel's own

}  // namespace deepen

#ifdef DEEPEN_X86
#define DEEPEN_DECLARE_CPU(declaration) \
  namespace portable {                  \
  declaration;                          \
  }                                     \
  namespace avx2 {                      \
  declaration;                          \
  }                                     \
  namespace avx512 {                    \
  declaration;                          \
  }
#define DEEPEN_CPU(name) \
  (current_isa() == Isa::avx512 ? &avx512::name : current_isa() == Isa::avx2 ? &avx2::name : &portable::name)
#else
#define DEEPEN_DECLARE_CPU(declaration) \
  namespace portable {                  \
  declaration;                          \
  }
#define DEEPEN_CPU(name) (&portable::name)
#endif
