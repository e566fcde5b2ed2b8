// inverse_search: anything out of range is an error before anything is written; sound input gives numbers.
#include "ops/inverse_search.h"

#include <algorithm>

#include "core/check.h"
#include "rows.h"

using namespace deepen;
using fuzz::Buffer;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input in(data, size);
  in.choose_isa();
  const int64_t anchors = 1 + in.below(60), vocab = 1 + in.below(40), batch = in.below(6);
  const int64_t candidates = 1 + in.below(vocab);
  fuzz::Rows rows = fuzz::sound_rows(&in, vocab, anchors, in.one_in(4));
  const bool spoilt = in.one_in(3);
  if (spoilt) fuzz::spoil(&in, &rows, anchors);
  Buffer<float> logits(batch * candidates), tail(batch), target(batch * anchors), found(batch * candidates);
  Buffer<int32_t> ids(batch * candidates);
  in.logits(&logits);
  bool finite = !spoilt;
  for (int64_t i = 0; i < logits.count; ++i) {
    ids[i] = int32_t((i * 7 + in.below(3)) % vocab);
    finite = finite && std::fabs(logits[i]) < 1e30f;
  }
  const bool empty_tail = in.one_in(4);
  for (int64_t b = 0; b < batch; ++b) tail[b] = empty_tail ? -INFINITY : logits[b * candidates];
  for (int64_t i = 0; i < target.count; ++i) target[i] = 1.0f / float(anchors);
  const bool strange = in.one_in(4);
  if (strange) in.logits(&target), in.logits(&tail);
  bool refused = false;
  if (in.one_in(8) && batch > 0) {
    static const int32_t odd[] = {-1, INT32_MAX, INT32_MIN};
    ids[int64_t(in.word()) % ids.count] = in.one_in(2) ? int32_t(vocab) : odd[in.below(3)];
    refused = true;
  }
  InverseSearchParams params{logits.data(), ids.data(), tail.data(),     target.data(),
                             found.data(),  nullptr,    rows.view(),     batch,
                             candidates,    anchors,    fuzz::rate(&in), fuzz::steps(&in)};
  const bool settings = params.steps >= 0 && params.steps <= kMaxSearchSteps && params.learning_rate > 0 &&
                        params.learning_rate <= kMaxLearningRate;
  refused = refused || !settings;
  const int64_t number = in.no_size();
  if (in.one_in(8)) {
    refused = true;
    switch (in.below(4)) {
      case 0: params.batch = number < 0 ? number : -1; break;
      case 1: params.candidates = in.one_in(2) ? vocab + 1 : number; break;
      case 2: params.anchors = number <= 0 ? number : 0; break;
      default: params.rows.entries = in.one_in(2) ? anchors + 1 : number;
    }
  }
  const Backend backend{in.one_in(16) ? 2 : 1, -1, nullptr};
  for (int64_t i = 0; i < found.count; ++i) found[i] = 7.5f;
  try {
    Buffer<char> workspace(int64_t(
        inverse_search_workspace(params.rows, params.batch, params.candidates, params.anchors, backend)));
    params.workspace = workspace.data();
    ++fuzz::calls.count;
    inverse_search(params, backend);
    PROMISED(!refused);
  } catch (const ArgumentError&) {
    PROMISED(refused || spoilt);
    PROMISED(std::all_of(found.data(), found.data() + found.count, [](float one) { return one == 7.5f; }));
    return 0;
  }
  if (!finite || strange || params.learning_rate > 1) return 0;
  for (int64_t i = 0; i < found.count; ++i) PROMISED(std::isfinite(found[i]));
  return 0;
}
