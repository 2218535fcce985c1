//! Calls the plugins as TensorRT's runtime does, with device memory and a stream, but without TensorRT: only
//! its headers are needed. usage: enqueue_host LIBRARY JOB TENSORS OUT REPEATS. JOB says in words what to
//! make, TENSORS holds the inputs' bytes one after the other, OUT gets the outputs'. Prints one JSON object
//! (enqueue.py wrote the job). A plugin is made, serialized and made again; its enqueue runs once on a stream
//! and REPEATS times in a CUDA graph, whose outputs must be those of the first.

#include "NvInferRuntime.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <fstream>
#include <list>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

[[noreturn]] void fail(std::string const& what) {
    std::fprintf(stderr, "error: %s\n", what.c_str());
    std::exit(1);
}

void require(bool holds, std::string const& what) {
    if (!holds) {
        fail(what);
    }
}

void cuda(cudaError_t status, char const* what) {
    require(status == cudaSuccess, std::string(what) + ": " + cudaGetErrorString(status));
}

struct Tensor {
    PluginTensorDesc desc{};
    size_t bytes = 0;
    void* device = nullptr;
};

//! As in `float 2 600 3`.
Tensor readTensor(std::istream& in) {
    Tensor tensor;
    std::string type;
    in >> type >> tensor.desc.dims.nbDims;
    tensor.desc.type = type == "float32"   ? DataType::kFLOAT
                       : type == "float16" ? DataType::kHALF
                                           : DataType::kINT32;
    tensor.desc.format = TensorFormat::kLINEAR;
    tensor.desc.scale = -1.0F;
    tensor.bytes = type == "float16" ? 2 : 4;
    for (int32_t i = 0; i < tensor.desc.dims.nbDims; ++i) {
        in >> tensor.desc.dims.d[i];
        tensor.bytes *= static_cast<size_t>(tensor.desc.dims.d[i]);
    }
    require(static_cast<bool>(in), "the job ends within a tensor");
    cuda(cudaMalloc(&tensor.device, tensor.bytes + 16), "cudaMalloc");
    return tensor;
}

//! What a job asks for.
struct Job {
    std::string op, version;
    std::vector<PluginField> fields;
    std::vector<Tensor> inputs, outputs;
    std::list<std::string> texts; //!< what the fields point to
    std::list<int32_t> integers;
    std::list<float> floats;
};

Job readJob(char const* path) {
    std::ifstream in(path);
    Job job;
    std::string word, kind, name;
    while (in >> word) {
        if (word == "plugin") {
            in >> job.op >> job.version;
        } else if (word == "field") {
            in >> kind >> job.texts.emplace_back();
            char const* const called = job.texts.back().c_str();
            if (kind == "int") {
                in >> job.integers.emplace_back();
                job.fields.emplace_back(called, &job.integers.back(), PluginFieldType::kINT32, 1);
            } else if (kind == "float") {
                in >> job.floats.emplace_back();
                job.fields.emplace_back(called, &job.floats.back(), PluginFieldType::kFLOAT32, 1);
            } else {
                in >> job.texts.emplace_back();
                std::string const& text = job.texts.back();
                job.fields.emplace_back(called, text.data(), PluginFieldType::kCHAR, text.size());
            }
        } else {
            (word == "input" ? job.inputs : job.outputs).push_back(readTensor(in));
        }
    }
    require(!job.op.empty(), "the job names no plugin");
    return job;
}

IPluginCreatorV3One* creatorOf(char const* path, Job const& job) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    require(library != nullptr, library ? "" : dlerror());
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    auto const get = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    require(get != nullptr, std::string(path) + " exports no getCreators");
    int32_t count = 0;
    IPluginCreatorInterface* const* all = get(count);
    for (int32_t i = 0; i < count; ++i) {
        auto* creator = static_cast<IPluginCreatorV3One*>(all[i]);
        if (job.op == creator->getPluginName() && job.version == creator->getPluginVersion()) {
            return creator;
        }
    }
    fail("the library has no plugin " + job.op + " " + job.version);
}

template <typename Part> Part* part(IPluginV3* plugin, PluginCapabilityType type) {
    auto* found = static_cast<Part*>(plugin->getCapabilityInterface(type));
    require(found != nullptr, "the plugin lacks a capability");
    return found;
}

} // namespace

int main(int argc, char** argv) {
    require(argc == 6, "usage: enqueue_host LIBRARY JOB TENSORS OUT REPEATS");
    Job job = readJob(argv[2]);
    IPluginCreatorV3One* creator = creatorOf(argv[1], job);
    PluginFieldCollection const given{static_cast<int32_t>(job.fields.size()), job.fields.data()};
    IPluginV3* made = creator->createPlugin("made", &given, TensorRTPhase::kBUILD);
    require(made != nullptr, "createPlugin refused the attributes");
    IPluginV3* plugin = creator->createPlugin(
        "loaded", part<IPluginV3OneRuntime>(made, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize(),
        TensorRTPhase::kRUNTIME);
    require(plugin != nullptr, "createPlugin refused the serialized attributes");

    auto* build = part<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    auto const numInputs = static_cast<int32_t>(job.inputs.size()),
               numOutputs = static_cast<int32_t>(job.outputs.size());
    require(build->getNbOutputs() == numOutputs, "the plugin has another number of outputs");
    std::vector<PluginTensorDesc> inputDescs, outputDescs;
    std::vector<DynamicPluginTensorDesc> dynamic;
    std::vector<void const*> inputs;
    std::vector<void*> outputs;
    for (auto const* tensors : {&job.inputs, &job.outputs}) {
        bool const isInput = tensors == &job.inputs;
        for (Tensor const& tensor : *tensors) {
            (isInput ? inputDescs : outputDescs).push_back(tensor.desc);
            dynamic.push_back({tensor.desc, tensor.desc.dims, tensor.desc.dims, tensor.desc.dims});
            isInput ? inputs.push_back(tensor.device) : outputs.push_back(tensor.device);
        }
    }
    for (int32_t i = 0; i < numInputs + numOutputs; ++i) {
        require(build->supportsFormatCombination(i, dynamic.data(), numInputs, numOutputs),
                "the plugin refuses the type of tensor " + std::to_string(i));
    }
    require(build->configurePlugin(dynamic.data(), numInputs, dynamic.data() + numInputs, numOutputs) == 0,
            "configurePlugin refused");
    size_t const workspaceBytes =
        build->getWorkspaceSize(dynamic.data(), numInputs, dynamic.data() + numInputs, numOutputs);
    void* workspace = nullptr;
    cuda(cudaMalloc(&workspace, workspaceBytes + 16), "cudaMalloc");

    std::ifstream tensors(argv[3], std::ios::binary);
    std::vector<char> host;
    for (Tensor const& tensor : job.inputs) {
        host.resize(tensor.bytes);
        require(static_cast<bool>(tensors.read(host.data(), static_cast<std::streamsize>(tensor.bytes))),
                "the file of the inputs is short");
        cuda(cudaMemcpy(tensor.device, host.data(), tensor.bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    }

    IPluginV3* attached =
        part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
    require(attached != nullptr, "attachToContext refused");
    auto* runtime = part<IPluginV3OneRuntime>(attached, PluginCapabilityType::kRUNTIME);
    require(runtime->onShapeChange(inputDescs.data(), numInputs, outputDescs.data(), numOutputs) == 0,
            "onShapeChange refused");
    cudaStream_t stream = nullptr;
    cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    auto const enqueue = [&] {
        require(runtime->enqueue(inputDescs.data(), outputDescs.data(), inputs.data(), outputs.data(),
                                 workspace, stream) == 0,
                "enqueue failed");
    };
    auto const poison = [&] {
        cuda(cudaMemsetAsync(workspace, 0xCD, workspaceBytes, stream), "cudaMemset");
        for (Tensor const& tensor : job.outputs) {
            cuda(cudaMemsetAsync(tensor.device, 0xCD, tensor.bytes, stream), "cudaMemset");
        }
    };
    auto const read = [&] {
        cuda(cudaStreamSynchronize(stream), "enqueue");
        std::vector<char> all;
        for (Tensor const& tensor : job.outputs) {
            host.resize(tensor.bytes);
            cuda(cudaMemcpy(host.data(), tensor.device, tensor.bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
            all.insert(all.end(), host.begin(), host.end());
        }
        return all;
    };
    poison();
    enqueue();
    std::vector<char> const first = read();

    cudaGraph_t graph = nullptr;
    cudaGraphExec_t ready = nullptr;
    cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    enqueue();
    cuda(cudaStreamEndCapture(stream, &graph), "enqueue cannot be captured");
    cuda(cudaGraphInstantiate(&ready, graph, 0), "cudaGraphInstantiate");
    poison();
    cuda(cudaGraphLaunch(ready, stream), "cudaGraphLaunch");
    require(read() == first, "the CUDA graph gives other outputs than the first run");
    int32_t const repeats = std::atoi(argv[5]);
    auto const started = std::chrono::steady_clock::now();
    for (int32_t i = 0; i < repeats; ++i) {
        cuda(cudaGraphLaunch(ready, stream), "cudaGraphLaunch");
    }
    cuda(cudaStreamSynchronize(stream), "cudaGraphLaunch");
    std::chrono::duration<double, std::milli> const taken = std::chrono::steady_clock::now() - started;
    require(read() == first, "the outputs change from run to run");

    std::ofstream out(argv[4], std::ios::binary);
    out.write(first.data(), static_cast<std::streamsize>(first.size()));
    out.close();
    require(static_cast<bool>(out), "the outputs cannot be written");
    std::printf("{\"workspace_bytes\": %zu, \"graph_ms\": %.4f}\n", workspaceBytes,
                repeats > 0 ? taken.count() / repeats : 0.0);
    return 0;
}
