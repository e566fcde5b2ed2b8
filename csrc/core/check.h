// Errors of the core: every one is thrown with the place it was found and says what to do.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace deepen {

// The caller's arguments are wrong (deepen_ext.InputError in Python).
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class... Parts>
[[noreturn]] void throw_argument_error(const char* file, int line, const Parts&... parts) {
  // With a mode: the constructor without one needs a younger libstdc++ than the wheels promise (.ci/release).
  std::ostringstream message(std::ios_base::out);
  (message << ... << parts);
  message << " [" << file << ":" << line << "]";
  throw ArgumentError(message.str());
}

}  // namespace deepen

#define DEEPEN_CHECK(condition, ...)                                                   \
  do {                                                                                 \
    if (!(condition)) ::deepen::throw_argument_error(__FILE__, __LINE__, __VA_ARGS__); \
  } while (0)
