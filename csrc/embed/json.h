// As much of JSON as the head of a safetensors file needs: objects, lists, strings, numbers; read once, front
// to back.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace deepen {

struct Json {
  enum class Kind { other, number, string, list, object };
  Kind kind = Kind::other;  // other: true, false, null
  double number = 0;        // NaN where it is no whole number
  std::string string;
  std::vector<Json> list;
  std::map<std::string, Json> object;

  // The value, or one of kind `other` where this is no object or has no such name.
  const Json& at(const std::string& name) const;
};

// Throws std::runtime_error where the text is no JSON, or nested deeper than 16.
Json read_json(const std::string& text);

}  // namespace deepen
