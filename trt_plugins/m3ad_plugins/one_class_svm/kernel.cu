//! OneClassSvm: f(x) = sum_k c_k k(v_k, x) - rho, k = v.x or exp(-gamma |v - x|^2) (reference.py).
//! One thread per row; with rbf, distances, exponentials and the sum stay in registers: no [R, K] matrix
//! exists.

#include "../common/warp.cuh"
#include "kernel.cuh"

namespace m3ad {
namespace {

// ---------------------------------------------------------------------------------------------------------
// kernels

constexpr int32_t kTHREADS = 128;
constexpr int32_t kIN_REGISTERS = 16; //!< widths up to this keep the row in registers
constexpr int32_t kPARTIAL = 32;      //!< support vectors per partial sum, to keep fp32 rounding small

//! normal [width] = sum_k c_k v_k
__global__ void __launch_bounds__(kTHREADS)
    normalKernel(float* normal, float const* supportVectors, float const* coefficients, int32_t width,
                 int32_t vectors) {
    int32_t const d = blockIdx.x * kTHREADS + threadIdx.x;
    if (d >= width) {
        return; // guard
    }
    float sum = 0.0F;
    for (int32_t start = 0; start < vectors; start += kPARTIAL) {
        float partial = 0.0F;
        for (int32_t k = start; k < min(start + kPARTIAL, vectors); ++k) {
            partial = fmaf(coefficients[k], supportVectors[static_cast<int64_t>(k) * width + d], partial);
        }
        sum += partial;
    }
    normal[d] = sum;
}

//! decision [rows], x [rows, width], normal [width]
__global__ void __launch_bounds__(kTHREADS) linearKernel(float* decision, float const* x, float const* normal,
                                                         float const* rho, int32_t rows, int32_t width) {
    int32_t const row = blockIdx.x * kTHREADS + threadIdx.x;
    if (row >= rows) {
        return; // guard
    }
    float sum = 0.0F;
    for (int32_t d = 0; d < width; ++d) {
        sum = fmaf(x[static_cast<int64_t>(row) * width + d], normal[d], sum);
    }
    decision[row] = sum - *rho;
}

//! decision [rows], x [rows, width], supportVectors [vectors, width], coefficients [vectors]
template <bool kREGISTERS>
__global__ void __launch_bounds__(kTHREADS)
    rbfKernel(float* decision, float const* x, float const* supportVectors, float const* coefficients,
              float const* rho, int32_t rows, int32_t width, int32_t vectors, float gamma) {
    int32_t const row = blockIdx.x * kTHREADS + threadIdx.x;
    if (row >= rows) {
        return; // guard
    }
    float const* source = x + static_cast<int64_t>(row) * width;
    float own[kREGISTERS ? kIN_REGISTERS : 1];
    if constexpr (kREGISTERS) {
#pragma unroll
        for (int32_t d = 0; d < kIN_REGISTERS; ++d) {
            own[d] = d < width ? source[d] : 0.0F;
        }
    }
    float sum = 0.0F;
    for (int32_t start = 0; start < vectors; start += kPARTIAL) {
        float partial = 0.0F;
        for (int32_t k = start; k < min(start + kPARTIAL, vectors); ++k) {
            float const* vector = supportVectors + static_cast<int64_t>(k) * width;
            float distance = 0.0F;
            if constexpr (kREGISTERS) {
#pragma unroll
                for (int32_t d = 0; d < kIN_REGISTERS; ++d) {
                    float const difference = d < width ? own[d] - vector[d] : 0.0F;
                    distance = fmaf(difference, difference, distance);
                }
            } else {
                for (int32_t d = 0; d < width; ++d) {
                    float const difference = source[d] - vector[d];
                    distance = fmaf(difference, difference, distance);
                }
            }
            partial = fmaf(coefficients[k], expf(-gamma * distance), partial);
        }
        sum += partial;
    }
    decision[row] = sum - *rho;
}

} // namespace

// --------------------------------------------------------------------------------------------------------
// launcher

size_t workspaceOneClassSvm(int32_t width) {
    return width * sizeof(float);
}

cudaError_t launchOneClassSvm(float* decision, float const* x, float const* supportVectors,
                              float const* coefficients, float const* rho, int32_t rows, int32_t width,
                              int32_t vectors, bool rbf, float gamma, void* workspace, cudaStream_t stream) {
    if (rows == 0) {
        return cudaSuccess;
    }
    int32_t const blocks = ceilDiv(rows, kTHREADS);
    if (rbf) {
        auto const kernel = width <= kIN_REGISTERS ? rbfKernel<true> : rbfKernel<false>;
        kernel<<<blocks, kTHREADS, 0, stream>>>(decision, x, supportVectors, coefficients, rho, rows, width,
                                                vectors, gamma);
        return cudaGetLastError();
    }
    auto* normal = static_cast<float*>(workspace);
    normalKernel<<<ceilDiv(width, kTHREADS), kTHREADS, 0, stream>>>(normal, supportVectors, coefficients,
                                                                    width, vectors);
    linearKernel<<<blocks, kTHREADS, 0, stream>>>(decision, x, normal, rho, rows, width);
    return cudaGetLastError();
}

} // namespace m3ad
