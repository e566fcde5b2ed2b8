// How long a step of libdeepen takes: latency MAIN.map ASSISTANT.map STEPS [SEED]
//
// Logits are random; each step has others, copied beside the clock. Prints one line of JSON: microseconds,
// and how often memory was allocated in all timed steps.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "deepen.hpp"

static std::atomic<long> allocations{0};
extern "C" void* __libc_malloc(size_t);
extern "C" void* malloc(size_t bytes) {
  ++allocations;
  return __libc_malloc(bytes);
}

using Clock = std::chrono::steady_clock;

static std::vector<float> random_logits(std::mt19937* random, int64_t rows, int64_t vocab) {
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> logits(size_t(rows * vocab));
  for (float& one : logits) one = normal(*random);
  return logits;
}

int main(int count, char** arguments) {
  if (count < 4) return 2;
  const deepen::Map main_map{std::string(arguments[1])}, assistant_map{std::string(arguments[2])};
  const long steps = std::atol(arguments[3]);
  std::mt19937 random(count > 4 ? unsigned(std::atol(arguments[4])) : 0u);
  constexpr int64_t kRows = 16;  // different distributions
  const std::vector<float> main = random_logits(&random, kRows, main_map.vocab());
  std::vector<float> assistant = random_logits(&random, kRows, assistant_map.vocab());
  std::vector<float> work(size_t(main_map.vocab()));
  const deepen_settings settings = deepen_default_settings();
  const deepen_map* maps[] = {main_map.get(), assistant_map.get()};
  deepen_fusion* fusion = nullptr;
  deepen::check(deepen_fusion_create(maps, 2, &settings, &fusion));
  const deepen_dtype dtypes[] = {DEEPEN_F32, DEEPEN_F32};
  const float weights[] = {0.5f, 0.5f};
  std::vector<float> times;
  times.reserve(size_t(steps));
  long allocated = 0;
  for (long step = -100; step < steps; ++step) {
    const size_t row = size_t((step + 100) % kRows);
    std::memcpy(work.data(), &main[row * work.size()], work.size() * sizeof(float));
    void* logits[] = {work.data(), &assistant[row * size_t(assistant_map.vocab())]};
    int32_t chosen = 0;
    const long before = allocations;
    const auto began = Clock::now();
    deepen::check(deepen_fusion_step(fusion, 1, logits, dtypes, weights, &chosen, nullptr));
    const auto ended = Clock::now();
    if (step < 0) continue;
    allocated += allocations - before;
    times.push_back(std::chrono::duration<float, std::micro>(ended - began).count());
  }
  deepen_fusion_free(fusion);
  std::sort(times.begin(), times.end());
  const auto at = [&](double share) { return double(times[size_t(share * double(times.size() - 1))]); };
  std::printf(
      "{\"steps\": %ld, \"vocabularies\": [%lld, %lld], \"anchors\": %lld, \"candidates\": %lld, \"us\": "
      "{\"p50\": %.1f, "
      "\"p99\": %.1f, \"p99.9\": %.1f, \"max\": %.1f}, \"allocations\": %ld}\n",
      steps, static_cast<long long>(main_map.vocab()), static_cast<long long>(assistant_map.vocab()),
      static_cast<long long>(main_map.anchors()), static_cast<long long>(settings.candidates), at(0.5),
      at(0.99), at(0.999), at(1.0), allocated);
  return 0;
}
