// fuse: anything out of range is an error and leaves the logits as they are; with the ids of topk_softmax the
// token chosen is the argmax of the new logits, and no logit but a candidate's has changed.
#include "ops/fuse.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "ops/topk_softmax.h"
#include "rows.h"

using namespace deepen;
using fuzz::Buffer;

namespace {

struct Member {
  fuzz::Rows rows;
  Buffer<int32_t> ids;
  Buffer<float> probs, tail;
  int64_t k;
};

void check_row(const FuseParams& params, const Buffer<char>& before, int64_t row, bool sound) {
  const int64_t vocab = params.members[0].rows.vocab, k = params.members[0].k;
  const auto* now = static_cast<const char*>(params.logits);
  std::vector<bool> candidate(static_cast<size_t>(vocab));
  const int32_t* ids = params.members[0].ids + row * k;
  for (int64_t t = 0; t < k; ++t) candidate[size_t(ids[t])] = true;
  int64_t best = 0;
  bool numbers = true;
  for (int64_t id = 0; id < vocab; ++id) {
    const int64_t at = row * vocab + id;
    const float here = fuzz::loaded(now, at, params.dtype);
    numbers = numbers && here == here;
    if (here > fuzz::loaded(now, row * vocab + best, params.dtype)) best = id;
    if (!candidate[size_t(id)]) {
      const int64_t bytes = fuzz::size_of(params.dtype);
      PROMISED(std::memcmp(now + at * bytes, before.values.get() + at * bytes, size_t(bytes)) == 0);
    }
  }
  PROMISED(numbers || !sound);
  if (numbers) PROMISED(params.chosen[row] == best);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input in(data, size);
  in.choose_isa();
  const int64_t anchors = 1 + in.below(60), batch = in.below(6), count = 1 + in.below(in.one_in(16) ? 16 : 3);
  const bool dense = in.one_in(4), own_ids = in.one_in(3);
  bool refused = false, spoilt = false, sound = !own_ids;
  const Backend backend{in.one_in(16) ? 2 : 1, -1, nullptr};
  const Dtype dtype = in.dtype();
  Buffer<char> logits(0);
  std::vector<Member> members;
  std::vector<TopkSoftmaxParams> tops;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t vocab = 1 + in.below(40), k = 1 + in.below(vocab);
    Member one{fuzz::sound_rows(&in, vocab, anchors, dense), Buffer<int32_t>(batch * k),
               Buffer<float>(batch * k), Buffer<float>(batch), k};
    Buffer<float> values(batch * vocab);
    in.logits(&values);
    Buffer<char> stored = fuzz::stored(&values, dtype);
    Buffer<int32_t> status(batch);
    TopkSoftmaxParams top{
        stored.data(), one.ids.data(), one.probs.data(), one.tail.data(), status.data(), batch, vocab, k,
        dtype};
    Buffer<char> workspace(int64_t(topk_softmax_workspace(&top, 1, backend)));
    ++fuzz::calls.count;
    topk_softmax(&top, 1, workspace.data(), backend);
    for (int64_t row = 0; row < batch; ++row) {
      // An error unless the member has no weight in this row: its ids are -1.
      if (status[row] != kRowOk) spoilt = true, refused = refused || (i == 0 && !own_ids);
    }
    if (own_ids && in.one_in(2)) {
      for (int64_t t = 0; t < one.ids.count; ++t) one.ids[t] = int32_t(in.below(vocab + 1)), spoilt = true;
      in.logits(&one.probs);
      in.logits(&one.tail);
    }
    if (in.one_in(8)) fuzz::spoil(&in, &one.rows, anchors), spoilt = true, sound = false;
    if (i == 0) logits = std::move(stored);
    members.push_back(std::move(one));
  }
  Buffer<float> weights(batch * count), fused(batch * members[0].k);
  Buffer<int32_t> chosen(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t alone = in.below(count + 1);
    for (int64_t i = 0; i < count; ++i) {
      weights[b * count + i] = alone == count ? 1.0f / float(count) : i == alone ? 1.0f : 0.0f;
    }
  }
  if (in.one_in(8)) in.logits(&weights);
  refused = refused || !fuzz::are_shares(weights, batch, count);
  FuseParams params{};
  for (int64_t i = 0; i < count; ++i) {
    Member& one = members[size_t(i)];
    params.members[i] = {one.ids.data(), one.probs.data(), one.tail.data(), one.rows.view(), one.k};
  }
  params.weights = weights.data();
  params.logits = logits.data();
  params.fused = fused.data();
  params.chosen = chosen.data();
  params.batch = batch;
  params.anchors = anchors;
  params.learning_rate = fuzz::rate(&in);
  params.min_probability = in.one_in(8) ? in.hostile() : in.one_in(2) ? 1e-4f : 0.0f;
  params.steps = fuzz::steps(&in);
  params.member_count = int32_t(count);
  params.dtype = dtype;
  params.log_probs = in.one_in(2);
  const bool settings = params.steps >= 0 && params.steps <= kMaxSearchSteps && params.learning_rate > 0 &&
                        params.learning_rate <= kMaxLearningRate && params.min_probability >= 0 &&
                        params.min_probability < 1;
  refused = refused || !settings;
  sound = sound && params.learning_rate < 1;
  if (in.one_in(8)) {
    const int64_t number = in.no_size();
    FuseMember& one = params.members[in.below(count)];
    refused = true;
    switch (in.below(7)) {
      case 0: params.batch = number < 0 ? number : -1; break;
      case 1: params.anchors = number <= 0 ? number : 0; break;
      case 2: params.member_count = int32_t(17 * in.below(2)); break;
      case 3: one.k = in.one_in(2) ? one.rows.vocab + 1 : number; break;
      case 4: one.rows.entries = in.one_in(2) ? anchors + 1 : number; break;
      case 5:
        params.weights = reinterpret_cast<const float*>(logits.data());
        if (logits.count == 0) return 0;
        break;
      default:
        if (count == 1 || anchors > one.rows.vocab * one.rows.entries) return 0;
        one.rows.columns = dense ? one.ids : nullptr;  // the kinds are mixed
    }
  }
  Buffer<char> before(logits.count);
  if (logits.count > 0) std::memcpy(before.data(), logits.data(), size_t(logits.count));
  try {
    Buffer<char> workspace(int64_t(fuse_workspace(params.members[0], params.batch, params.anchors, backend)));
    params.workspace = workspace.data();
    ++fuzz::calls.count;
    fuse(params, backend);
    PROMISED(!refused);
  } catch (const ArgumentError&) {
    PROMISED(refused || spoilt);
    PROMISED(logits.count == 0 || std::memcmp(before.data(), logits.data(), size_t(logits.count)) == 0);
    return 0;
  }
  for (int64_t row = 0; row < batch; ++row) {
    PROMISED(chosen[row] >= 0 && chosen[row] < members[0].rows.vocab);
    if (!own_ids) check_row(params, before, row, sound);
  }
  return 0;
}
