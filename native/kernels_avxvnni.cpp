#include "simd_avx2.h"

#define PLAIT_SIMD Avx2
#define PLAIT_SIMD_NAME "avxvnni"
#define PLAIT_KERNELS avxvnni_kernels
#include "kernels.inc"
