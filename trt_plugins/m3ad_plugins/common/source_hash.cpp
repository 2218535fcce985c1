//! The hash of the library's sources when it was built: native.py refuses a library of other sources.

extern "C" __attribute__((visibility("default"))) char const* m3ad_source_hash() {
    return M3AD_SOURCE_HASH;
}
