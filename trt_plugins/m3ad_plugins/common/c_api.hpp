//! The C face of the ops that the Python package calls (native.py): arrays as pointers, 0 for success, 1 when
//! memory or threads ran out.
#pragma once

#include <cstdint>
#include <exception>

#define M3AD_API extern "C" __attribute__((visibility("default"))) int32_t

namespace m3ad {

template <typename Work> int32_t guarded(Work const& work) noexcept {
    try {
        work();
        return 0;
    } catch (std::exception const&) {
        return 1;
    }
}

} // namespace m3ad
