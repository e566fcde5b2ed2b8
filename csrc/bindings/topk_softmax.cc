#include "ops/topk_softmax.h"

#include <algorithm>
#include <vector>

#include "bindings/bindings.h"

namespace deepen {

// (logits, dtype, batch, vocab, k, ids, probs, tail, status) of one member.
using PackedLogits = std::tuple<Address, int, int64_t, int64_t, int64_t, Address, Address, Address, Address>;

static std::vector<TopkSoftmaxParams> unpack(const std::vector<PackedLogits>& members) {
  std::vector<TopkSoftmaxParams> params(members.size());
  std::transform(members.begin(), members.end(), params.begin(), [](const PackedLogits& member) {
    const auto& [logits, dtype, batch, vocab, k, ids, probs, tail, status] = member;
    return TopkSoftmaxParams{at<const void>(logits),
                             at<int32_t>(ids),
                             at<float>(probs),
                             at<float>(tail),
                             at<int32_t>(status),
                             batch,
                             vocab,
                             k,
                             Dtype(dtype)};
  });
  return params;
}

void bind_topk_softmax(py::module_& module) {
  module.def(
      "topk_softmax_workspace",
      [](const std::vector<PackedLogits>& members, const PackedBackend& backend) {
        const std::vector<TopkSoftmaxParams> params = unpack(members);
        return topk_softmax_workspace(params.data(), int64_t(params.size()), unpack(backend));
      },
      py::arg("members"), py::arg("backend"));
  module.def(
      "topk_softmax",
      [](const std::vector<PackedLogits>& members, Address workspace, const PackedBackend& backend) {
        const std::vector<TopkSoftmaxParams> params = unpack(members);
        py::gil_scoped_release release;
        topk_softmax(params.data(), int64_t(params.size()), at<void>(workspace), unpack(backend));
      },
      py::arg("members"), py::arg("workspace"), py::arg("backend"));
}

}  // namespace deepen
