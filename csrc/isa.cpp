#include "isa.h"

#include "check.h"

namespace cf {
namespace {

const char* const names[] = {"generic", "avx2", "avx512", "avx512_bf16"};

bool built(int candidate) {
    switch (candidate) {
#if defined(CF_HAS_LEVEL_1)
        case 1: return true;
#endif
#if defined(CF_HAS_LEVEL_2)
        case 2: return true;
#endif
#if defined(CF_HAS_LEVEL_3)
        case 3: return true;
#endif
        default: return candidate == 0;
    }
}

bool runs(int candidate) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    switch (candidate) {
        case 1: return avx2;
        case 2: return avx512;
#if defined(CF_HAS_LEVEL_3)
        case 3: return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
        default: return candidate == 0;
    }
#else
    return candidate == 0;
#endif
}

int best() {
    for (int candidate = 3; candidate > 0; --candidate)
        if (built(candidate) && runs(candidate)) return candidate;
    return 0;
}

int& current() {
    static int value = best();
    return value;
}

}  // namespace

int level() { return current(); }

std::string level_name() { return names[current()]; }

std::vector<std::string> usable_levels() {
    std::vector<std::string> found;
    for (int candidate = 0; candidate < 4; ++candidate)
        if (built(candidate) && runs(candidate)) found.push_back(names[candidate]);
    return found;
}

void set_level(const std::string& name) {
    std::string usable;
    for (int candidate = 0; candidate < 4; ++candidate) {
        if (!built(candidate) || !runs(candidate)) continue;
        if (name == names[candidate]) {
            current() = candidate;
            return;
        }
        usable += usable.empty() ? names[candidate] : std::string(", ") + names[candidate];
    }
    fail("instruction set '", name, "' is not built or not known to this machine; choose one of ", usable);
}

}  // namespace cf
