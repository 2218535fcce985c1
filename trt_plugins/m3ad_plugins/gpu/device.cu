//! Device memory for kernels.py, which calls the launchers itself. Compiled by nvcc for a GPU, or by the
//! tests as C++ over cuda_emulator.hpp.

#include <cstddef>
#include <cuda_runtime_api.h>

extern "C" {

//! A device copy of a host array, with a little room behind it so that nothing is empty.
int deviceCopy(void** device, void const* host, size_t bytes) {
    cudaError_t const status = cudaMalloc(device, bytes + 16);
    return status != cudaSuccess ? status : cudaMemcpy(*device, host, bytes, cudaMemcpyHostToDevice);
}

//! Waits for the kernels.
int deviceWait() {
    return cudaDeviceSynchronize();
}

int deviceRead(void* host, void* device, size_t bytes) {
    return cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost);
}

int deviceFree(void* device) {
    return cudaFree(device);
}
}
