//! The C face of the ops that native.py loads: arrays as pointers, 0 for success, 1 when memory or threads
//! ran out.

#include "ops.hpp"

#include <exception>

namespace {

template <typename Work> int32_t guarded(Work const& work) noexcept {
    try {
        work();
        return 0;
    } catch (std::exception const&) {
        return 1;
    }
}

} // namespace

#define M3AD_API extern "C" __attribute__((visibility("default"))) int32_t

// The hash of these sources when the library was built: native.py refuses a library of other sources.
extern "C" __attribute__((visibility("default"))) char const* m3ad_source_hash() {
    return M3AD_SOURCE_HASH;
}

M3AD_API m3ad_farthest_point_sample(float const* points, int32_t const* pointPixel, int32_t count,
                                    int32_t imageSize, int32_t numSamples, float minNormSq, int32_t* idx) {
    return guarded([&] {
        m3ad::Tiles const tiles = m3ad::makeTiles(points, pointPixel, count, imageSize);
        m3ad::farthestPointSample(tiles, points, numSamples, minNormSq, idx);
    });
}

M3AD_API m3ad_knn_group(float const* points, int32_t const* pointPixel, int32_t count, int32_t imageSize,
                        int32_t const* idx, int32_t groups, int32_t groupSize, float* neighborhood,
                        int32_t* knnIdx, int32_t threads) {
    return guarded([&] {
        m3ad::Tiles const tiles = m3ad::makeTiles(points, pointPixel, count, imageSize);
        m3ad::knnGroup(tiles, points, idx, groups, groupSize, neighborhood, knnIdx, threads);
    });
}

//! FPS and KNN over the same tiles.
M3AD_API m3ad_point_group(float const* points, int32_t const* pointPixel, int32_t count, int32_t imageSize,
                          int32_t numSamples, float minNormSq, int32_t groupSize, int32_t* idx,
                          float* neighborhood, int32_t* knnIdx, int32_t threads) {
    return guarded([&] {
        m3ad::Tiles const tiles = m3ad::makeTiles(points, pointPixel, count, imageSize);
        m3ad::farthestPointSample(tiles, points, numSamples, minNormSq, idx);
        m3ad::knnGroup(tiles, points, idx, numSamples, groupSize, neighborhood, knnIdx, threads);
    });
}

M3AD_API m3ad_interpolation_operator(float const* points, int32_t const* pointPixel, int32_t count,
                                     float const* centers, int32_t groups, int32_t const* scoredPixel,
                                     int32_t rows, int32_t imageSize, int32_t* indptr, int32_t* indices,
                                     float* weights, int32_t threads) {
    return guarded([&] {
        m3ad::interpolationOperator(points, pointPixel, count, centers, groups, scoredPixel, rows, imageSize,
                                    indptr, indices, weights, threads);
    });
}

M3AD_API m3ad_apply_rows(int32_t const* indptr, int32_t const* indices, float const* weights, int32_t rows,
                         float const* table, int32_t width, float* out, int32_t threads) {
    return guarded([&] { m3ad::applyRows({indptr, indices, weights}, rows, table, width, out, threads); });
}

//! features: per pair indptr, indices and weights of the sparse rows (null without) and the values.
M3AD_API m3ad_cosine_scores(m3ad::Features const* features, m3ad::Blocks const* reconstructed, int32_t pairs,
                            int32_t rows, float* scores, int32_t threads) {
    return guarded([&] { m3ad::cosineScores(features, reconstructed, pairs, rows, scores, threads); });
}

M3AD_API m3ad_one_class_svm(float const* x, int32_t rows, int32_t width, float const* supportVectors,
                            float const* coefficients, int32_t vectors, float rho, int32_t rbf, float gamma,
                            float* decision, int32_t threads) {
    return guarded([&] {
        m3ad::oneClassSvm(x, rows, width, supportVectors, coefficients, vectors, rho, rbf != 0, gamma,
                          decision, threads);
    });
}
