// What makes a step of libdeepen longer or shorter: sizes STEPS
//
// One thread, one text, two members, random logits. The maps are as the recipe `bytes` mostly makes them:
// each token stands for one anchor. Prints a JSON list: microseconds by vocabularies, type of the logits,
// candidates and steps of the search. The settings take turns step by step, so that what else runs on the
// machine falls on all alike.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "deepen.hpp"

using Clock = std::chrono::steady_clock;

static deepen::Map map_of(int64_t vocab, int64_t anchors) {
  std::vector<int32_t> columns;
  for (int64_t token = 0; token < vocab; ++token) columns.push_back(int32_t(token % anchors));
  const std::vector<float> values(size_t(vocab), 1.0f), rest(size_t(vocab), 0.0f);
  return deepen::Map(columns.data(), values.data(), rest.data(), vocab, 1, anchors);
}

// bfloat16 is the upper half of a float.
static std::vector<char> random_logits(std::mt19937* random, int64_t vocab, deepen_dtype dtype) {
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<char> data(size_t(vocab) * (dtype == DEEPEN_F32 ? 4 : 2));
  for (int64_t i = 0; i < vocab; ++i) {
    const float value = normal(*random);
    const char* bytes = reinterpret_cast<const char*>(&value);
    if (dtype == DEEPEN_F32) {
      std::memcpy(&data[size_t(4 * i)], bytes, 4);
    } else {
      std::memcpy(&data[size_t(2 * i)], bytes + 2, 2);
    }
  }
  return data;
}

struct Case {
  int64_t vocabs[2];
  deepen_dtype dtype;
  int64_t candidates;
  int32_t steps;
  std::unique_ptr<deepen::Fusion> fusion;
  std::vector<char> main, assistant, work;
  std::vector<float> times;
};

static void run(Case* one, bool timed) {
  one->work = one->main;
  const float weights[] = {0.5f, 0.5f};
  int32_t chosen = 0;
  const auto began = Clock::now();
  one->fusion->step({{one->work.data(), one->dtype}, {one->assistant.data(), one->dtype}}, weights, &chosen);
  const auto ended = Clock::now();
  if (timed) one->times.push_back(std::chrono::duration<float, std::micro>(ended - began).count());
}

int main(int count, char** arguments) {
  if (count != 2) return 2;
  const long rounds = std::atol(arguments[1]);
  std::mt19937 random(0);
  std::vector<Case> cases;
  const int64_t sizes[][3] = {
      {8192, 8192, 6000}, {32000, 32000, 24000}, {49152, 262144, 46146}, {128256, 151936, 100000}};
  for (const auto& size : sizes) {
    const deepen::Map main = map_of(size[0], size[2]), assistant = map_of(size[1], size[2]);
    for (const deepen_dtype dtype : {DEEPEN_F32, DEEPEN_BF16}) {
      for (const int64_t candidates : {16, 64, 128}) {
        for (const int32_t steps : {1, 5}) {
          if (steps == 1 && candidates != 128) continue;
          deepen_settings settings = deepen_default_settings();
          settings.candidates = candidates;
          settings.steps = steps;
          cases.push_back({{size[0], size[1]}, dtype, candidates, steps, nullptr, {}, {}, {}, {}});
          Case& one = cases.back();
          one.fusion =
              std::make_unique<deepen::Fusion>(std::vector<const deepen::Map*>{&main, &assistant}, settings);
          one.main = random_logits(&random, size[0], dtype);
          one.assistant = random_logits(&random, size[1], dtype);
        }
      }
    }
  }
  for (long round = -20; round < rounds; ++round) {
    for (Case& one : cases) {
      run(&one, false);  // the caches hold another setting's data before
      run(&one, round >= 0);
    }
  }
  std::printf("[");
  for (Case& one : cases) {
    std::sort(one.times.begin(), one.times.end());
    const auto at = [&](double share) { return double(one.times[size_t(share * double(rounds - 1))]); };
    std::printf(
        "%s{\"vocabularies\": [%lld, %lld], \"dtype\": \"%s\", \"candidates\": %lld, \"steps\": %d, \"us\": "
        "{\"p10\": %.1f, \"p50\": %.1f, \"p99\": %.1f}}",
        &one == &cases.front() ? "" : ",\n ", static_cast<long long>(one.vocabs[0]),
        static_cast<long long>(one.vocabs[1]), one.dtype == DEEPEN_F32 ? "float32" : "bfloat16",
        static_cast<long long>(one.candidates), one.steps, at(0.1), at(0.5), at(0.99));
  }
  std::printf("]\n");
  return 0;
}
