#include "simd_scalar.h"

#define PLAIT_SIMD Scalar
#define PLAIT_SIMD_NAME "scalar"
#define PLAIT_KERNELS scalar_kernels
#include "kernels.inc"
