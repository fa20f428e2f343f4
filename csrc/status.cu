// What a status means, and which sources the library was built from.
#include "device.cuh"

#ifndef NIBBLE_SOURCES
#define NIBBLE_SOURCES ""  // a build by hand
#endif

extern "C" const char* nibble_error(int status) {
#ifdef NIBBLE_EMULATED
    if (status == NIBBLE_EMULATOR) return nibble_emulator_failure();
#else
    if (status > 0) return cudaGetErrorString(static_cast<cudaError_t>(status));
#endif
    switch (status) {
        case 0:
            return "no error";
        case NIBBLE_BAD_COUNT:
            return "the number of parts is not 1 to 4";
        case NIBBLE_BAD_DTYPE:
            return "the dtype is not one that this function takes";
        case NIBBLE_BAD_SHAPE:
            return "rows, columns or first_block are negative, or more than one launch covers";
        case NIBBLE_BAD_TOKENS:
            return "the number of tokens is not 1 to 64";
        case NIBBLE_BAD_SPLITS:
            return "splits is below 1, or more than one launch covers";
        case NIBBLE_BAD_WORKSPACE:
            return "splits > 1 needs a workspace of splits * tokens * rows fp32 values";
        case NIBBLE_BAD_POINTER:
            return "a pointer is not aligned to its element";
    }
    return "unknown status";
}

extern "C" const char* nibble_sources(void) { return NIBBLE_SOURCES; }
