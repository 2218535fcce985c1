//! The launcher of NearestRow: plain device pointers, outputs first, then inputs, sizes, workspace and
//! stream. It allocates nothing, waits for nothing and uses no default stream, so it can be captured in a
//! CUDA graph. Inputs are already checked (plugin.cpp); reference.py is the specification.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace m3ad {

extern "C" {

//! Numbers of the workspace: one a query and block of rows.
int32_t blockMinima(int32_t queries, int32_t rows);

size_t workspaceNearestRow(int32_t minima);

//! distance [queries], idx [queries] of x [queries, width] and bank [rows, width].
cudaError_t launchNearestRow(float* distance, int32_t* idx, float const* x, float const* bank,
                             int32_t queries, int32_t width, int32_t rows, void* workspace,
                             cudaStream_t stream);
}

} // namespace m3ad
