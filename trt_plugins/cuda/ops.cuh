//! The launchers of the CUDA kernels: plain functions of device pointers, sizes and a stream, outputs first.
//! They allocate nothing, wait for nothing and use no default stream, so they can be captured in a CUDA
//! graph. Inputs are already checked (plugin/); reference.py is the specification, cpp/ops.hpp the same ops
//! on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

namespace m3ad {

constexpr int32_t kMAX_GROUP_SIZE = 4064; //!< what KNN keeps of a centre in shared memory
constexpr int32_t kMAX_CENTERS = 12288;   //!< candidate centres interpolation keeps in shared memory

//! Scratch for the tiles of `count` points that FPS, KNN and point group need.
size_t tileWorkspaceBytes(int32_t count);

//! Farthest point sampling: idx [numSamples] of points [count, 3].
cudaError_t farthestPointSample(int32_t* idx, float const* points, int32_t count, int32_t numSamples,
                                float minNormSq, void* workspace, cudaStream_t stream);

//! KNN grouping: neighborhood [groups, groupSize, 3] and knnIdx [groups, groupSize] round points[idx].
cudaError_t knnGroup(float* neighborhood, int32_t* knnIdx, float const* points, int32_t const* idx,
                     int32_t count, int32_t groups, int32_t groupSize, void* workspace, cudaStream_t stream);

//! Both over the same tiles: sampling, grouping, gathering and centring without a way back to the host.
cudaError_t pointGroup(int32_t* idx, float* neighborhood, int32_t* knnIdx, float const* points, int32_t count,
                       int32_t numSamples, float minNormSq, int32_t groupSize, void* workspace,
                       cudaStream_t stream);

size_t interpolateWorkspaceBytes(int32_t imageSize);

//! Token interpolation: rows [rowCount, width] of the pixels scoredPixel [rowCount]; zero where no foreground
//! pixel lies under the taps. T is float or __half, sums are fp32.
template <typename T>
cudaError_t tokenInterpolate(T* rows, float const* points, int32_t const* pointPixel, float const* centers,
                             T const* tokens, int32_t const* scoredPixel, int32_t count, int32_t groups,
                             int32_t width, int32_t rowCount, int32_t imageSize, void* workspace,
                             cudaStream_t stream);

size_t svmWorkspaceBytes(int32_t width);

//! One-class SVM: decision [rows] of x [rows, width]; rho [1] lies on the device.
cudaError_t oneClassSvm(float* decision, float const* x, float const* supportVectors,
                        float const* coefficients, float const* rho, int32_t rows, int32_t width,
                        int32_t vectors, bool rbf, float gamma, void* workspace, cudaStream_t stream);

} // namespace m3ad
