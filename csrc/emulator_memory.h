// The emulator's global memory: host memory, of which tracked ranges are checked and counted byte by byte.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "emulator_fibers.h"

namespace nibble {
namespace __attribute__((visibility("hidden"))) emulator {

struct Range {
    uintptr_t start, end;
    int64_t loaded = 0, stored = 0;
    std::vector<uint8_t> was_loaded, was_stored;  // one flag a byte
};

inline std::vector<Range> ranges;

inline void track(const void* start, int64_t bytes) {
    Range range = {};
    range.start = reinterpret_cast<uintptr_t>(start);
    range.end = range.start + bytes;
    range.was_loaded.resize(bytes);
    range.was_stored.resize(bytes);
    ranges.push_back(std::move(range));
}

inline bool counts(int index, int64_t result[4]) {
    if (index < 0 || static_cast<size_t>(index) >= ranges.size()) return false;
    const Range& range = ranges[index];
    const auto touched = [](const std::vector<uint8_t>& flags) { return std::count(flags.begin(), flags.end(), 1); };
    result[0] = range.loaded;
    result[1] = touched(range.was_loaded);
    result[2] = range.stored;
    result[3] = touched(range.was_stored);
    return true;
}

// The first range that holds the whole access, or null where nothing is tracked; anything else ends the launch.
inline Range* checked(const void* address, size_t bytes, const char* what, Site site) {
    const auto start = reinterpret_cast<uintptr_t>(address);
    const bool aligned = start % bytes == 0;
    if (aligned && ranges.empty()) return nullptr;
    if (aligned)
        for (Range& range : ranges)
            if (start >= range.start && start + bytes <= range.end) return &range;
    char text[256];
    if (!aligned) {
        snprintf(text, sizeof text, "%s of %zu bytes at %p is not aligned", what, bytes, address);
        fail(text, site);
    }
    int length = snprintf(text, sizeof text, "%s of %zu bytes at %p is out of bounds", what, bytes, address);
    for (size_t i = 0; i < ranges.size(); ++i)  // past the end, or before the start, of one of them: say which
        if (start + 4096 > ranges[i].start && start < ranges[i].end + 4096) {
            snprintf(text + length, sizeof text - length, ": byte %lld of range %zu, which has %lld",
                     static_cast<long long>(start - ranges[i].start), i,
                     static_cast<long long>(ranges[i].end - ranges[i].start));
            break;
        }
    fail(text, site);
}

template <class T>
inline T load(const T* address, Site site) {
    if (Range* range = checked(address, sizeof(T), "a load", site)) {
        range->loaded += sizeof(T);
        memset(range->was_loaded.data() + (reinterpret_cast<uintptr_t>(address) - range->start), 1, sizeof(T));
    }
    T value;
    memcpy(&value, address, sizeof(T));
    return value;
}

template <class T>
inline void store(T* address, const T& value, Site site) {
    if (Range* range = checked(address, sizeof(T), "a store", site)) {
        range->stored += sizeof(T);
        memset(range->was_stored.data() + (reinterpret_cast<uintptr_t>(address) - range->start), 1, sizeof(T));
    }
    memcpy(address, &value, sizeof(T));
}

}  // namespace emulator
}  // namespace nibble
