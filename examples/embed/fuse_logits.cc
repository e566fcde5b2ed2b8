// Fuses what two models say, token after token:
//
//     fuse_logits MAIN.map ASSISTANT.map MAIN.f32 ASSISTANT.f32 [NEW.f32]
//
// The maps are from Python (`RelativeMap.save`); the other files are raw float32 logits, [steps, vocabulary].
// Prints the token that is chosen at each step, and writes the main model's new logits if asked to. A real
// program has the logits in memory, from the engines that run its models.
#include <cstdio>
#include <exception>
#include <fstream>
#include <string>
#include <vector>

#include "deepen.hpp"

static std::vector<float> read_floats(const char* path) {
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  if (!in) throw std::runtime_error(std::string("cannot open ") + path);
  std::vector<float> values(size_t(in.tellg()) / sizeof(float));
  in.seekg(0);
  in.read(reinterpret_cast<char*>(values.data()), std::streamsize(values.size() * sizeof(float)));
  return values;
}

int main(int count, char** arguments) {
  if (count != 5 && count != 6) {
    std::fprintf(stderr, "usage: %s MAIN.map ASSISTANT.map MAIN.f32 ASSISTANT.f32 [NEW.f32]\n", arguments[0]);
    return 2;
  }
  try {
    const deepen::Map main_map{std::string(arguments[1])}, assistant_map{std::string(arguments[2])};
    deepen::Fusion fusion({&main_map, &assistant_map});
    std::vector<float> main = read_floats(arguments[3]), assistant = read_floats(arguments[4]);
    const float weights[] = {0.5f, 0.5f};
    const size_t steps = main.size() / size_t(main_map.vocab());
    for (size_t step = 0; step < steps; ++step) {
      int32_t chosen = 0;
      fusion.step({&main[step * size_t(main_map.vocab())], &assistant[step * size_t(assistant_map.vocab())]},
                  weights, &chosen);
      std::printf("%d\n", chosen);
    }
    if (count == 6) {
      std::ofstream(arguments[5], std::ios::binary)
          .write(reinterpret_cast<const char*>(main.data()), std::streamsize(main.size() * sizeof(float)));
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
