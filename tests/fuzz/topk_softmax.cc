// topk_softmax of one to three members: the right ids, probabilities and status, whatever the logits are.
#include "ops/topk_softmax.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/check.h"
#include "input.h"

using namespace deepen;
using fuzz::Buffer;

namespace {

struct Member {
  Buffer<float> values;
  Buffer<char> logits;
  Buffer<int32_t> ids;
  Buffer<float> probs, tail;
  Buffer<int32_t> status;
  TopkSoftmaxParams params;
};

Member make(fuzz::Input* in) {
  const bool large = in->one_in(250);  // more than one block of the kernel
  const int64_t batch = large ? 1 : in->below(4), vocab = large ? 2000 + in->below(256) : 1 + in->below(80);
  const int64_t k = in->one_in(4) ? vocab : 1 + in->below(vocab < 100 ? vocab : 100);
  const Dtype dtype = in->dtype();
  Buffer<float> values(batch * vocab);
  in->logits(&values);
  Buffer<char> logits = fuzz::stored(&values, dtype);
  Member made{std::move(values),
              std::move(logits),
              Buffer<int32_t>(batch * k),
              Buffer<float>(batch * k),
              Buffer<float>(batch),
              Buffer<int32_t>(batch),
              {}};
  made.params = {made.logits.data(),
                 made.ids.data(),
                 made.probs.data(),
                 made.tail.data(),
                 made.status.data(),
                 batch,
                 vocab,
                 k,
                 dtype};
  return made;
}

void check_row(Member* member, int64_t row) {
  const int64_t vocab = member->params.vocab, k = member->params.k;
  const float* logits = member->values.data() + row * vocab;
  bool finite = true;
  float largest = -INFINITY;
  for (int64_t i = 0; i < vocab; ++i) {
    finite = finite && logits[i] < INFINITY;  // false for NaN too
    largest = std::max(largest, logits[i]);
  }
  const int32_t status = !finite ? kRowNotFinite : largest == -INFINITY ? kRowEmpty : kRowOk;
  PROMISED(member->status[row] == status);
  if (status != kRowOk) {
    for (int64_t t = 0; t < k; ++t) PROMISED(member->ids[row * k + t] == -1);
    return;
  }
  std::vector<int32_t> order(static_cast<size_t>(vocab));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int32_t a, int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); });
  double sum = 0, kept = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(double(logits[i]) - double(largest));
  for (int64_t t = 0; t < k; ++t) {
    PROMISED(member->ids[row * k + t] == order[size_t(t)]);
    const double right = std::exp(double(logits[order[size_t(t)]]) - double(largest)) / sum;
    PROMISED(std::fabs(double(member->probs[row * k + t]) - right) <= 1e-5 * right + 1e-37);
    kept += right;
  }
  PROMISED(member->tail[row] >= 0 && std::fabs(double(member->tail[row]) - (1 - kept)) <= 1e-5);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input in(data, size);
  in.choose_isa();
  std::vector<Member> members;
  std::vector<TopkSoftmaxParams> params;
  for (int64_t i = in.below(3); i >= 0; --i) members.push_back(make(&in));
  for (Member& one : members) params.push_back(one.params);
  const bool broken = in.one_in(8);
  if (broken) {
    TopkSoftmaxParams& one = params[size_t(in.below(int64_t(params.size())))];
    const int64_t number = in.no_size();
    switch (in.below(3)) {
      case 0: one.batch = number < 0 ? number : -1; break;
      case 1: one.vocab = number; break;
      default: one.k = in.one_in(2) ? one.vocab + 1 : number;
    }
  }
  const Backend backend{in.one_in(16) ? 2 : 1, -1, nullptr};
  try {
    Buffer<char> workspace(int64_t(topk_softmax_workspace(params.data(), int64_t(params.size()), backend)));
    ++fuzz::calls.count;
    topk_softmax(params.data(), int64_t(params.size()), workspace.data(), backend);
    PROMISED(!broken);
  } catch (const ArgumentError&) {
    PROMISED(broken);
    return 0;
  }
  for (Member& one : members) {
    for (int64_t row = 0; row < one.params.batch; ++row) check_row(&one, row);
  }
  return 0;
}
