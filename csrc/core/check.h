// Errors of the core: every one is thrown with the place it was found and says what to do.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace deepen {

// The caller's arguments are wrong (deepen_ext.InputError in Python).
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Without C++ streams: a program may have loaded a library that has a C++ runtime of its own in it, and parts
// of a stream would come from the one and parts from the other.
template <class Part>
void append_to(std::string* message, const Part& part) {
  if constexpr (std::is_floating_point_v<Part>) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", double(part));
    *message += digits;
  } else if constexpr (std::is_integral_v<Part>) {
    *message += std::to_string(part);
  } else {
    *message += part;
  }
}

template <class... Parts>
[[noreturn]] void throw_argument_error(const char* file, int line, const Parts&... parts) {
  std::string message;
  (append_to(&message, parts), ...);
  throw ArgumentError(message + " [" + file + ":" + std::to_string(line) + "]");
}

}  // namespace deepen

#define DEEPEN_CHECK(condition, ...)                                                   \
  do {                                                                                 \
    if (!(condition)) ::deepen::throw_argument_error(__FILE__, __LINE__, __VA_ARGS__); \
  } while (0)
