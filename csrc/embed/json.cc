#include "embed/json.h"

#include <cstring>
#include <locale>
#include <sstream>
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

  // Not by strtod: where the program has set a locale, it may want a comma in the place of the point.
  double number() {
    const char* const begin = at_;
    while (at_ < end_ && *at_ != '\0' && std::strchr("+-.0123456789eE", *at_) != nullptr) ++at_;
    std::istringstream text(std::string(begin, at_));
    text.imbue(std::locale::classic());
    double found = 0;
    if (!(text >> found) || text.peek() != std::istringstream::traits_type::eof()) fail();
    return found;
  }

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
