// Bindings unpack integers into parameter structs, release the GIL and call; they compute nothing. Pointers
// come as the integers of Tensor.data_ptr(); shapes, dtypes and devices were checked in deepen_ext/ops.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "core/backend.h"
#include "ops/relative_map.h"

namespace deepen {

namespace py = pybind11;

using Address = uintptr_t;  // Tensor.data_ptr(), 0 for null

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (columns, values, rest, vocab, entries), as deepen_ext.ops packs them.
using PackedRows = std::tuple<Address, Address, Address, int64_t, int64_t>;

inline RelativeRows unpack(const PackedRows& rows) {
  return {at<const int32_t>(std::get<0>(rows)), at<const float>(std::get<1>(rows)),
          at<const float>(std::get<2>(rows)), std::get<3>(rows), std::get<4>(rows)};
}

// (threads, device, stream): device -1 is the CPU; the stream is a cudaStream_t as an integer.
using PackedBackend = std::tuple<int, int, Address>;

inline Backend unpack(const PackedBackend& backend) {
  return {std::get<0>(backend), std::get<1>(backend), at<void>(std::get<2>(backend))};
}

void bind_topk_softmax(py::module_& module);
void bind_relative_rows(py::module_& module);
void bind_inverse_search(py::module_& module);
void bind_fuse(py::module_& module);

}  // namespace deepen
