//! The launchers with host arrays in and out, for test_kernels.py: copied to the device, run on a stream of
//! its own, copied back. Compiled by nvcc for a GPU, or as C++ over cuda_emulator.hpp.

#include "ops.cuh"

#include <vector>

namespace {

//! A device copy of a host array; written back when `isOutput`. Filled with 0xCD first, so that gaps show.
class Device {
public:
    Device(void* host, size_t bytes, bool isOutput) : mHost(host), mBytes(bytes), mIsOutput(isOutput) {
        mStatus = cudaMalloc(&mDevice, bytes + 16);
        if (mStatus == cudaSuccess && host) {
            mStatus = cudaMemcpy(mDevice, host, bytes, cudaMemcpyHostToDevice);
        }
    }
    ~Device() {
        if (mIsOutput && mHost) {
            cudaMemcpy(mHost, mDevice, mBytes, cudaMemcpyDeviceToHost);
        }
        cudaFree(mDevice);
    }
    template <typename T> T* as() const { return static_cast<T*>(mDevice); }

private:
    void* mHost;
    size_t mBytes;
    bool mIsOutput;
    void* mDevice = nullptr;
    cudaError_t mStatus;
};

Device in(void const* host, size_t count) {
    return {const_cast<void*>(host), count * 4, false};
}
Device out(void* host, size_t count) {
    return {host, count * 4, true};
}
Device scratch(size_t bytes) {
    return {nullptr, bytes, false};
}

int finish(cudaError_t launched) {
    cudaError_t const ran = cudaDeviceSynchronize();
    return launched != cudaSuccess ? launched : ran;
}

} // namespace

extern "C" {

int farthest_point_sample(int32_t* idx, float const* points, int count, int samples, float minNormSq) {
    Device const i = out(idx, samples), p = in(points, 3 * count),
                 w = scratch(m3ad::tileWorkspaceBytes(count));
    return finish(m3ad::farthestPointSample(i.as<int32_t>(), p.as<float>(), count, samples, minNormSq,
                                            w.as<void>(), nullptr));
}

int knn_group(float* neighborhood, int32_t* knn, float const* points, int32_t const* idx, int count,
              int groups, int size) {
    Device const n = out(neighborhood, 3 * groups * size), k = out(knn, groups * size),
                 p = in(points, 3 * count);
    Device const i = in(idx, groups), w = scratch(m3ad::tileWorkspaceBytes(count));
    return finish(m3ad::knnGroup(n.as<float>(), k.as<int32_t>(), p.as<float>(), i.as<int32_t>(), count,
                                 groups, size, w.as<void>(), nullptr));
}

int point_group(int32_t* idx, float* neighborhood, int32_t* knn, float const* points, int count, int samples,
                float minNormSq, int size) {
    Device const i = out(idx, samples), n = out(neighborhood, 3 * samples * size),
                 k = out(knn, samples * size);
    Device const p = in(points, 3 * count), w = scratch(m3ad::tileWorkspaceBytes(count));
    return finish(m3ad::pointGroup(i.as<int32_t>(), n.as<float>(), k.as<int32_t>(), p.as<float>(), count,
                                   samples, minNormSq, size, w.as<void>(), nullptr));
}

//! `half`: rows and tokens are fp16.
int token_interpolate(void* rows, float const* points, int32_t const* pixel, float const* centers,
                      void const* tokens, int32_t const* scoredPixel, int count, int groups, int width,
                      int rowCount, int imageSize, int half) {
    size_t const element = half ? 2 : 4;
    Device const r(rows, static_cast<size_t>(rowCount) * width * element, true),
        t(const_cast<void*>(tokens), groups * width * element, false);
    Device const s = in(scoredPixel, rowCount), p = in(points, 3 * count), x = in(pixel, count);
    Device const g = in(centers, 3 * groups), w = scratch(m3ad::interpolateWorkspaceBytes(imageSize));
    auto const run = [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        return m3ad::tokenInterpolate<T>(r.as<T>(), p.as<float>(), x.as<int32_t>(), g.as<float>(), t.as<T>(),
                                         s.as<int32_t>(), count, groups, width, rowCount, imageSize,
                                         w.as<void>(), nullptr);
    };
    return finish(half ? run(static_cast<__half*>(nullptr)) : run(static_cast<float*>(nullptr)));
}

int one_class_svm(float* decision, float const* x, float const* vectors, float const* coefficients,
                  float const* rho, int rows, int width, int count, int rbf, float gamma) {
    Device const d = out(decision, rows), a = in(x, rows * width), v = in(vectors, count * width);
    Device const c = in(coefficients, count), r = in(rho, 1), w = scratch(m3ad::svmWorkspaceBytes(width));
    return finish(m3ad::oneClassSvm(d.as<float>(), a.as<float>(), v.as<float>(), c.as<float>(), r.as<float>(),
                                    rows, width, count, rbf != 0, gamma, w.as<void>(), nullptr));
}
}
