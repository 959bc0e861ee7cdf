// The Python module cfengine._C: one register_<op> line per operation. Pointers, sizes and strides only, no torch type.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "check.h"
#include "isa.h"

namespace py = pybind11;

namespace cf {
void register_paged_attention(py::module_& m);
void register_qk_norm_rope_store(py::module_& m);
void register_modulated_norm(py::module_& m);
void register_gated_residual(py::module_& m);
void register_slow_fast_update(py::module_& m);
void register_ring(py::module_& m);
void register_paged_attention_cuda(py::module_& m);

// Compute capabilities that CUDA kernels are built for, such as 80 and 90a; none without nvcc.
std::vector<std::string> cuda_architectures() {
    std::vector<std::string> names;
#if defined(CF_CUDA_ARCHITECTURES)
    std::istringstream text(CF_CUDA_ARCHITECTURES);
    for (std::string name; text >> name;) names.push_back(name);
#endif
    return names;
}
}  // namespace cf

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU and CUDA kernels of cfengine behind raw pointers";
    py::register_local_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const cf::Error& error) {
            const py::object type = py::module_::import("cfengine.errors").attr("KernelError");
            PyErr_SetString(type.ptr(), error.what());
        }
    });
#if defined(_OPENMP)
    m.attr("threaded") = true;
#else
    m.attr("threaded") = false;
#endif
    m.def("isa", &cf::level_name, "Name of the instruction set in force.");
    m.def("set_isa", &cf::set_level, py::arg("name"), "Force an instruction set (for tests).");
    m.def("isas", &cf::usable_levels, "Instruction sets that are built and run here, worst first.");
    cf::register_paged_attention(m);
    cf::register_qk_norm_rope_store(m);
    cf::register_modulated_norm(m);
    cf::register_gated_residual(m);
    cf::register_slow_fast_update(m);
    cf::register_ring(m);
    m.def("cuda_architectures", &cf::cuda_architectures, "Compute capabilities that CUDA kernels are built for.");
#if defined(CF_CUDA_ARCHITECTURES)
    cf::register_paged_attention_cuda(m);
#endif
}
