//! One product finds, exact distances decide. About the bank's mean, |q - b|^2 = |q|^2 - 2 u with
//! u = q b - |b|^2 / 2, formed in fp32 with a bound of its error; a row is measured in fp64 unless the bound
//! says that it is farther than the nearest one so far. So rounding changes no answer, and few rows are
//! measured.

#include "kernel.hpp"

#include "../common/c_api.hpp"
#include "../common/parallel.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string_view>
#include <unordered_map>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace m3ad {
namespace {

constexpr int32_t kQUERIES = 6; //!< of a block of products, so that its sums stay in registers
constexpr int32_t kLANES = 32;  //!< rows of such a block
constexpr int32_t kPANELS = 4;  //!< blocks of rows that a thread takes at once: they stay in the second cache
constexpr double kROUNDING = 0x1p-24;

//! u [kQUERIES, kLANES] of x [width, kQUERIES] and rows [width, kLANES].
using Products = void (*)(float const* x, float const* rows, float const* halfNorms, int32_t width, float* u);

void productsAnywhere(float const* x, float const* rows, float const* halfNorms, int32_t width, float* u) {
    for (int32_t half = 0; half < kLANES; half += kLANES / 2) {
        float sum[kQUERIES][kLANES / 2] = {};
        for (int32_t d = 0; d < width; ++d) {
            for (int32_t q = 0; q < kQUERIES; ++q) {
                for (int32_t lane = 0; lane < kLANES / 2; ++lane) {
                    sum[q][lane] += x[d * kQUERIES + q] * rows[d * kLANES + half + lane];
                }
            }
        }
        for (int32_t q = 0; q < kQUERIES; ++q) {
            for (int32_t lane = 0; lane < kLANES / 2; ++lane) {
                u[q * kLANES + half + lane] = sum[q][lane] - halfNorms[half + lane];
            }
        }
    }
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void productsAvx2(float const* x, float const* rows,
                                                      float const* halfNorms, int32_t width, float* u) {
    for (int32_t half = 0; half < kLANES; half += 16) {
        __m256 sum[kQUERIES][2];
        for (auto& each : sum) {
            each[0] = each[1] = _mm256_setzero_ps();
        }
        for (int32_t d = 0; d < width; ++d) {
            __m256 const low = _mm256_loadu_ps(rows + d * kLANES + half);
            __m256 const high = _mm256_loadu_ps(rows + d * kLANES + half + 8);
#pragma GCC unroll 6
            for (int32_t q = 0; q < kQUERIES; ++q) {
                __m256 const value = _mm256_broadcast_ss(x + d * kQUERIES + q);
                sum[q][0] = _mm256_fmadd_ps(value, low, sum[q][0]);
                sum[q][1] = _mm256_fmadd_ps(value, high, sum[q][1]);
            }
        }
#pragma GCC unroll 6
        for (int32_t q = 0; q < kQUERIES; ++q) {
            float* const to = u + q * kLANES + half;
            _mm256_storeu_ps(to, _mm256_sub_ps(sum[q][0], _mm256_loadu_ps(halfNorms + half)));
            _mm256_storeu_ps(to + 8, _mm256_sub_ps(sum[q][1], _mm256_loadu_ps(halfNorms + half + 8)));
        }
    }
}

__attribute__((target("avx512f"))) void productsAvx512(float const* x, float const* rows,
                                                       float const* halfNorms, int32_t width, float* u) {
    __m512 sum[kQUERIES][2];
    for (auto& each : sum) {
        each[0] = each[1] = _mm512_setzero_ps();
    }
    for (int32_t d = 0; d < width; ++d) {
        __m512 const low = _mm512_loadu_ps(rows + d * kLANES);
        __m512 const high = _mm512_loadu_ps(rows + d * kLANES + 16);
#pragma GCC unroll 6
        for (int32_t q = 0; q < kQUERIES; ++q) {
            __m512 const value = _mm512_set1_ps(x[d * kQUERIES + q]);
            sum[q][0] = _mm512_fmadd_ps(value, low, sum[q][0]);
            sum[q][1] = _mm512_fmadd_ps(value, high, sum[q][1]);
        }
    }
#pragma GCC unroll 6
    for (int32_t q = 0; q < kQUERIES; ++q) {
        float* const to = u + q * kLANES;
        _mm512_storeu_ps(to, _mm512_sub_ps(sum[q][0], _mm512_loadu_ps(halfNorms)));
        _mm512_storeu_ps(to + 16, _mm512_sub_ps(sum[q][1], _mm512_loadu_ps(halfNorms + 16)));
    }
}
#endif

Products products() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        return productsAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return productsAvx2;
    }
#endif
    return productsAnywhere;
}

//! |a - b|^2 in fp64, in one order on every machine.
M3AD_CLONES double distanceSq64(float const* a, float const* b, int32_t width) {
    constexpr int32_t kSUMS = 8;
    double sum[kSUMS] = {};
    int32_t d = 0;
    for (; d + kSUMS <= width; d += kSUMS) {
        for (int32_t k = 0; k < kSUMS; ++k) {
            double const difference = static_cast<double>(a[d + k]) - b[d + k];
            sum[k] += difference * difference;
        }
    }
    for (; d < width; ++d) {
        double const difference = static_cast<double>(a[d]) - b[d];
        sum[d % kSUMS] += difference * difference;
    }
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

double normSq64(float const* row, int32_t width) {
    double sum = 0;
    for (int32_t d = 0; d < width; ++d) {
        sum += static_cast<double>(row[d]) * row[d];
    }
    return sum;
}

//! The nearest row so far, and the least u that a nearer or equally near one can have.
struct Best {
    double distanceSq = std::numeric_limits<double>::infinity();
    int32_t row = 0;
    float least = -std::numeric_limits<float>::infinity();
};

//! Of equal queries, as cells without a point are, the first is asked: its place among the asked, by query.
std::vector<int32_t> distinct(float const* x, int32_t queries, int32_t width, std::vector<int32_t>& asked) {
    std::unordered_map<std::string_view, int32_t> places;
    std::vector<int32_t> place(queries);
    for (int32_t q = 0; q < queries; ++q) {
        std::string_view const bytes(reinterpret_cast<char const*>(x + int64_t{q} * width),
                                     sizeof(float) * width);
        auto const [found, isNew] = places.try_emplace(bytes, static_cast<int32_t>(asked.size()));
        if (isNew) {
            asked.push_back(q);
        }
        place[q] = found->second;
    }
    return place;
}

struct Search {
    float const* x;
    float const* bank;
    int32_t width, rows;
    std::vector<float> mean;
    std::vector<int32_t> asked;
    std::vector<float> packed;  //!< asked queries less the mean: [blocks, width, kQUERIES]
    std::vector<double> normSq; //!< of those
    Products const multiply = products();

    int32_t blocks() const { return static_cast<int32_t>(asked.size() + kQUERIES - 1) / kQUERIES; }

    void pack(int32_t begin, int32_t end) {
        std::vector<float> centred(width);
        for (int32_t n = begin * kQUERIES; n < std::min<int32_t>(end * kQUERIES, asked.size()); ++n) {
            float* const block = packed.data() + int64_t{n / kQUERIES} * kQUERIES * width;
            for (int32_t d = 0; d < width; ++d) {
                centred[d] = x[int64_t{asked[n]} * width + d] - mean[d];
                block[d * kQUERIES + n % kQUERIES] = centred[d];
            }
            normSq[n] = normSq64(centred.data(), width);
        }
    }

    //! Measure a block of rows against every query; `best` is the calling thread's.
    void tile(int32_t start, std::vector<float>& panels, std::vector<Best>& best) const {
        int32_t const count = std::min(kPANELS * kLANES, rows - start);
        float halfNorms[kPANELS * kLANES];
        std::fill_n(halfNorms, kPANELS * kLANES, std::numeric_limits<float>::infinity()); // past the last row
        std::fill(panels.begin(), panels.end(), 0.0F);
        std::vector<float> centred(width);
        double largest = 0;
        for (int32_t row = 0; row < count; ++row) {
            float* const panel = panels.data() + int64_t{row / kLANES} * kLANES * width + row % kLANES;
            float const* const source = bank + int64_t{start + row} * width;
            for (int32_t d = 0; d < width; ++d) {
                centred[d] = source[d] - mean[d];
                panel[d * kLANES] = centred[d];
            }
            double const squares = normSq64(centred.data(), width);
            halfNorms[row] = static_cast<float>(squares / 2);
            largest = std::max(largest, squares);
        }
        float u[kQUERIES * kLANES];
        for (int32_t block = 0; block < blocks(); ++block) {
            int32_t const queries = std::min<int32_t>(kQUERIES, asked.size() - block * kQUERIES);
            double error[kQUERIES]; // |computed - true| of |q|^2 - 2 u
            for (int32_t q = 0; q < queries; ++q) {
                double const reach = std::sqrt(normSq[block * kQUERIES + q]) + std::sqrt(largest);
                error[q] = (width + 32) * kROUNDING * reach * reach + width * 0x1p-120;
                if (reach * reach > std::numeric_limits<float>::max() / 2) { // products and norms overflow
                    error[q] = std::numeric_limits<double>::infinity();      // so that every row is measured
                }
                setLeast(best[block * kQUERIES + q], normSq[block * kQUERIES + q], error[q]);
            }
            for (int32_t panel = 0; panel * kLANES < count; ++panel) {
                multiply(packed.data() + int64_t{block} * kQUERIES * width,
                         panels.data() + int64_t{panel} * kLANES * width, halfNorms + panel * kLANES, width,
                         u);
                for (int32_t q = 0; q < queries; ++q) {
                    int32_t const n = block * kQUERIES + q;
                    measure(u + q * kLANES, start + panel * kLANES, std::min(kLANES, count - panel * kLANES),
                            x + int64_t{asked[n]} * width, normSq[n], error[q], best[n]);
                }
            }
        }
    }

    static void setLeast(Best& best, double normSq, double error) {
        double const least = (normSq - best.distanceSq - error) / 2;
        best.least = std::nextafter(static_cast<float>(least), -std::numeric_limits<float>::infinity());
    }

    //! Of rows first .. first + count - 1, those that may be nearest, the most promising one first.
    void measure(float* u, int32_t first, int32_t count, float const* query, double normSq, double error,
                 Best& best) const {
        int32_t promising = 0;
        bool any = false;
        for (int32_t lane = 0; lane < kLANES; ++lane) { // what is no number is measured
            any |= !(u[lane] < best.least);
        }
        if (!any) {
            return;
        }
        for (int32_t lane = 1; lane < count; ++lane) {
            promising = u[lane] > u[promising] ? lane : promising;
        }
        for (int32_t turn = -1; turn < count; ++turn) {
            int32_t const lane = turn < 0 ? promising : turn;
            if (turn == promising || u[lane] < best.least) {
                continue;
            }
            int32_t const row = first + lane;
            double const found = distanceSq64(query, bank + int64_t{row} * width, width);
            if (found < best.distanceSq || (found == best.distanceSq && row < best.row)) {
                best.distanceSq = found;
                best.row = row;
                setLeast(best, normSq, error);
            }
        }
    }
};

} // namespace

void nearestRow(float const* x, int32_t queries, int32_t width, float const* bank, int32_t rows,
                float* distance, int32_t* idx, int32_t threads) {
    std::vector<double> sums(width);
    for (int32_t row = 0; row < rows; ++row) {
        for (int32_t d = 0; d < width; ++d) {
            sums[d] += bank[int64_t{row} * width + d];
        }
    }
    Search search{x, bank, width, rows, std::vector<float>(width), {}, {}, {}};
    std::transform(sums.begin(), sums.end(), search.mean.begin(),
                   [&](double sum) { return static_cast<float>(sum / rows); });
    std::vector<int32_t> const place = distinct(x, queries, width, search.asked);
    search.packed.resize(int64_t{search.blocks()} * kQUERIES * width);
    search.normSq.resize(search.asked.size());
    parallelFor(search.blocks(), threads,
                [&](int32_t begin, int32_t end, int32_t) { search.pack(begin, end); });

    int32_t const tiles = (rows + kPANELS * kLANES - 1) / (kPANELS * kLANES);
    std::vector<std::vector<Best>> parts(std::max(1, threads));
    parallelFor(tiles, threads, [&](int32_t begin, int32_t end, int32_t part) {
        parts[part].resize(search.asked.size());
        std::vector<float> panels(int64_t{kPANELS} * kLANES * width);
        for (int32_t tile = begin; tile < end; ++tile) {
            search.tile(tile * kPANELS * kLANES, panels, parts[part]);
        }
    });
    for (int32_t q = 0; q < queries; ++q) {
        Best best;
        for (auto const& part : parts) { // in the order of their rows: of equals the lowest stays
            if (!part.empty() && part[place[q]].distanceSq < best.distanceSq) {
                best = part[place[q]];
            }
        }
        distance[q] = static_cast<float>(std::sqrt(best.distanceSq));
        idx[q] = best.row;
    }
}

} // namespace m3ad

M3AD_API m3ad_nearest_row(float const* x, int32_t queries, int32_t width, float const* bank, int32_t rows,
                          float* distance, int32_t* idx, int32_t threads) {
    return m3ad::guarded([&] { m3ad::nearestRow(x, queries, width, bank, rows, distance, idx, threads); });
}
