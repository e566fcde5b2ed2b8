#include "ops/relative_rows.h"

#include "bindings/bindings.h"

namespace deepen {

void bind_relative_rows(py::module_& module) {
  module.def(
      "relative_rows_workspace",
      [](int64_t dim, int64_t anchors, int64_t entries, int64_t count, const PackedBackend& backend) {
        return relative_rows_workspace(dim, anchors, entries, count, unpack(backend));
      },
      py::arg("dim"), py::arg("anchors"), py::arg("entries"), py::arg("count"), py::arg("backend"));
  module.def(
      "relative_rows",
      [](Address embedding, int dtype, int64_t vocab, int64_t dim, Address tokens, int64_t count,
         Address anchor_ids, int64_t anchors, Address mean, Address anchor_inverse_norm, float temperature,
         bool normalise, int64_t entries, Address columns, Address values, Address rest, Address status,
         Address workspace, const PackedBackend& backend) {
        const RelativeRowsParams params{at<const void>(embedding),
                                        at<const int64_t>(tokens),
                                        at<const int64_t>(anchor_ids),
                                        at<const float>(mean),
                                        at<const float>(anchor_inverse_norm),
                                        at<int32_t>(columns),
                                        at<float>(values),
                                        at<float>(rest),
                                        at<int32_t>(status),
                                        at<void>(workspace),
                                        vocab,
                                        dim,
                                        count,
                                        anchors,
                                        entries,
                                        temperature,
                                        normalise,
                                        Dtype(dtype)};
        py::gil_scoped_release release;
        relative_rows(params, unpack(backend));
      },
      py::arg("embedding"), py::arg("dtype"), py::arg("vocab"), py::arg("dim"), py::arg("tokens"),
      py::arg("count"), py::arg("anchor_ids"), py::arg("anchors"), py::arg("mean"),
      py::arg("anchor_inverse_norm"), py::arg("temperature"), py::arg("normalise"), py::arg("entries"),
      py::arg("columns"), py::arg("values"), py::arg("rest"), py::arg("status"), py::arg("workspace"),
      py::arg("backend"));
}

}  // namespace deepen
