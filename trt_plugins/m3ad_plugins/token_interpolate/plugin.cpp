//! TokenInterpolate as TensorRT sees it: attributes, shapes, types, and the call of the launcher.

#include "../plugin/plugin_base.hpp"
#include "kernel.cuh"

namespace m3ad {
namespace {

struct TokenInterpolate {
    static constexpr char kNAME[] = "TokenInterpolate", kVERSION[] = "2";
    // points, point_pixel, centers, tokens, scored_pixel -> rows
    static constexpr int32_t kINPUTS = 5, kOUTPUTS = 1;
    int32_t imageSize = 0;
    int32_t outputSize = 0; //!< 0, as in what was made before there was the attribute: imageSize

    std::vector<Attribute> attributes() {
        return {{"image_size", nv::PluginFieldType::kINT32, &imageSize},
                {"output_size", nv::PluginFieldType::kINT32, &outputSize}};
    }
    int32_t outputSide() const { return outputSize == 0 ? imageSize : outputSize; }
    void check() const {
        require(imageSize >= 3 && imageSize <= 4096, text("image_size: expected 3..4096, got ", imageSize));
        require(
            outputSide() <= imageSize && 4 * static_cast<int64_t>(outputSide()) >= imageSize,
            text("output_size: expected a quarter of image_size ", imageSize, " up to it, got ", outputSize));
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
        requireOnePerPoint("point_pixel", in[1], in[0]);
        requireXyz("centers", in[2]);
        requireRank("tokens", in[3], 2);
        requireRank("scored_pixel", in[4], 1);
        int64_t const groups = in[2].d[0];
        require(groups < 0 || (groups >= 3 && groups <= kMAX_CENTERS),
                text("centers: expected 3..", kMAX_CENTERS, " of them, got ", groups));
        require(groups < 0 || in[3].d[0] < 0 || groups == in[3].d[0],
                text("tokens: expected one row per centre, G = ", groups, ", got ", in[3].d[0]));
    }
    size_t workspaceBytes(nv::Dims const*) const { return workspaceTokenInterpolate(imageSize); }
    cudaError_t run(nv::PluginTensorDesc const* desc, void const* const* in, void* const* out,
                    void* workspace, cudaStream_t stream) const {
        return launchTokenInterpolate(
            out[0], static_cast<float const*>(in[0]), static_cast<int32_t const*>(in[1]),
            static_cast<float const*>(in[2]), in[3], static_cast<int32_t const*>(in[4]),
            static_cast<int32_t>(desc[0].dims.d[0]), static_cast<int32_t>(desc[2].dims.d[0]),
            static_cast<int32_t>(desc[3].dims.d[1]), static_cast<int32_t>(desc[4].dims.d[0]),
            desc[3].type == nv::DataType::kHALF, imageSize, outputSide(), workspace, stream);
    }
};

Registered<TokenInterpolate> const gRegistered;

} // namespace
} // namespace m3ad
