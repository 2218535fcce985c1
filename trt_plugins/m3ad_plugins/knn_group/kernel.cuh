//! The launcher of KnnGroup: plain device pointers, outputs first, then inputs, sizes, attributes, workspace
//! and stream. It allocates nothing, waits for nothing and uses no default stream, so it can be captured in a
//! CUDA graph. Inputs are already checked (plugin.cpp); reference.py is the specification.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace m3ad {

constexpr int32_t kMAX_GROUP_SIZE = 4064; //!< what is kept of a centre in shared memory

extern "C" {

//! Scratch for the tiles of `count` points.
size_t workspaceKnnGroup(int32_t count);

//! neighborhood [groups, groupSize, 3] and knnIdx [groups, groupSize] round points[idx].
cudaError_t launchKnnGroup(float* neighborhood, int32_t* knnIdx, float const* points, int32_t const* idx,
                           int32_t count, int32_t groups, int32_t groupSize, void* workspace,
                           cudaStream_t stream);

//! FarthestPointSample, then this over the same tiles: sampling, grouping, gathering and centring without a
//! way back to the host. The workspace is this op's.
cudaError_t launchPointGroup(int32_t* idx, float* neighborhood, int32_t* knnIdx, float const* points,
                             int32_t count, int32_t numSamples, float minNormSq, int32_t groupSize,
                             void* workspace, cudaStream_t stream);
}

} // namespace m3ad
