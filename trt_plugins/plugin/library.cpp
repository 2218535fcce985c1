//! libm3ad_plugins.so: exports getCreators and setLoggerFinder and nothing else, and needs no symbol of
//! TensorRT. One binary thus loads into every registry from 10.3 to 11.4 (loadLibrary, trtexec
//! --dynamicPlugins, Python). It must not register itself: the registry's own layout changed from 10 to 11,
//! the interfaces used here did not.

#include "ops_plugin.hpp"

#include <array>
#include <cstdio>

void m3ad::logError(std::string const& text) noexcept {
    std::fprintf(stderr, "%s\n", text.c_str());
}

// loadLibrary wants this export. The logger behind it stays untouched: ILogger and ILoggerFinder gained a
// base class in TensorRT 11, so a call compiled for one major lands in another method of the other (tried: a
// crash in 10.16).
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const*
getCreators(int32_t& nbCreators) {
    static m3ad::Creator<m3ad::FarthestPointSample> farthestPointSample;
    static m3ad::Creator<m3ad::KnnGroup> knnGroup;
    static m3ad::Creator<m3ad::TokenInterpolate> tokenInterpolate;
    static m3ad::Creator<m3ad::OneClassSvm> oneClassSvm;
    static std::array<nvinfer1::IPluginCreatorInterface*, 4> creators{&farthestPointSample, &knnGroup,
                                                                      &tokenInterpolate, &oneClassSvm};
    nbCreators = static_cast<int32_t>(creators.size());
    return creators.data();
}
