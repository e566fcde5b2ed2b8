// libdeepen's C interface: maps of hostile rows, settings at their limits, and steps with hostile logits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "embed/deepen.h"
#include "rows.h"

using fuzz::Buffer;

namespace {

struct Map {
  fuzz::Rows rows;
  deepen_map* map;
};

Map make_map(fuzz::Input* in, int64_t anchors) {
  Map made{fuzz::sound_rows(in, 1 + in->below(40), anchors, false), nullptr};
  fuzz::Rows& rows = made.rows;
  int64_t sizes[] = {rows.vocab, rows.entries, anchors};
  const bool broken = in->one_in(16), spoilt = in->one_in(8);
  if (spoilt) fuzz::spoil(in, &rows, anchors);
  if (broken) {
    const int64_t number = in->no_size();
    switch (in->below(3)) {
      case 0: sizes[0] = number; break;
      case 1: sizes[1] = in->one_in(2) ? anchors + 1 : number; break;
      default: sizes[2] = number;
    }
  }
  ++fuzz::calls.count;
  const deepen_status status = deepen_map_create(rows.columns.data(), rows.values.data(), rows.rest.data(),
                                                 sizes[0], sizes[1], sizes[2], &made.map);
  PROMISED(status == DEEPEN_OK || (status == DEEPEN_INVALID_ARGUMENT && (broken || spoilt)));
  PROMISED((status == DEEPEN_OK) == (made.map != nullptr) && (status == DEEPEN_OK) <= !broken);
  if (made.map != nullptr) PROMISED(deepen_map_vocab(made.map) == rows.vocab);
  return made;
}

deepen_settings make_settings(fuzz::Input* in, bool* sound) {
  deepen_settings settings = deepen_default_settings();
  settings.batch = in->one_in(200) ? 4095 + in->below(3) : in->below(6);
  settings.candidates = in->one_in(8) ? in->no_size() : in->below(48);
  settings.learning_rate = fuzz::rate(in);
  settings.steps = fuzz::steps(in);
  settings.min_probability = in->one_in(8) ? in->hostile() : in->one_in(2) ? 1e-4f : 0.0f;
  settings.log_probs = int32_t(in->below(3));
  settings.threads = in->one_in(200) ? INT32_MAX : in->one_in(16) ? 0 : in->one_in(16) ? 2 : 1;
  settings.device = in->one_in(64) ? -2 : -1;
  *sound = settings.batch >= 1 && settings.batch <= 4096 && settings.candidates >= 1 &&
           settings.learning_rate > 0 && settings.learning_rate <= 10 && settings.steps >= 0 &&
           settings.steps <= 64 && settings.min_probability >= 0 && settings.min_probability < 1 &&
           settings.threads >= 1 && settings.device == -1;
  return settings;
}

void step(fuzz::Input* in, deepen_fusion* fusion, const deepen_settings& settings, std::vector<Map>* maps) {
  const int64_t most = std::min<int64_t>(settings.batch, 6),
                batch = in->one_in(8) ? in->no_size() : in->below(most + 1);
  const int64_t rows = batch < 0 || batch > most ? most : batch, count = int64_t(maps->size());
  std::vector<Buffer<char>> logits;
  std::vector<void*> pointers;
  std::vector<deepen_dtype> dtypes;
  bool finite = true;
  for (Map& one : *maps) {
    const deepen::Dtype dtype = in->dtype();
    const int64_t vocab = one.rows.vocab;
    Buffer<float> values(rows * vocab);
    in->logits(&values);
    logits.push_back(fuzz::stored(&values, dtype));
    for (int64_t row = 0; row < rows; ++row) {
      const float* first = values.data() + row * vocab;
      const float largest = *std::max_element(first, first + vocab);
      finite = finite && largest > -INFINITY &&
               std::all_of(first, first + vocab, [](float v) { return v < INFINITY; });
    }
    pointers.push_back(logits.back().data());
    dtypes.push_back(deepen_dtype(dtype));
  }
  Buffer<float> weights(rows * count);
  for (int64_t i = 0; i < weights.count; ++i) weights[i] = 1.0f / float(count);
  const bool strange = in->one_in(8), wrong = in->one_in(32);
  if (strange) in->logits(&weights);
  const bool shares = fuzz::are_shares(weights, rows, count);
  const deepen::Dtype dtype = deepen::Dtype(dtypes[0]);
  if (wrong) dtypes.back() = deepen_dtype(3);
  Buffer<int32_t> chosen(rows);
  const Buffer<char> before = [&] {
    Buffer<char> copy(logits[0].count);
    std::copy(logits[0].data(), logits[0].data() + copy.count, copy.data());
    return copy;
  }();
  ++fuzz::calls.count;
  const deepen_status status =
      deepen_fusion_step(fusion, batch, pointers.data(), dtypes.data(), weights.data(),
                         in->one_in(4) ? nullptr : chosen.data(), nullptr);
  const bool right = batch >= 0 && batch <= settings.batch && !wrong;
  PROMISED(status == (!right    ? DEEPEN_INVALID_ARGUMENT
                      : !finite ? DEEPEN_NOT_FINITE
                      : !shares ? DEEPEN_INVALID_ARGUMENT
                                : DEEPEN_OK));
  if (status != DEEPEN_OK) {
    PROMISED(std::equal(logits[0].data(), logits[0].data() + logits[0].count, before.values.get()));
    return;
  }
  const int64_t vocab = maps->front().rows.vocab;
  for (int64_t row = 0; row < rows; ++row) {
    PROMISED(chosen[row] >= 0 && chosen[row] < vocab);
    if (strange || settings.learning_rate > 1) continue;
    for (int64_t id = 0; id < vocab; ++id) {
      const float value = fuzz::loaded(logits[0].data(), row * vocab + id, dtype);
      PROMISED(value == value);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input in(data, size);
  in.choose_isa();
  const int64_t anchors = 1 + in.below(60);
  std::vector<Map> maps;
  for (int64_t i = in.below(in.one_in(16) ? 18 : 3); i >= 0; --i) {
    Map one = make_map(&in, in.one_in(16) ? anchors + 1 : anchors);
    if (one.map != nullptr) maps.push_back(std::move(one));
  }
  std::vector<const deepen_map*> pointers;
  bool sound = !maps.empty() && maps.size() <= 16;
  for (const Map& one : maps) {
    pointers.push_back(one.map);
    sound = sound && deepen_map_anchors(one.map) == deepen_map_anchors(maps[0].map);
  }
  bool right = false;
  const deepen_settings settings = make_settings(&in, &right);
  deepen_fusion* fusion = nullptr;
  ++fuzz::calls.count;
  const deepen_status status =
      deepen_fusion_create(pointers.data(), int32_t(pointers.size()), &settings, &fusion);
  PROMISED(status == (sound && right ? DEEPEN_OK : DEEPEN_INVALID_ARGUMENT));
  PROMISED((status == DEEPEN_OK) == (fusion != nullptr));
  const bool early = in.one_in(2);
  if (early) {
    for (const Map& one : maps) deepen_map_free(one.map);
  }
  for (int64_t i = in.below(3); fusion != nullptr && i >= 0; --i) step(&in, fusion, settings, &maps);
  if (!early) {
    for (const Map& one : maps) deepen_map_free(one.map);
  }
  deepen_fusion_free(fusion);
  return 0;
}
