//! KnnGroup as TensorRT sees it: attributes, shapes, types, and the call of the launcher.

#include "../plugin/plugin_base.hpp"
#include "kernel.cuh"

namespace m3ad {
namespace {

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
        return workspaceKnnGroup(static_cast<int32_t>(in[0].d[0]));
    }
    cudaError_t run(nv::PluginTensorDesc const* desc, void const* const* in, void* const* out,
                    void* workspace, cudaStream_t stream) const {
        return launchKnnGroup(static_cast<float*>(out[0]), static_cast<int32_t*>(out[1]),
                              static_cast<float const*>(in[0]), static_cast<int32_t const*>(in[1]),
                              static_cast<int32_t>(desc[0].dims.d[0]),
                              static_cast<int32_t>(desc[1].dims.d[0]), groupSize, workspace, stream);
    }
};

Registered<KnnGroup> const gRegistered;

} // namespace
} // namespace m3ad
