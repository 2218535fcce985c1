//! NearestRow as TensorRT sees it: shapes, types, and the call of the launcher.

#include "../plugin/plugin_base.hpp"
#include "kernel.cuh"

namespace m3ad {
namespace {

struct NearestRow {
    static constexpr char kNAME[] = "NearestRow", kVERSION[] = "1";
    // x, bank -> distance, idx; always fp32
    static constexpr int32_t kINPUTS = 2, kOUTPUTS = 2;

    static std::vector<Attribute> attributes() { return {}; }
    static void check() {}
    static bool inputFits(int32_t i, nv::DataType const* types) { return types[i] == nv::DataType::kFLOAT; }
    static nv::DataType outputType(int32_t i, nv::DataType const*) {
        return i == 0 ? nv::DataType::kFLOAT : nv::DataType::kINT32;
    }
    static void outputShapes(nv::DimsExprs const* in, nv::DimsExprs* outputs, nv::IExprBuilder&) {
        setDims(outputs[0], {in[0].d[0]});
        setDims(outputs[1], {in[0].d[0]});
    }
    static void checkShapes(nv::Dims const* in) {
        requireRank("x", in[0], 2);
        requireRank("bank", in[1], 2);
        require(in[0].d[1] < 0 || in[1].d[1] < 0 || in[0].d[1] == in[1].d[1],
                text("bank: expected width D = ", in[0].d[1], ", got ", in[1].d[1]));
        require(in[1].d[0] != 0, text("bank: expected at least 1 row, got 0"));
    }
    static size_t workspaceBytes(nv::Dims const* in) {
        return workspaceNearestRow(
            blockMinima(static_cast<int32_t>(in[0].d[0]), static_cast<int32_t>(in[1].d[0])));
    }
    static cudaError_t run(nv::PluginTensorDesc const* desc, void const* const* in, void* const* out,
                           void* workspace, cudaStream_t stream) {
        return launchNearestRow(static_cast<float*>(out[0]), static_cast<int32_t*>(out[1]),
                                static_cast<float const*>(in[0]), static_cast<float const*>(in[1]),
                                static_cast<int32_t>(desc[0].dims.d[0]),
                                static_cast<int32_t>(desc[0].dims.d[1]),
                                static_cast<int32_t>(desc[1].dims.d[0]), workspace, stream);
    }
};

Registered<NearestRow> const gRegistered;

} // namespace
} // namespace m3ad
