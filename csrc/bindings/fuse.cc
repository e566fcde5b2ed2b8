#include "ops/fuse.h"

#include <algorithm>
#include <vector>

#include "bindings/bindings.h"
#include "core/check.h"

namespace deepen {

// (ids, probs, tail, k, rows) of one member.
using PackedMember = std::tuple<Address, Address, Address, int64_t, PackedRows>;

void bind_fuse(py::module_& module) {
  module.def(
      "fuse_workspace",
      [](const PackedRows& main_rows, int64_t batch, int64_t k, int64_t anchors,
         const PackedBackend& backend) {
        FuseMember main{};
        main.rows = unpack(main_rows);
        main.k = k;
        return fuse_workspace(main, batch, anchors, unpack(backend));
      },
      py::arg("main_rows"), py::arg("batch"), py::arg("k"), py::arg("anchors"), py::arg("backend"));
  module.def(
      "fuse",
      [](const std::vector<PackedMember>& members, Address weights, Address logits, int dtype, int64_t batch,
         int64_t anchors, double learning_rate, int32_t steps, float min_probability, bool log_probs,
         Address fused, Address chosen, Address workspace, const PackedBackend& backend) {
        DEEPEN_CHECK(members.size() <= size_t(kMaxMembers), "there are ", members.size(),
                     " members; at most ", kMaxMembers, " are possible");
        FuseParams params{};
        std::transform(members.begin(), members.end(), params.members, [](const PackedMember& member) {
          const auto& [ids, probs, tail, k, rows] = member;
          return FuseMember{at<const int32_t>(ids), at<const float>(probs), at<const float>(tail),
                            unpack(rows), k};
        });
        params.weights = at<const float>(weights);
        params.logits = at<void>(logits);
        params.fused = at<float>(fused);
        params.chosen = at<int32_t>(chosen);
        params.workspace = at<void>(workspace);
        params.batch = batch;
        params.anchors = anchors;
        params.learning_rate = learning_rate;
        params.min_probability = min_probability;
        params.steps = steps;
        params.log_probs = log_probs;
        params.member_count = int32_t(members.size());
        params.dtype = Dtype(dtype);
        py::gil_scoped_release release;
        fuse(params, unpack(backend));
      },
      py::arg("members"), py::arg("weights"), py::arg("logits"), py::arg("dtype"), py::arg("batch"),
      py::arg("anchors"), py::arg("learning_rate"), py::arg("steps"), py::arg("min_probability"),
      py::arg("log_probs"), py::arg("fused"), py::arg("chosen"), py::arg("workspace"), py::arg("backend"));
}

}  // namespace deepen
