//! The launcher of OneClassSvm: plain device pointers, outputs first, then inputs, sizes, attributes,
//! workspace and stream. It allocates nothing, waits for nothing and uses no default stream, so it can be
//! captured in a CUDA graph. Inputs are already checked (plugin.cpp); reference.py is the specification.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace m3ad {

extern "C" {

size_t workspaceOneClassSvm(int32_t width);

//! decision [rows] of x [rows, width]; rho [1] lies on the device.
cudaError_t launchOneClassSvm(float* decision, float const* x, float const* supportVectors,
                              float const* coefficients, float const* rho, int32_t rows, int32_t width,
                              int32_t vectors, bool rbf, float gamma, void* workspace, cudaStream_t stream);
}

} // namespace m3ad
