//! What the ops' plugins share: the V3 methods that never change, attributes as a table, checks of shapes,
//! errors as text in the log, and the list that the library hands to TensorRT.
#pragma once

#include "NvInferRuntime.h"

#include <cstdint>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace m3ad {

namespace nv = nvinfer1;

constexpr char kNAMESPACE[] = "m3ad";

//! Writes a line to stderr (library.cpp says why not to TensorRT's log).
void logError(std::string const& text) noexcept;

//! Joins its arguments to one text.
template <typename... Parts> std::string text(Parts const&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

//! Runs a method's body; what it throws is logged under the op's name and answered by `failed`.
template <typename Result, typename Body>
Result guarded(char const* op, Result failed, Body const& body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        logError(text("m3ad::", op, ": ", error.what()));
        return failed;
    }
}

inline void require(bool holds, std::string const& otherwise) {
    if (!holds) {
        throw std::invalid_argument(otherwise);
    }
}

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

//! [N] of points [N, 3], or unknown yet.
inline void requireOnePerPoint(char const* name, nv::Dims const& dims, nv::Dims const& points) {
    requireRank(name, dims, 1);
    require(points.d[0] < 0 || dims.d[0] < 0 || points.d[0] == dims.d[0],
            text(name, ": expected one per point, N = ", points.d[0], ", got ", dims.d[0]));
}

//! A count known and below what an attribute asks for.
inline void requireAtLeast(char const* attribute, int32_t wanted, int64_t points) {
    require(points < 0 || points >= wanted, text(attribute, " is ", wanted, " but there are only N = ",
                                                 points, " points; remove less background"));
}

//! One attribute of an op: its name in ONNX and where its value lives. Strings are kept as char vectors.
struct Attribute {
    char const* name;
    nv::PluginFieldType type;
    void* value; //!< int32_t*, float* or std::string*
};

//! Reads a field into an attribute; ONNX parsers hand over int attributes as 32 or 64 bits.
inline void readField(nv::PluginField const& field, Attribute const& attribute) {
    if (attribute.type == nv::PluginFieldType::kCHAR) {
        require(field.type == nv::PluginFieldType::kCHAR,
                text("attribute ", field.name, ": expected a string"));
        std::string value(static_cast<char const*>(field.data), field.length);
        value.resize(value.find('\0') == std::string::npos ? value.size() : value.find('\0'));
        *static_cast<std::string*>(attribute.value) = value;
        return;
    }
    require(field.length == 1, text("attribute ", field.name, ": expected one value, got ", field.length));
    if (attribute.type == nv::PluginFieldType::kFLOAT32) {
        require(field.type == nv::PluginFieldType::kFLOAT32,
                text("attribute ", field.name, ": expected a float"));
        *static_cast<float*>(attribute.value) = *static_cast<float const*>(field.data);
    } else if (field.type == nv::PluginFieldType::kINT32) {
        *static_cast<int32_t*>(attribute.value) = *static_cast<int32_t const*>(field.data);
    } else {
        require(field.type == nv::PluginFieldType::kINT64,
                text("attribute ", field.name, ": expected an integer"));
        *static_cast<int32_t*>(attribute.value) =
            static_cast<int32_t>(*static_cast<int64_t const*>(field.data));
    }
}

//! An op's plugin. `Op` gives kNAME, kINPUTS, kOUTPUTS, attributes(), check(), outputType(), outputShapes(),
//! checkShapes(), workspaceBytes() and run(); inputs and outputs are always linear.
template <typename Op>
class Plugin final : public nv::IPluginV3,
                     public nv::IPluginV3OneCore,
                     public nv::IPluginV3OneBuild,
                     public nv::IPluginV3OneRuntime {
public:
    explicit Plugin(Op const& op) : mOp(op) {}

    // IPluginV3
    nv::IPluginCapability* getCapabilityInterface(nv::PluginCapabilityType type) noexcept override {
        switch (type) {
        case nv::PluginCapabilityType::kCORE:
            return static_cast<nv::IPluginV3OneCore*>(this);
        case nv::PluginCapabilityType::kBUILD:
            return static_cast<nv::IPluginV3OneBuild*>(this);
        case nv::PluginCapabilityType::kRUNTIME:
            return static_cast<nv::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nv::IPluginV3* clone() noexcept override {
        return guarded<nv::IPluginV3*>(Op::kNAME, nullptr, [&] { return new Plugin(mOp); });
    }

    // IPluginV3OneCore
    nv::AsciiChar const* getPluginName() const noexcept override { return Op::kNAME; }
    nv::AsciiChar const* getPluginVersion() const noexcept override { return Op::kVERSION; }
    nv::AsciiChar const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

    // IPluginV3OneBuild
    int32_t configurePlugin(nv::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                            nv::DynamicPluginTensorDesc const*, int32_t) noexcept override {
        return guarded(Op::kNAME, -1, [&] {
            require(nbInputs == Op::kINPUTS, text("expected ", Op::kINPUTS, " inputs, got ", nbInputs));
            for (auto bound : {&nv::DynamicPluginTensorDesc::min, &nv::DynamicPluginTensorDesc::max}) {
                std::vector<nv::Dims> dims;
                for (int32_t i = 0; i < nbInputs; ++i) {
                    dims.push_back(in[i].*bound);
                }
                mOp.checkShapes(dims.data());
            }
            return 0;
        });
    }

    int32_t getOutputDataTypes(nv::DataType* outputTypes, int32_t nbOutputs, nv::DataType const* inputTypes,
                               int32_t) const noexcept override {
        for (int32_t i = 0; i < nbOutputs; ++i) {
            outputTypes[i] = Op::outputType(i, inputTypes);
        }
        return 0;
    }

    int32_t getOutputShapes(nv::DimsExprs const* inputs, int32_t nbInputs, nv::DimsExprs const*, int32_t,
                            nv::DimsExprs* outputs, int32_t, nv::IExprBuilder& build) noexcept override {
        return guarded(Op::kNAME, -1, [&] {
            require(nbInputs == Op::kINPUTS, text("expected ", Op::kINPUTS, " inputs, got ", nbInputs));
            mOp.outputShapes(inputs, outputs, build);
            return 0;
        });
    }

    bool supportsFormatCombination(int32_t pos, nv::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                   int32_t) noexcept override {
        std::vector<nv::DataType> types;
        for (int32_t i = 0; i <= pos; ++i) {
            types.push_back(inOut[i].desc.type);
        }
        bool const fits = pos < nbInputs ? Op::inputFits(pos, types.data())
                                         : types[pos] == Op::outputType(pos - nbInputs, types.data());
        return fits && inOut[pos].desc.format == nv::TensorFormat::kLINEAR;
    }

    int32_t getNbOutputs() const noexcept override { return Op::kOUTPUTS; }

    size_t getWorkspaceSize(nv::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
                            nv::DynamicPluginTensorDesc const*, int32_t) const noexcept override {
        std::vector<nv::Dims> largest;
        for (int32_t i = 0; i < nbInputs; ++i) {
            largest.push_back(inputs[i].max);
        }
        return mOp.workspaceBytes(largest.data());
    }

    // IPluginV3OneRuntime
    int32_t onShapeChange(nv::PluginTensorDesc const* in, int32_t nbInputs, nv::PluginTensorDesc const*,
                          int32_t) noexcept override {
        return guarded(Op::kNAME, -1, [&] {
            std::vector<nv::Dims> dims;
            for (int32_t i = 0; i < nbInputs; ++i) {
                dims.push_back(in[i].dims);
            }
            mOp.checkShapes(dims.data());
            return 0;
        });
    }

    int32_t enqueue(nv::PluginTensorDesc const* inputDesc, nv::PluginTensorDesc const*,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override {
        return guarded(Op::kNAME, -1, [&] {
            cudaError_t const status = mOp.run(inputDesc, inputs, outputs, workspace, stream);
            require(status == cudaSuccess, text("kernel launch failed: ", cudaGetErrorString(status)));
            return 0;
        });
    }

    nv::IPluginV3* attachToContext(nv::IPluginResourceContext*) noexcept override { return clone(); }

    nv::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        mFields.clear();
        for (Attribute const& attribute : mOp.attributes()) {
            bool const isText = attribute.type == nv::PluginFieldType::kCHAR;
            auto* string = static_cast<std::string*>(attribute.value);
            mFields.emplace_back(attribute.name, isText ? string->data() : attribute.value, attribute.type,
                                 isText ? static_cast<int32_t>(string->size()) : 1);
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        return &mCollection;
    }

private:
    Op mOp;
    std::vector<nv::PluginField> mFields;
    nv::PluginFieldCollection mCollection{};
};

//! Creates an op's plugin from ONNX attributes or serialized fields alike; wrong ones give nullptr and a log
//! line.
template <typename Op> class Creator final : public nv::IPluginCreatorV3One {
public:
    Creator() {
        Op op;
        for (Attribute const& attribute : op.attributes()) {
            mFields.emplace_back(attribute.name, nullptr, attribute.type, 1);
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    }

    nv::IPluginV3* createPlugin(nv::AsciiChar const*, nv::PluginFieldCollection const* fields,
                                nv::TensorRTPhase) noexcept override {
        return guarded<nv::IPluginV3*>(Op::kNAME, nullptr, [&] {
            Op op;
            std::vector<Attribute> const attributes = op.attributes();
            for (int32_t i = 0; i < fields->nbFields; ++i) {
                for (Attribute const& attribute : attributes) {
                    if (std::string(attribute.name) == fields->fields[i].name) {
                        readField(fields->fields[i], attribute);
                    }
                }
            }
            op.check();
            return new Plugin<Op>(op);
        });
    }

    nv::PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }
    nv::AsciiChar const* getPluginName() const noexcept override { return Op::kNAME; }
    nv::AsciiChar const* getPluginVersion() const noexcept override { return Op::kVERSION; }
    nv::AsciiChar const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

private:
    std::vector<nv::PluginField> mFields;
    nv::PluginFieldCollection mCollection{};
};

//! The creators of the library (library.cpp).
std::vector<nv::IPluginCreatorInterface*>& creators();

//! A namespace-scope object of this type puts an op's creator into the list when the library is loaded.
template <typename Op> struct Registered {
    Registered() {
        static Creator<Op> creator;
        creators().push_back(&creator);
    }
};

} // namespace m3ad
