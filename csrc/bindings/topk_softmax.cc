#include "ops/topk_softmax.h"

#include "bindings/bindings.h"

namespace deepen {

void bind_topk_softmax(py::module_& module) {
  module.def(
      "topk_softmax_workspace",
      [](int64_t batch, int64_t vocab, int64_t k, const PackedBackend& backend) {
        return topk_softmax_workspace(batch, vocab, k, unpack(backend));
      },
      py::arg("batch"), py::arg("vocab"), py::arg("k"), py::arg("backend"));
  module.def(
      "topk_softmax",
      [](Address logits, int dtype, int64_t batch, int64_t vocab, int64_t k, Address ids, Address probs,
         Address tail, Address status, Address workspace, const PackedBackend& backend) {
        const TopkSoftmaxParams params{at<const void>(logits),
                                       at<int32_t>(ids),
                                       at<float>(probs),
                                       at<float>(tail),
                                       at<int32_t>(status),
                                       at<void>(workspace),
                                       batch,
                                       vocab,
                                       k,
                                       Dtype(dtype)};
        py::gil_scoped_release release;
        topk_softmax(params, unpack(backend));
      },
      py::arg("logits"), py::arg("dtype"), py::arg("batch"), py::arg("vocab"), py::arg("k"), py::arg("ids"),
      py::arg("probs"), py::arg("tail"), py::arg("status"), py::arg("workspace"), py::arg("backend"));
}

}  // namespace deepen
