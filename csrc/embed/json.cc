#include "embed/json.h"

#include <cstring>
#include <limits>
#include <stdexcept>

namespace deepen {

const Json& Json::at(const std::string& name) const {
  static const Json none;
  const auto found = object.find(name);
  return found == object.end() ? none : found->second;
}

namespace {

constexpr int kDeepest = 16;

class Reader {
 public:
  explicit Reader(const std::string& text) : at_(text.c_str()), end_(at_ + text.size()) {}

  Json whole() {
    Json value = this->value(0);
    skip_spaces();
    if (at_ != end_) fail();
    return value;
  }

 private:
  [[noreturn]] static void fail() { throw std::runtime_error("it is no JSON"); }

  void skip_spaces() {
    while (at_ < end_ && std::strchr(" \t\r\n", *at_) != nullptr && *at_ != '\0') ++at_;
  }
  bool take(char wanted) {
    skip_spaces();
    if (at_ == end_ || *at_ != wanted) return false;
    ++at_;
    return true;
  }
  void need(char wanted) {
    if (!take(wanted)) fail();
  }
  bool take_word(const char* word) {
    const size_t length = std::strlen(word);
    if (size_t(end_ - at_) < length || std::strncmp(at_, word, length) != 0) return false;
    at_ += length;
    return true;
  }

  Json value(int depth) {
    if (depth > kDeepest) fail();
    Json found;
    if (take('{')) {
      found.kind = Json::Kind::object;
      if (take('}')) return found;
      do {
        need('"');
        std::string name = string();
        need(':');
        found.object[std::move(name)] = value(depth + 1);
      } while (take(','));
      need('}');
    } else if (take('[')) {
      found.kind = Json::Kind::list;
      if (take(']')) return found;
      do found.list.push_back(value(depth + 1));
      while (take(','));
      need(']');
    } else if (take('"')) {
      found.kind = Json::Kind::string;
      found.string = string();
    } else if (!take_word("true") && !take_word("false") && !take_word("null")) {
      found.kind = Json::Kind::number;
      found.number = number();
    }
    return found;
  }

  // A whole number, or NaN for every other one: the head of a map has no use for those. Not by strtod, which
  // wants a comma where the program has set such a locale.
  double number() {
    const bool negative = take('-');
    const char* const digits = at_;
    double found = 0;
    while (is_digit()) found = found * 10 + (*at_++ - '0');
    if (at_ == digits) fail();
    const char* const end = at_;
    while (is_digit() || (at_ < end_ && *at_ != '\0' && std::strchr("+-.eE", *at_) != nullptr)) ++at_;
    if (at_ != end) return std::numeric_limits<double>::quiet_NaN();
    return negative ? -found : found;
  }
  bool is_digit() const { return at_ < end_ && *at_ >= '0' && *at_ <= '9'; }

  std::string string() {
    std::string found;
    while (true) {
      if (at_ == end_) fail();
      const char next = *at_++;
      if (next == '"') return found;
      found += next == '\\' ? escaped() : next;
    }
  }
  // Of letters outside of ASCII nothing here depends; each becomes a question mark.
  char escaped() {
    if (at_ == end_) fail();
    const char next = *at_++;
    if (next == 'u') {
      if (end_ - at_ < 4) fail();
      at_ += 4;
      return '?';
    }
    static const char letters[] = "nrtbf", meant[] = "\n\r\t\b\f";
    const char* const place = std::strchr(letters, next);
    return place == nullptr || next == '\0' ? next : meant[place - letters];
  }

  const char* at_;
  const char* end_;
};

}  // namespace

Json read_json(const std::string& text) { return Reader(text).whole(); }

}  // namespace deepen
