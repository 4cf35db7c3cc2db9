#include "simd_avx2.h"

#define PLAIT_SIMD Avx2
#define PLAIT_SIMD_NAME "avx2"
#define PLAIT_KERNELS avx2_kernels
#include "kernels.inc"
