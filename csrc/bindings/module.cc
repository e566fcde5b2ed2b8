#include "bindings/bindings.h"
#include "core/check.h"
#include "core/cuda_device.h"
#include "core/isa.h"

PYBIND11_MODULE(_core, module) {
  using namespace deepen;
  module.doc() = "The compiled core of deepen_ext. Use deepen_ext.ops, which checks what is passed here.";

  // What the core finds wrong with its arguments reads like what deepen_ext.ops finds wrong.
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const ArgumentError& error) {
      const py::object input_error = py::module_::import("deepen_ext.errors").attr("InputError");
      PyErr_SetString(input_error.ptr(), error.what());
    }
  });

  module.def("cuda_compiled", &cuda_compiled);
  module.def("cuda_device_count", &cuda_device_count);
  module.def("isa", [] { return isa_name(current_isa()); });
  module.def("best_isa", [] { return isa_name(best_isa()); });
  module.def("is_intel", &is_intel);
  module.def("set_isa", [](const std::string& name) {
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
      if (name == isa_name(isa)) return set_isa(isa);
    }
    throw_argument_error(__FILE__, __LINE__, "unknown instruction set '", name,
                         "'; use portable, avx2 or avx512");
  });

  bind_topk_softmax(module);
  bind_relative_rows(module);
  bind_inverse_search(module);
  bind_fuse(module);
}
