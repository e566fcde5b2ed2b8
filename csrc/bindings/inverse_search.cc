#include "ops/inverse_search.h"

#include "bindings/bindings.h"

namespace deepen {

void bind_inverse_search(py::module_& module) {
  module.def(
      "inverse_search_workspace",
      [](const PackedRows& rows, int64_t batch, int64_t candidates, int64_t anchors,
         const PackedBackend& backend) {
        return inverse_search_workspace(unpack(rows), batch, candidates, anchors, unpack(backend));
      },
      py::arg("rows"), py::arg("batch"), py::arg("candidates"), py::arg("anchors"), py::arg("backend"));
  module.def(
      "inverse_search",
      [](Address logits, Address ids, Address tail_logit, Address target, const PackedRows& rows,
         int64_t batch, int64_t candidates, int64_t anchors, double learning_rate, int32_t steps,
         Address found, Address workspace, const PackedBackend& backend) {
        const InverseSearchParams params{at<const float>(logits),
                                         at<const int32_t>(ids),
                                         at<const float>(tail_logit),
                                         at<const float>(target),
                                         at<float>(found),
                                         at<void>(workspace),
                                         unpack(rows),
                                         batch,
                                         candidates,
                                         anchors,
                                         learning_rate,
                                         steps};
        py::gil_scoped_release release;
        inverse_search(params, unpack(backend));
      },
      py::arg("logits"), py::arg("ids"), py::arg("tail_logit"), py::arg("target"), py::arg("rows"),
      py::arg("batch"), py::arg("candidates"), py::arg("anchors"), py::arg("learning_rate"), py::arg("steps"),
      py::arg("found"), py::arg("workspace"), py::arg("backend"));
}

}  // namespace deepen
