//! The launcher of FarthestPointSample: plain device pointers, outputs first, then inputs, sizes, attributes,
//! workspace and stream. It allocates nothing, waits for nothing and uses no default stream, so it can be
//! captured in a CUDA graph. Inputs are already checked (plugin.cpp); reference.py is the specification.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace m3ad {

extern "C" {

//! Scratch for the tiles of `count` points.
size_t workspaceFarthestPointSample(int32_t count);

//! idx [numSamples] of points [count, 3]. pointPixel [count] is not read and may be null: one block sorts the
//! points into tiles about as tight as pixel tiles, the same that KnnGroup has to build, which gets no
//! pixels.
cudaError_t launchFarthestPointSample(int32_t* idx, float const* points, int32_t const* pointPixel,
                                      int32_t count, int32_t numSamples, float minNormSq, void* workspace,
                                      cudaStream_t stream);
}

} // namespace m3ad
