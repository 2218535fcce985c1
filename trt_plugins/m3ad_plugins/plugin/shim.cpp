//! libm3ad_plugins_trt<major>.so: for hosts that only dlopen a plugin library (Triton, LD_PRELOAD,
//! DeepStream). When it is loaded it asks the registry, whose layout differs between majors, to load
//! libm3ad_plugins.so from its own folder. TensorRT is looked up by name, not linked: hosts load it out of
//! sight of later libraries (RTLD_LOCAL).

#include "NvInferRuntime.h"

#include <cstdio>
#include <dlfcn.h>
#include <string>

#define M3AD_TEXT_OF(value) #value
#define M3AD_TEXT(value) M3AD_TEXT_OF(value)

namespace {

char const* const kTENSORRT = "libnvinfer.so." M3AD_TEXT(NV_TENSORRT_MAJOR);
char const* const kLEAN = "libnvinfer_lean.so." M3AD_TEXT(NV_TENSORRT_MAJOR);
char const* const kDISPATCH = "libnvinfer_dispatch.so." M3AD_TEXT(NV_TENSORRT_MAJOR);

//! The registry of the runtime this process has, or else of the one it can find.
nvinfer1::IPluginRegistry* registry() {
    void* runtime = nullptr;
    for (char const* name : {kTENSORRT, kLEAN, kDISPATCH}) {
        runtime = runtime ? runtime : dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    }
    runtime = runtime ? runtime : dlopen(kTENSORRT, RTLD_NOW);
    if (runtime == nullptr) {
        std::fprintf(stderr, "m3ad: %s is neither loaded nor found; is this the shim of another TensorRT?\n",
                     kTENSORRT);
        return nullptr;
    }
    auto const get = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(dlsym(runtime, "getPluginRegistry"));
    return get ? get() : nullptr;
}

struct Loader {
    Loader() {
        static int here;
        Dl_info self;
        dladdr(&here, &self);
        std::string const own(self.dli_fname);
        std::string const core = own.substr(0, own.rfind('/') + 1) + "libm3ad_plugins.so";
        nvinfer1::IPluginRegistry* found = registry();
        // An earlier loadLibrary may have been first: loading twice would fail, and unload what is there.
        if (found && found->getCreator("FarthestPointSample", "2", "m3ad") == nullptr &&
            found->loadLibrary(core.c_str()) == nullptr) {
            std::fprintf(stderr, "m3ad: TensorRT cannot load %s; it must lie beside %s\n", core.c_str(),
                         own.c_str());
        }
    }
};

Loader const gLoader;

} // namespace
