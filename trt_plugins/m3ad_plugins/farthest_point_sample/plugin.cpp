//! FarthestPointSample as TensorRT sees it: attributes, shapes, types, and the call of the launcher.

#include "../plugin/plugin_base.hpp"
#include "kernel.cuh"

namespace m3ad {
namespace {

struct FarthestPointSample {
    static constexpr char kNAME[] = "FarthestPointSample", kVERSION[] = "2";
    static constexpr int32_t kINPUTS = 2, kOUTPUTS = 1; // points, point_pixel -> idx
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
    static bool inputFits(int32_t i, nv::DataType const* types) {
        return types[i] == (i == 0 ? nv::DataType::kFLOAT : nv::DataType::kINT32);
    }
    static nv::DataType outputType(int32_t, nv::DataType const*) { return nv::DataType::kINT32; }
    void outputShapes(nv::DimsExprs const*, nv::DimsExprs* outputs, nv::IExprBuilder& build) const {
        setDims(outputs[0], {build.constant(numSamples)});
    }
    void checkShapes(nv::Dims const* in) const {
        requireXyz("points", in[0]);
        requireOnePerPoint("point_pixel", in[1], in[0]);
        requireAtLeast("num_samples", numSamples, in[0].d[0]);
    }
    size_t workspaceBytes(nv::Dims const* in) const {
        return workspaceFarthestPointSample(static_cast<int32_t>(in[0].d[0]));
    }
    cudaError_t run(nv::PluginTensorDesc const* desc, void const* const* in, void* const* out,
                    void* workspace, cudaStream_t stream) const {
        return launchFarthestPointSample(static_cast<int32_t*>(out[0]), static_cast<float const*>(in[0]),
                                         static_cast<int32_t const*>(in[1]),
                                         static_cast<int32_t>(desc[0].dims.d[0]), numSamples, minNormSq,
                                         workspace, stream);
    }
};

Registered<FarthestPointSample> const gRegistered;

} // namespace
} // namespace m3ad
