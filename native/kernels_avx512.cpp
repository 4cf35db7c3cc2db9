#include "simd_avx512.h"

#define PLAIT_SIMD Avx512
#define PLAIT_SIMD_NAME "avx512"
#define PLAIT_KERNELS avx512_kernels
#include "kernels.inc"
