//! OneClassSvm as TensorRT sees it: attributes, shapes, types, and the call of the launcher.

#include "../plugin/plugin_base.hpp"
#include "kernel.cuh"

namespace m3ad {
namespace {

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
        return workspaceOneClassSvm(static_cast<int32_t>(in[0].d[1]));
    }
    cudaError_t run(nv::PluginTensorDesc const* desc, void const* const* in, void* const* out,
                    void* workspace, cudaStream_t stream) const {
        return launchOneClassSvm(
            static_cast<float*>(out[0]), static_cast<float const*>(in[0]), static_cast<float const*>(in[1]),
            static_cast<float const*>(in[2]), static_cast<float const*>(in[3]),
            static_cast<int32_t>(desc[0].dims.d[0]), static_cast<int32_t>(desc[0].dims.d[1]),
            static_cast<int32_t>(desc[1].dims.d[0]), kernel == "rbf", gamma, workspace, stream);
    }
};

Registered<OneClassSvm> const gRegistered;

} // namespace
} // namespace m3ad
