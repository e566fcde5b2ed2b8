// libdeepen on the emulated device: steps there give what steps on the CPU give, from the first on and on a
// stream that does not wait for the default one, and all memory is given back.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../random_rows.h"
#include "embed/deepen.hpp"

constexpr int64_t kVocabs[] = {301, 517}, kAnchors = 120, kEntries = 16, kBatch = 3;

static deepen::Map random_map(std::mt19937* random, int64_t vocab) {
  const RandomRows rows = random_rows(random, vocab, kAnchors, kEntries);
  return deepen::Map(rows.columns.data(), rows.values.data(), rows.rest.data(), vocab, kEntries, kAnchors);
}

static std::vector<float> random_logits(std::mt19937* random, int64_t count) {
  std::normal_distribution<float> normal(0.0f, 2.0f);
  std::vector<float> logits;
  for (int64_t i = 0; i < count; ++i) logits.push_back(normal(*random));
  return logits;
}

int main(int, char** arguments) {
  std::mt19937 random(unsigned(std::atoi(arguments[1])));
  std::vector<deepen::Map> maps;
  for (const int64_t vocab : kVocabs) maps.push_back(random_map(&random, vocab));
  deepen_settings settings = deepen_default_settings();
  settings.batch = kBatch;
  deepen::Fusion here({&maps[0], &maps[1]}, settings);
  settings.device = 0;
  deepen::Fusion there({&maps[0], &maps[1]}, settings);
  settings.device = 99;
  try {
    deepen::Fusion({&maps[0], &maps[1]}, settings);
    return 1;
  } catch (const deepen::Error& error) {
    std::printf("status %d: %s\n", int(error.status), error.what());
  }
  maps.clear();  // the fusions have what they need
  void* const stream = reinterpret_cast<void*>(4242);
  for (int64_t batch = kBatch; batch >= 1; --batch) {
    std::vector<float> main = random_logits(&random, batch * kVocabs[0]), on_device = main;
    std::vector<float> assistant = random_logits(&random, batch * kVocabs[1]);
    const std::vector<float> weights(size_t(2 * batch), 0.5f), before = main;
    std::vector<int32_t> chosen(size_t(batch), -1), chosen_on_device = chosen;
    here.step({main.data(), assistant.data()}, weights.data(), chosen.data(), batch);
    there.step({on_device.data(), assistant.data()}, weights.data(), chosen_on_device.data(), batch, stream);
    for (size_t i = 0; i < main.size(); ++i) {
      if (!(std::fabs(main[i] - on_device[i]) <= 1e-3f)) {
        std::fprintf(stderr, "logit %zu is %g on the CPU and %g on the device\n", i, main[i], on_device[i]);
        return 1;
      }
    }
    if (chosen != chosen_on_device || main == before) {
      std::fprintf(stderr, "the tokens differ, or nothing was fused\n");
      return 1;
    }
  }
  return 0;
}
