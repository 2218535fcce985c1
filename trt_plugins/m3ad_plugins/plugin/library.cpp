//! libm3ad_plugins.so: exports getCreators and setLoggerFinder and nothing else, and needs no symbol of
//! TensorRT. One binary thus loads into every registry from 10.3 to 11.4 (loadLibrary, trtexec
//! --dynamicPlugins, Python). It must not register itself: the registry's own layout changed from 10 to 11,
//! the interfaces used here did not.

#include "plugin_base.hpp"

#include <cstdio>

void m3ad::logError(std::string const& text) noexcept {
    std::fprintf(stderr, "%s\n", text.c_str());
}

std::vector<nvinfer1::IPluginCreatorInterface*>& m3ad::creators() {
    static std::vector<nvinfer1::IPluginCreatorInterface*> all;
    return all;
}

// loadLibrary wants this export. The logger behind it stays untouched: ILogger and ILoggerFinder gained a
// base class in TensorRT 11, so a call compiled for one major lands in another method of the other (tried: a
// crash in 10.16).
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const*
getCreators(int32_t& nbCreators) {
    auto const& creators = m3ad::creators();
    nbCreators = static_cast<int32_t>(creators.size());
    return creators.data();
}
