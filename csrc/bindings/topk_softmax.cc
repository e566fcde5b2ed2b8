#include "ops/topk_softmax.h"

#include "bindings/bindings.h"

namespace deepen {

void bind_topk_softmax(py::module_& module) {
  module.def("topk_softmax_workspace", &topk_softmax_workspace, py::arg("vocab"), py::arg("k"),
             py::arg("threads"));
  module.def(
      "topk_softmax",
      [](Address logits, int dtype, int64_t batch, int64_t vocab, int64_t k, Address ids, Address probs,
         Address tail, Address status, Address workspace, int threads) {
        topk_softmax_cpu({at<const void>(logits), at<int32_t>(ids), at<float>(probs), at<float>(tail),
                          at<int32_t>(status), at<void>(workspace), batch, vocab, k, Dtype(dtype)},
                         threads);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("logits"), py::arg("dtype"), py::arg("batch"),
      py::arg("vocab"), py::arg("k"), py::arg("ids"), py::arg("probs"), py::arg("tail"), py::arg("status"),
      py::arg("workspace"), py::arg("threads"));
}

}  // namespace deepen
