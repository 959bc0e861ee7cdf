// What the register_<op> functions share: pointers and strides as Python integers. Level 0 copies only.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "check.h"

namespace cf {

typedef uintptr_t Pointer;
typedef std::array<int64_t, 2> Pair;
typedef std::array<int64_t, 3> Triple;

template <class T>
T* at(Pointer address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace cf
