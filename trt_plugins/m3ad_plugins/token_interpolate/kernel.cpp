#include "kernel.hpp"

#include "../common/arithmetic.hpp"
#include "../common/c_api.hpp"
#include "../common/parallel.hpp"
#include "../common/tiles.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace m3ad {
namespace {

//! The 3 nearest centres of a pixel and their weights; index[0] < 0 marks a pixel without a point.
struct PixelTokens {
    int32_t index[kNEIGHBORS];
    float weight[kNEIGHBORS];
};

struct Centers {
    std::vector<float> x, y, z;
};

//! Least and greatest distance from the box of tile t to every centre: [groups] each.
M3AD_CLONES void boundDistances(Tiles const& tiles, int32_t t, Centers const& centers,
                                float* __restrict least, float* __restrict most) {
    float const loX = tiles.loX[t], hiX = tiles.hiX[t], loY = tiles.loY[t], hiY = tiles.hiY[t];
    float const loZ = tiles.loZ[t], hiZ = tiles.hiZ[t];
    float const *x = centers.x.data(), *y = centers.y.data(), *z = centers.z.data();
    for (size_t g = 0, groups = centers.x.size(); g < groups; ++g) {
        least[g] = normSq(gap(x[g], loX, hiX), gap(y[g], loY, hiY), gap(z[g], loZ, hiZ));
        most[g] = normSq(reach(x[g], loX, hiX), reach(y[g], loY, hiY), reach(z[g], loZ, hiZ));
    }
}

//! Keeps the 3 nearest centres of each lane; centres come in ascending order, so a tie leaves the lower
//! index.
M3AD_CLONES void nearestThree(Tile const& tile, Centers const& centers,
                              std::vector<int32_t> const& candidates, float (&distance)[kNEIGHBORS][kTILE],
                              int32_t (&index)[kNEIGHBORS][kTILE]) {
    std::fill(&distance[0][0], &distance[0][0] + kNEIGHBORS * kTILE, std::numeric_limits<float>::infinity());
    std::fill(&index[0][0], &index[0][0] + kNEIGHBORS * kTILE, 0);
    for (int32_t const g : candidates) {
        float const cx = centers.x[g], cy = centers.y[g], cz = centers.z[g];
        for (int32_t lane = 0; lane < kTILE; ++lane) {
            float const d = distanceSq(tile.x[lane], tile.y[lane], tile.z[lane], cx, cy, cz);
            float const d0 = distance[0][lane], d1 = distance[1][lane], d2 = distance[2][lane];
            int32_t const i0 = index[0][lane], i1 = index[1][lane], i2 = index[2][lane];
            distance[0][lane] = d < d0 ? d : d0;
            index[0][lane] = d < d0 ? g : i0;
            distance[1][lane] = d < d0 ? d0 : (d < d1 ? d : d1);
            index[1][lane] = d < d0 ? i0 : (d < d1 ? g : i1);
            distance[2][lane] = d < d1 ? d1 : (d < d2 ? d : d2);
            index[2][lane] = d < d1 ? i1 : (d < d2 ? g : i2);
        }
    }
}

void findTokens(Tiles const& tiles, Centers const& centers, int32_t const* pointPixel,
                std::vector<PixelTokens>& pixels, int32_t threads) {
    size_t const groups = centers.x.size();
    parallelFor(tiles.size(), threads, [&](int32_t begin, int32_t end, int32_t) {
        std::vector<float> least(groups), most(groups);
        std::vector<int32_t> candidates;
        for (int32_t t = begin; t < end; ++t) {
            boundDistances(tiles, t, centers, least.data(), most.data());
            float bound[kNEIGHBORS]; // the three smallest: no point of the tile is farther from its third
                                     // centre
            std::partial_sort_copy(most.begin(), most.end(), bound, bound + kNEIGHBORS);
            candidates.clear();
            for (size_t g = 0; g < groups; ++g) {
                if (least[g] <= bound[kNEIGHBORS - 1]) {
                    candidates.push_back(static_cast<int32_t>(g));
                }
            }
            float distance[kNEIGHBORS][kTILE];
            int32_t index[kNEIGHBORS][kTILE];
            Tile const& tile = tiles.tile[t];
            nearestThree(tile, centers, candidates, distance, index);
            for (int32_t lane = 0; lane < tile.count; ++lane) {
                float const near[] = {distance[0][lane], distance[1][lane], distance[2][lane]};
                PixelTokens& pixel = pixels[pointPixel[tile.index[lane]]];
                interpolationWeights(near, pixel.weight);
                for (int32_t k = 0; k < kNEIGHBORS; ++k) {
                    pixel.index[k] = index[k][lane];
                }
            }
        }
    });
}

//! Sums the taps of one output pixel per centre: ascending centres into indices and weights, their number
//! returned.
int32_t poolRow(std::vector<PixelTokens> const& pixels, PoolTaps rows, PoolTaps columns, int32_t imageSize,
                std::vector<float>& sum, int32_t* indices, float* weights) {
    int32_t count = 0;
    float across[kMAX_WIDE_TAPS];
    for (int32_t j = 0; j < columns.count; ++j) {
        across[j] = columns.weight(j);
    }
    for (int32_t i = 0; i < rows.count; ++i) {
        float const down = rows.weight(i);
        for (int32_t j = 0; j < columns.count; ++j) {
            PixelTokens const& pixel = pixels[(rows.first + i) * imageSize + columns.first + j];
            if (pixel.index[0] < 0) {
                continue;
            }
            float const tap = mul(down, across[j]);
            for (int32_t k = 0; k < kNEIGHBORS; ++k) {
                int32_t const g = pixel.index[k];
                if (sum[g] < 0) {
                    sum[g] = 0;
                    indices[count++] = g;
                }
                sum[g] = add(sum[g], mul(tap, pixel.weight[k]));
            }
        }
    }
    std::sort(indices, indices + count);
    for (int32_t n = 0; n < count; ++n) {
        weights[n] = sum[indices[n]];
        sum[indices[n]] = -1;
    }
    return count;
}

} // namespace

void interpolationOperator(float const* points, int32_t const* pointPixel, int32_t count,
                           float const* centers, int32_t groups, int32_t const* scoredPixel, int32_t rows,
                           int32_t imageSize, int32_t outputSize, int32_t capacity, int32_t* indptr,
                           int32_t* indices, float* weights, int32_t threads) {
    Centers lanes{std::vector<float>(groups), std::vector<float>(groups), std::vector<float>(groups)};
    for (int32_t g = 0; g < groups; ++g) {
        lanes.x[g] = centers[3 * g];
        lanes.y[g] = centers[3 * g + 1];
        lanes.z[g] = centers[3 * g + 2];
    }
    std::vector<PixelTokens> pixels(static_cast<size_t>(imageSize) * imageSize,
                                    PixelTokens{{-1, -1, -1}, {}});
    findTokens(makeTiles(points, pointPixel, count, imageSize), lanes, pointPixel, pixels, threads);

    // Each stretch of rows fills its own stretch of indices and weights; the stretches are then moved
    // together.
    constexpr int32_t kSTRETCH = 256;
    std::vector<int32_t> sizes(rows);
    int32_t const stretches = (rows + kSTRETCH - 1) / kSTRETCH;
    parallelFor(stretches, threads, [&](int32_t begin, int32_t end, int32_t) {
        std::vector<float> sum(groups, -1);
        for (int32_t stretch = begin; stretch < end; ++stretch) {
            int64_t at = int64_t{stretch} * kSTRETCH * capacity;
            int32_t const last = std::min(rows, (stretch + 1) * kSTRETCH);
            for (int32_t row = stretch * kSTRETCH; row < last; ++row) {
                int32_t const y = scoredPixel[row] / outputSize, x = scoredPixel[row] % outputSize;
                sizes[row] =
                    poolRow(pixels, poolTaps(y, imageSize, outputSize), poolTaps(x, imageSize, outputSize),
                            imageSize, sum, indices + at, weights + at);
                at += sizes[row];
            }
        }
    });
    indptr[0] = 0;
    for (int32_t stretch = 0; stretch < stretches; ++stretch) {
        int64_t const from = int64_t{stretch} * kSTRETCH * capacity;
        int32_t const first = stretch * kSTRETCH, last = std::min(rows, first + kSTRETCH);
        for (int32_t row = first; row < last; ++row) {
            indptr[row + 1] = indptr[row] + sizes[row];
        }
        size_t const entries = indptr[last] - indptr[first];
        std::memmove(indices + indptr[first], indices + from, entries * sizeof *indices);
        std::memmove(weights + indptr[first], weights + from, entries * sizeof *weights);
    }
}

} // namespace m3ad

M3AD_API m3ad_interpolation_operator(float const* points, int32_t const* pointPixel, int32_t count,
                                     float const* centers, int32_t groups, int32_t const* scoredPixel,
                                     int32_t rows, int32_t imageSize, int32_t outputSize, int32_t capacity,
                                     int32_t* indptr, int32_t* indices, float* weights, int32_t threads) {
    return m3ad::guarded([&] {
        m3ad::interpolationOperator(points, pointPixel, count, centers, groups, scoredPixel, rows, imageSize,
                                    outputSize, capacity, indptr, indices, weights, threads);
    });
}
