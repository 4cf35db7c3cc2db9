#include "simd_neon.h"

#define PLAIT_SIMD Neon
#define PLAIT_SIMD_NAME "neon"
#define PLAIT_KERNELS neon_kernels
#include "kernels.inc"
