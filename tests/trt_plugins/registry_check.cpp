//! Loads the plugins into a real TensorRT registry, without a GPU, and prints what it answers: one fact a
//! line. usage: registry_check <libnvinfer_lean.so.N> core|shim <library> Built against the headers of that
//! TensorRT's major.

#include "NvInferRuntime.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <list>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

struct Log : ILogger {
    void log(Severity severity, char const* text) noexcept override {
        if (severity <= Severity::kERROR) {
            std::printf("error %s\n", text);
        }
    }
} gLog;

//! Dimensions as TensorRT's builder would hand them over: constants, N = -1, and R, a size tensor.
constexpr int64_t kN = -1, kR = -2;

struct Value : apiv::VDimensionExpr {
    explicit Value(int64_t v) : value(v) {}
    bool isConstant() const override { return value >= 0; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return value == kR; }
    int64_t value;
};

struct Expr : IDimensionExpr {
    explicit Expr(int64_t value) : held(value) { mImpl = &held; }
    Value held;
};

struct Builder : IExprBuilder, apiv::VExprBuilder {
    Builder() { IExprBuilder::mImpl = this; }
    IDimensionExpr const* constant(int64_t value) override { return &made.emplace_back(value); }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&,
                                    IDimensionExpr const&) override {
        return nullptr;
    }
    IDimensionExpr const* declareSizeTensor(int32_t output, IDimensionExpr const& opt,
                                            IDimensionExpr const& upper) override {
        std::printf("size_tensor %d opt %ld upper %ld\n", output, static_cast<long>(opt.getConstantValue()),
                    static_cast<long>(upper.getConstantValue()));
        return &made.emplace_back(kR);
    }
    std::list<Expr> made;
};

char const* typeName(DataType type) {
    return type == DataType::kFLOAT   ? "fp32"
           : type == DataType::kHALF  ? "fp16"
           : type == DataType::kINT32 ? "int32"
                                      : "?";
}

std::string fieldsOf(PluginFieldCollection const* fields) {
    std::string all;
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        PluginField const& field = fields->fields[i];
        all += std::string(i ? " " : "") + field.name + "=";
        if (field.type == PluginFieldType::kINT32) {
            all += std::to_string(*static_cast<int32_t const*>(field.data));
        } else if (field.type == PluginFieldType::kFLOAT32) {
            all += std::to_string(*static_cast<float const*>(field.data));
        } else {
            all += std::string(static_cast<char const*>(field.data), field.length);
        }
    }
    return all;
}

struct Case {
    char const* op;
    std::vector<PluginField> fields;
    std::vector<std::vector<int64_t>> inputs;
    std::vector<DataType> types;
};

char const* versionOf(char const* op) {
    bool const isSecond =
        std::strcmp(op, "TokenInterpolate") == 0 || std::strcmp(op, "FarthestPointSample") == 0;
    return isSecond ? "2" : "1";
}

template <typename T> T* part(IPluginV3* plugin, PluginCapabilityType type) {
    return static_cast<T*>(plugin->getCapabilityInterface(type));
}

void describe(Case const& c, IPluginV3* plugin) {
    auto* core = part<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    auto* build = part<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    auto* runtime = part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    std::printf("plugin %s %s %s fields %s\n", core->getPluginName(), core->getPluginVersion(),
                core->getPluginNamespace(), fieldsOf(runtime->getFieldsToSerialize()).c_str());
    int32_t const inputs = c.inputs.size(), outputs = build->getNbOutputs();
    Builder builder;
    std::vector<DimsExprs> in(inputs), out(outputs);
    std::vector<DynamicPluginTensorDesc> all(inputs + outputs);
    for (int32_t i = 0; i < inputs; ++i) {
        in[i].nbDims = all[i].min.nbDims = all[i].max.nbDims = c.inputs[i].size();
        for (int32_t d = 0; d < in[i].nbDims; ++d) {
            in[i].d[d] = builder.constant(c.inputs[i][d]);
            bool const isDynamic = c.inputs[i][d] == kN || c.inputs[i][d] == kR;
            all[i].min.d[d] = isDynamic ? 1024 : c.inputs[i][d];
            all[i].max.d[d] = isDynamic ? 50176 : c.inputs[i][d];
        }
        all[i].desc.type = c.types[i];
        all[i].desc.format = TensorFormat::kLINEAR;
    }
    std::vector<DataType> types(outputs);
    build->getOutputDataTypes(types.data(), outputs, c.types.data(), inputs);
    std::printf("shapes %d\n",
                build->getOutputShapes(in.data(), inputs, nullptr, 0, out.data(), outputs, builder));
    for (int32_t i = 0; i < outputs; ++i) {
        std::printf("output %s [", typeName(types[i]));
        for (int32_t d = 0; d < out[i].nbDims; ++d) {
            int64_t const size = out[i].d[d]->getConstantValue();
            std::printf("%s%s", d ? ", " : "",
                        size == kN   ? "N"
                        : size == kR ? "R"
                                     : std::to_string(size).c_str());
        }
        std::printf("]\n");
        all[inputs + i].desc.type = types[i];
        all[inputs + i].desc.format = TensorFormat::kLINEAR;
    }
    bool takes = true;
    for (int32_t pos = 0; pos < inputs + outputs; ++pos) {
        takes = takes && build->supportsFormatCombination(pos, all.data(), inputs, outputs);
    }
    all[0].desc.type = DataType::kINT8;
    bool const takesInt8 = build->supportsFormatCombination(0, all.data(), inputs, outputs);
    std::printf("formats %d int8 %d\n", takes, takesInt8);
    std::printf("configure %d\n", build->configurePlugin(all.data(), inputs, all.data() + inputs, outputs));
    std::printf("workspace %d\n",
                build->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs) > 0);
    std::vector<PluginTensorDesc> few(inputs); // a frame with 8 points
    for (int32_t i = 0; i < inputs; ++i) {
        few[i].dims = all[i].min;
        few[i].dims.d[0] = c.inputs[i][0] == kN ? 8 : c.inputs[i][0];
    }
    std::printf("few_points %d\n", runtime->onShapeChange(few.data(), inputs, nullptr, 0));
}

} // namespace

int main(int argc, char** argv) {
    if (argc != 4) {
        return 2;
    }
    void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 3;
    }
    auto const getRegistry = reinterpret_cast<IPluginRegistry* (*)()>(dlsym(library, "getPluginRegistry"));
    auto const createRuntime =
        reinterpret_cast<void* (*)(void*, int32_t)>(dlsym(library, "createInferRuntime_INTERNAL"));
    IPluginRegistry* registry = getRegistry();
    createRuntime(&gLog,
                  NV_TENSORRT_VERSION); // sets the logger; the runtime itself wants a GPU and may be null
    bool const viaCore = std::strcmp(argv[2], "core") == 0;
    bool const loaded =
        viaCore ? registry->loadLibrary(argv[3]) != nullptr : dlopen(argv[3], RTLD_NOW) != nullptr;
    std::printf("loaded %d\n", loaded);
    if (!viaCore) {
        std::printf("shim_again %d\n", dlopen(argv[3], RTLD_NOW) != nullptr);
    }

    int32_t const samples = 1024, size = 32, image = 224, cells = 56, coarse = 55;
    int64_t const samples64 = 1024;
    float const norm = 0.001F, gamma = 0.5F;
    PluginField const linear{"kernel", "linear", PluginFieldType::kCHAR, 6},
        rbf{"kernel", "rbf", PluginFieldType::kCHAR, 3};
    PluginField const width{"gamma", &gamma, PluginFieldType::kFLOAT32, 1};
    DataType const f = DataType::kFLOAT, i = DataType::kINT32, h = DataType::kHALF;
    std::vector<std::vector<int64_t>> const tokens{{kN, 3}, {kN}, {1024, 3}, {1024, 1152}, {kR}};
    std::vector<Case> const cases{
        {"FarthestPointSample",
         {{"num_samples", &samples, PluginFieldType::kINT32, 1},
          {"min_norm_sq", &norm, PluginFieldType::kFLOAT32, 1}},
         {{kN, 3}, {kN}},
         {f, i}},
        {"FarthestPointSample",
         {{"num_samples", &samples64, PluginFieldType::kINT64, 1}},
         {{kN, 3}, {kN}},
         {f, i}},
        {"KnnGroup", {{"group_size", &size, PluginFieldType::kINT32, 1}}, {{kN, 3}, {1024}}, {f, i}},
        {"TokenInterpolate", {{"image_size", &image, PluginFieldType::kINT32, 1}}, tokens, {f, i, f, f, i}},
        {"TokenInterpolate",
         {{"image_size", &image, PluginFieldType::kINT32, 1},
          {"output_size", &cells, PluginFieldType::kINT32, 1}},
         tokens,
         {f, i, f, h, i}},
        {"OneClassSvm", {linear, width}, {{kN, 7}, {90, 7}, {90}, {1}}, {f, f, f, f}},
        {"OneClassSvm", {rbf, width}, {{kN, 7}, {90, 7}, {90}, {1}}, {f, f, f, f}},
        {"NearestRow", {}, {{kN, 7}, {90, 7}}, {f, f}},
    };
    for (Case const& c : cases) {
        auto* creator =
            static_cast<IPluginCreatorV3One*>(registry->getCreator(c.op, versionOf(c.op), "m3ad"));
        std::printf("creator %s %d\n", c.op, creator != nullptr);
        if (!creator) {
            continue;
        }
        PluginFieldCollection const given{static_cast<int32_t>(c.fields.size()), c.fields.data()};
        IPluginV3* plugin = creator->createPlugin("p", &given, TensorRTPhase::kBUILD);
        IPluginV3* copy = plugin->clone();
        auto* runtime = part<IPluginV3OneRuntime>(copy, PluginCapabilityType::kRUNTIME);
        IPluginV3* again =
            creator->createPlugin("p", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
        delete plugin;
        delete copy;
        describe(c, again);
        IPluginV3* attached =
            part<IPluginV3OneRuntime>(again, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
        std::printf("attached %d\n", attached != nullptr && attached != again);
        delete attached;
        delete again;
    }

    int32_t const none = 0, many = 5000;
    float const below = -1.0F;
    PluginField const poly{"kernel", "poly", PluginFieldType::kCHAR, 4};
    PluginField const grid{"image_size", &image, PluginFieldType::kINT32, 1};
    std::vector<std::pair<char const*, std::vector<PluginField>>> const wrong{
        {"FarthestPointSample", {{"num_samples", &none, PluginFieldType::kINT32, 1}}},
        {"FarthestPointSample", {{"num_samples", &below, PluginFieldType::kFLOAT32, 1}}},
        {"KnnGroup", {{"group_size", &many, PluginFieldType::kINT32, 1}}},
        {"TokenInterpolate", {{"image_size", &none, PluginFieldType::kINT32, 1}}},
        {"TokenInterpolate", {grid, {"output_size", &coarse, PluginFieldType::kINT32, 1}}},
        {"OneClassSvm", {poly}},
    };
    for (auto const& [op, fields] : wrong) {
        auto* creator = static_cast<IPluginCreatorV3One*>(registry->getCreator(op, versionOf(op), "m3ad"));
        PluginFieldCollection const given{static_cast<int32_t>(fields.size()), fields.data()};
        std::printf("refused %s %d\n", op,
                    creator && creator->createPlugin("p", &given, TensorRTPhase::kBUILD) == nullptr);
    }
    return 0;
}
