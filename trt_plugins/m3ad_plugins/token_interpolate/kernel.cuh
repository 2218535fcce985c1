//! The launcher of TokenInterpolate: plain device pointers, outputs first, then inputs, sizes, attributes,
//! workspace and stream. It allocates nothing, waits for nothing and uses no default stream, so it can be
//! captured in a CUDA graph. Inputs are already checked (plugin.cpp); reference.py is the specification.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace m3ad {

constexpr int32_t kMAX_CENTERS = 12288; //!< candidate centres that fit in shared memory

extern "C" {

size_t workspaceTokenInterpolate(int32_t imageSize);

//! rows [rowCount, width] of the pixels scoredPixel [rowCount] of a grid of outputSize; zero where no
//! foreground pixel lies under the taps. rows and tokens [groups, width] are float or, with isHalf, __half;
//! sums are fp32.
cudaError_t launchTokenInterpolate(void* rows, float const* points, int32_t const* pointPixel,
                                   float const* centers, void const* tokens, int32_t const* scoredPixel,
                                   int32_t count, int32_t groups, int32_t width, int32_t rowCount,
                                   bool isHalf, int32_t imageSize, int32_t outputSize, void* workspace,
                                   cudaStream_t stream);
}

} // namespace m3ad
