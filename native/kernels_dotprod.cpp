#include "simd_neon.h"

#define PLAIT_SIMD Neon
#define PLAIT_SIMD_NAME "dotprod"
#define PLAIT_KERNELS dotprod_kernels
#include "kernels.inc"
