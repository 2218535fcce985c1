//! Splits a range over threads; the calling thread takes the first part.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

// One binary for every x86-64: the hot loops are compiled for AVX-512, AVX2 and the base set, chosen at load
// time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define M3AD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define M3AD_CLONES
#endif

namespace m3ad {

//! Calls work(start, stop, part) for `threads` consecutive parts of 0 .. count; rethrows the first error.
template <typename Work> void parallelFor(int32_t count, int32_t threads, Work const& work) {
    int32_t const parts = std::max(1, std::min(threads, count));
    std::vector<std::exception_ptr> errors(parts);
    auto const run = [&](int32_t part) noexcept {
        try {
            work(static_cast<int32_t>(int64_t{count} * part / parts),
                 static_cast<int32_t>(int64_t{count} * (part + 1) / parts), part);
        } catch (...) {
            errors[part] = std::current_exception();
        }
    };
    std::vector<std::thread> helpers;
    for (int32_t part = 1; part < parts; ++part) {
        helpers.emplace_back(run, part);
    }
    run(0);
    for (auto& helper : helpers) {
        helper.join();
    }
    for (auto const& error : errors) {
        if (error) {
            std::rethrow_exception(error);
        }
    }
}

} // namespace m3ad
