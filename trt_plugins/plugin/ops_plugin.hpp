//! The four ops as plugins see them: attributes, shapes, types, and the call of the launcher. README.md has
//! the table.
#pragma once

#include "../cuda/ops.cuh"
#include "plugin_base.hpp"

namespace m3ad {

inline void setDims(nv::DimsExprs& dims, std::initializer_list<nv::IDimensionExpr const*> sizes) {
    dims.nbDims = 0;
    for (auto const* size : sizes) {
        dims.d[dims.nbDims++] = size;
    }
}

inline void requireRank(char const* name, nv::Dims const& dims, int32_t rank) {
    require(dims.nbDims == rank, text(name, ": expected ", rank, " dimensions, got ", dims.nbDims));
}

//! [rows, 3] or unknown yet (-1).
inline void requireXyz(char const* name, nv::Dims const& dims) {
    requireRank(name, dims, 2);
    require(dims.d[1] == 3 || dims.d[1] < 0,
            text(name, ": expected [N, 3], got [", dims.d[0], ", ", dims.d[1], "]"));
}

//! A count known and below what an attribute asks for.
inline void requireAtLeast(char const* attribute, int32_t wanted, int64_t points) {
    require(points < 0 || points >= wanted, text(attribute, " is ", wanted, " but there are only N = ",
                                                 points, " points; remove less background"));
}

struct FarthestPointSample {
    static constexpr char kNAME[] = "FarthestPointSample", kVERSION[] = "1";
    static constexpr int32_t kINPUTS = 1, kOUTPUTS = 1; // points -> idx
    int32_t numSamples = 0;
    float minNormSq = 0.0F;

    std::vector<Attribute> attributes() {
        return {{"num_samples", nv::PluginFieldType::kINT32, &numSamples},
                {"min_norm_sq", nv::PluginFieldType::kFLOAT32, &minNormSq}};
    }
    void check() const {
        require(numSamples >= 1, text("num_samples: expected at least 1, got ", numSamples));
        require(minNormSq >= 0, text("min_norm_sq: expected at least 0, got ", minNormSq));
    }
    static bool inputFits(int32_t, nv::DataType const* types) { return types[0] == nv::DataType::kFLOAT; }
    static nv::DataType outputType(int32_t, nv::DataType const*) { return nv::DataType::kINT32; }
    void outputShapes(nv::DimsExprs const*, nv::DimsExprs* outputs, nv::IExprBuilder& build) const {
        setDims(outputs[0], {build.constant(numSamples)});
    }
    void checkShapes(nv::Dims const* in) const {
        requireXyz("points", in[0]);
        requireAtLeast("num_samples", numSamples, in[0].d[0]);
    }
    size_t workspaceBytes(nv::Dims const* in) const {
        return tileWorkspaceBytes(static_cast<int32_t>(in[0].d[0]));
    }
    cudaError_t run(nv::PluginTensorDesc const* desc, void const* const* in, void* const* out,
                    void* workspace, cudaStream_t stream) const {
        return farthestPointSample(static_cast<int32_t*>(out[0]), static_cast<float const*>(in[0]),
                                   static_cast<int32_t>(desc[0].dims.d[0]), numSamples, minNormSq, workspace,
                                   stream);
    }
};

struct KnnGroup {
    static constexpr char kNAME[] = "KnnGroup", kVERSION[] = "1";
    static constexpr int32_t kINPUTS = 2, kOUTPUTS = 2; // points, idx -> neighborhood, knn_idx
    int32_t groupSize = 0;

    std::vector<Attribute> attributes() { return {{"group_size", nv::PluginFieldType::kINT32, &groupSize}}; }
    void check() const {
        require(groupSize >= 1 && groupSize <= kMAX_GROUP_SIZE,
                text("group_size: expected 1..", kMAX_GROUP_SIZE, ", got ", groupSize));
    }
    static bool inputFits(int32_t i, nv::DataType const* types) {
        return types[i] == (i == 0 ? nv::DataType::kFLOAT : nv::DataType::kINT32);
    }
    static nv::DataType outputType(int32_t i, nv::DataType const*) {
        return i == 0 ? nv::DataType::kFLOAT : nv::DataType::kINT32;
    }
    void outputShapes(nv::DimsExprs const* in, nv::DimsExprs* outputs, nv::IExprBuilder& build) const {
        auto const *groups = in[1].d[0], *size = build.constant(groupSize);
        setDims(outputs[0], {groups, size, build.constant(3)});
        setDims(outputs[1], {groups, size});
    }
    void checkShapes(nv::Dims const* in) const {
        requireXyz("points", in[0]);
        requireRank("idx", in[1], 1);
        requireAtLeast("group_size", groupSize, in[0].d[0]);
    }
    size_t workspaceBytes(nv::Dims const* in) const {
        return tileWorkspaceBytes(static_cast<int32_t>(in[0].d[0]));
    }
    cudaError_t run(nv::PluginTensorDesc const* desc, void const* const* in, void* const* out,
                    void* workspace, cudaStream_t stream) const {
        return knnGroup(static_cast<float*>(out[0]), static_cast<int32_t*>(out[1]),
                        static_cast<float const*>(in[0]), static_cast<int32_t const*>(in[1]),
                        static_cast<int32_t>(desc[0].dims.d[0]), static_cast<int32_t>(desc[1].dims.d[0]),
                        groupSize, workspace, stream);
    }
};

struct TokenInterpolate {
    static constexpr char kNAME[] = "TokenInterpolate", kVERSION[] = "2";
    // points, point_pixel, centers, tokens, scored_pixel -> rows
    static constexpr int32_t kINPUTS = 5, kOUTPUTS = 1;
    int32_t imageSize = 0;

    std::vector<Attribute> attributes() { return {{"image_size", nv::PluginFieldType::kINT32, &imageSize}}; }
    void check() const {
        require(imageSize >= 3 && imageSize <= 4096, text("image_size: expected 3..4096, got ", imageSize));
    }
    static bool inputFits(int32_t i, nv::DataType const* types) {
        if (i == 3) {
            return types[3] == nv::DataType::kFLOAT || types[3] == nv::DataType::kHALF;
        }
        return types[i] == (i == 1 || i == 4 ? nv::DataType::kINT32 : nv::DataType::kFLOAT);
    }
    static nv::DataType outputType(int32_t, nv::DataType const* types) { return types[3]; }
    void outputShapes(nv::DimsExprs const* in, nv::DimsExprs* outputs, nv::IExprBuilder&) const {
        setDims(outputs[0], {in[4].d[0], in[3].d[1]});
    }
    void checkShapes(nv::Dims const* in) const {
        requireXyz("points", in[0]);
        requireRank("point_pixel", in[1], 1);
        requireXyz("centers", in[2]);
        requireRank("tokens", in[3], 2);
        requireRank("scored_pixel", in[4], 1);
        require(in[0].d[0] < 0 || in[1].d[0] < 0 || in[0].d[0] == in[1].d[0],
                text("point_pixel: expected one per point, N = ", in[0].d[0], ", got ", in[1].d[0]));
        int64_t const groups = in[2].d[0];
        require(groups < 0 || (groups >= 3 && groups <= kMAX_CENTERS),
                text("centers: expected 3..", kMAX_CENTERS, " of them, got ", groups));
        require(groups < 0 || in[3].d[0] < 0 || groups == in[3].d[0],
                text("tokens: expected one row per centre, G = ", groups, ", got ", in[3].d[0]));
    }
    size_t workspaceBytes(nv::Dims const*) const { return interpolateWorkspaceBytes(imageSize); }
    cudaError_t run(nv::PluginTensorDesc const* desc, void const* const* in, void* const* out,
                    void* workspace, cudaStream_t stream) const {
        return desc[3].type == nv::DataType::kHALF ? runAs<__half>(desc, in, out, workspace, stream)
                                                   : runAs<float>(desc, in, out, workspace, stream);
    }

private:
    template <typename T>
    cudaError_t runAs(nv::PluginTensorDesc const* desc, void const* const* in, void* const* out,
                      void* workspace, cudaStream_t stream) const {
        return tokenInterpolate<T>(
            static_cast<T*>(out[0]), static_cast<float const*>(in[0]), static_cast<int32_t const*>(in[1]),
            static_cast<float const*>(in[2]), static_cast<T const*>(in[3]),
            static_cast<int32_t const*>(in[4]), static_cast<int32_t>(desc[0].dims.d[0]),
            static_cast<int32_t>(desc[2].dims.d[0]), static_cast<int32_t>(desc[3].dims.d[1]),
            static_cast<int32_t>(desc[4].dims.d[0]), imageSize, workspace, stream);
    }
};

struct OneClassSvm {
    static constexpr char kNAME[] = "OneClassSvm", kVERSION[] = "1";
    // x, support_vectors, coefficients, rho -> decision; always fp32, as all of the scoring is
    static constexpr int32_t kINPUTS = 4, kOUTPUTS = 1;
    std::string kernel;
    float gamma = 1.0F;

    std::vector<Attribute> attributes() {
        return {{"kernel", nv::PluginFieldType::kCHAR, &kernel},
                {"gamma", nv::PluginFieldType::kFLOAT32, &gamma}};
    }
    void check() const {
        require(kernel == "linear" || kernel == "rbf",
                text("kernel: expected linear or rbf, got '", kernel, "'"));
        require(gamma > 0, text("gamma: expected a value above 0, got ", gamma));
    }
    static bool inputFits(int32_t i, nv::DataType const* types) { return types[i] == nv::DataType::kFLOAT; }
    static nv::DataType outputType(int32_t, nv::DataType const*) { return nv::DataType::kFLOAT; }
    void outputShapes(nv::DimsExprs const* in, nv::DimsExprs* outputs, nv::IExprBuilder&) const {
        setDims(outputs[0], {in[0].d[0]});
    }
    void checkShapes(nv::Dims const* in) const {
        requireRank("x", in[0], 2);
        requireRank("support_vectors", in[1], 2);
        requireRank("coefficients", in[2], 1);
        require(in[0].d[1] < 0 || in[1].d[1] < 0 || in[0].d[1] == in[1].d[1],
                text("support_vectors: expected width D = ", in[0].d[1], ", got ", in[1].d[1]));
        require(
            in[1].d[0] < 0 || in[2].d[0] < 0 || in[1].d[0] == in[2].d[0],
            text("coefficients: expected one per support vector, K = ", in[1].d[0], ", got ", in[2].d[0]));
    }
    size_t workspaceBytes(nv::Dims const* in) const {
        return svmWorkspaceBytes(static_cast<int32_t>(in[0].d[1]));
    }
    cudaError_t run(nv::PluginTensorDesc const* desc, void const* const* in, void* const* out,
                    void* workspace, cudaStream_t stream) const {
        return oneClassSvm(static_cast<float*>(out[0]), static_cast<float const*>(in[0]),
                           static_cast<float const*>(in[1]), static_cast<float const*>(in[2]),
                           static_cast<float const*>(in[3]), static_cast<int32_t>(desc[0].dims.d[0]),
                           static_cast<int32_t>(desc[0].dims.d[1]), static_cast<int32_t>(desc[1].dims.d[0]),
                           kernel == "rbf", gamma, workspace, stream);
    }
};

} // namespace m3ad
