// What the library says of itself, so that Python repeats none of it.

#include "product.h"

// Numbers in a vector: the channels of norms and of Winograd's input are a multiple of it.
EXPORT int64_t sd_vector() { return sd::W; }

// Columns of a panel: the last axis of Winograd's kernels; GEGLU's weights have a multiple of it as rows.
EXPORT int64_t sd_panel() { return sd::PANEL; }

// The instruction set that it was built for.
EXPORT const char* sd_set() { return SD_SET; }
