// Threads that share maps: each has a fusion of its own over the same maps, whose rows are cut among threads
// too; beside them maps come and go, and calls fail. Every thread must find what one thread alone finds.
// Under ThreadSanitizer (DEEPEN_FUZZ=THREADS).
//
//   fuzz_threads ROUNDS [race]
//
// With `race` two threads step with the same fusion, which deepen.h forbids: ThreadSanitizer must see it.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../random_rows.h"
#include "core/isa.h"
#include "embed/deepen.h"

namespace {

constexpr int64_t kVocabs[] = {301, 517}, kAnchors = 120, kEntries = 16, kBatch = 8;
constexpr int kThreads = 4;

deepen_map* random_map(std::mt19937* random, int64_t vocab) {
  const RandomRows rows = random_rows(random, vocab, kAnchors, kEntries);
  deepen_map* map = nullptr;
  if (deepen_map_create(rows.columns.data(), rows.values.data(), rows.rest.data(), vocab, kEntries, kAnchors,
                        &map) != DEEPEN_OK) {
    std::fprintf(stderr, "%s\n", deepen_error());
    std::exit(1);
  }
  return map;
}

struct Step {
  std::vector<float> main, assistant;
  std::vector<int32_t> chosen = std::vector<int32_t>(size_t(kBatch), -1);
};

Step make_step(int seed) {
  std::mt19937 random{unsigned(seed)};
  std::normal_distribution<float> normal(0.0f, 2.0f);
  Step step;
  for (int64_t i = 0; i < kBatch * kVocabs[0]; ++i) step.main.push_back(normal(random));
  for (int64_t i = 0; i < kBatch * kVocabs[1]; ++i) step.assistant.push_back(normal(random));
  return step;
}

deepen_fusion* make_fusion(const std::vector<deepen_map*>& maps, int threads) {
  deepen_settings settings = deepen_default_settings();
  settings.batch = kBatch;
  settings.threads = threads;
  deepen_fusion* fusion = nullptr;
  if (deepen_fusion_create(maps.data(), int32_t(maps.size()), &settings, &fusion) != DEEPEN_OK) std::exit(1);
  return fusion;
}

void run(deepen_fusion* fusion, Step* step) {
  void* logits[] = {step->main.data(), step->assistant.data()};
  const deepen_dtype dtypes[] = {DEEPEN_F32, DEEPEN_F32};
  const std::vector<float> weights(size_t(2 * kBatch), 0.5f);
  const auto status =
      deepen_fusion_step(fusion, kBatch, logits, dtypes, weights.data(), step->chosen.data(), nullptr);
  if (status != DEEPEN_OK) std::exit(1);
}

// A failure's message is its own thread's.
bool fails_with_own_message(int thread) {
  deepen_map* none = nullptr;
  const std::string path = "no-file-" + std::to_string(thread);
  return deepen_map_read(path.c_str(), &none) == DEEPEN_BAD_FILE &&
         std::strstr(deepen_error(), path.c_str()) != nullptr;
}

void in_threads(const std::function<void(int)>& work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
  for (auto& one : threads) one.join();
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 10;
  std::mt19937 random(1);
  std::vector<deepen_map*> maps;
  for (const int64_t vocab : kVocabs) maps.push_back(random_map(&random, vocab));
  deepen_fusion* const alone = make_fusion(maps, 1);
  if (count > 2) {
    in_threads([&](int thread) {
      Step step = make_step(thread);
      for (int round = 0; round < rounds; ++round) run(alone, &step);
    });
    return 0;
  }
  std::vector<Step> wanted;
  for (int seed = 0; seed < 16; ++seed) {
    wanted.push_back(make_step(seed));
    run(alone, &wanted.back());
  }
  std::atomic<int64_t> wrong{0}, steps{0};
  in_threads([&](int thread) {
    deepen_fusion* const fusion = make_fusion(maps, 1 + thread % 3);
    std::mt19937 own{unsigned(thread)};
    for (int round = 0; round < rounds; ++round) {
      const int seed = (round + 5 * thread) % 16;
      Step step = make_step(seed);
      run(fusion, &step);
      wrong += step.main != wanted[size_t(seed)].main || step.chosen != wanted[size_t(seed)].chosen;
      ++steps;
      if (round % 8 == 0) {
        wrong += !fails_with_own_message(thread);
        deepen_map_free(random_map(&own, 40));
        deepen::set_isa(deepen::best_isa());
      }
    }
    deepen_fusion_free(fusion);
  });
  deepen_fusion_free(alone);
  for (deepen_map* map : maps) deepen_map_free(map);
  std::printf("%lld steps by %d threads, %lld wrong\n", (long long)steps.load(), kThreads,
              (long long)wrong.load());
  return wrong == 0 ? 0 : 1;
}
