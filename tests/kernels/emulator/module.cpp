// The CUDA kernels on the host as a Python module: what cfengine._C offers for CUDA, and the emulator's switches.
#define CF_EMULATOR_MAIN
#include "faults.h"

#include "../../../kernels/paged_attention/cuda.cpp"

PYBIND11_MODULE(_emulated, m) {
    m.def("cuda_architectures", [] { return std::vector<std::string>{"80", "90a"}; });
    m.def("set_seed", [](uint64_t seed) { cf::emulated::machine.seed = seed; }, "Another order of warps and blocks.");
    m.def("run_fault", &cf::faults::run_fault, "A small kernel with the fault named; 'none' has none.");
    pybind11::register_local_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const cf::Error& error) {
            PyErr_SetString(pybind11::module_::import("cfengine.errors").attr("KernelError").ptr(), error.what());
        }
    });
    cf::register_paged_attention_cuda(m);
}
