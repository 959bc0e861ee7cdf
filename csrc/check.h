// Checks that throw cf::Error, which Python sees as cfengine.errors.KernelError.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace cf {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw Error(text.str());
}

// Values that index memory live in tensors, so their range can only be checked where they are read.
inline void check_range(const char* name, int64_t place, int64_t value, int64_t low, int64_t high, const char* remedy) {
    if (value < low || value >= high)
        fail(name, "[", place, "] is ", value, " but must be at least ", low, " and below ", high, "; ", remedy);
}

inline void check_divides(const char* name, int64_t value, const char* by_name, int64_t by) {
    if (by < 1 || value % by)
        fail(name, " is ", value, " but ", by_name, " is ", by, "; ", name, " must be a multiple of ", by_name);
}

}  // namespace cf
