// Instruction sets of this machine, widest first, and the choice among them.
#pragma once

#include <vector>

#include "kernels.h"

namespace plait {

std::vector<const Kernels*> available();

// For tests: all paths give the same bits, so that switching is invisible except in time.
void use_kernels(const char* name);

}  // namespace plait
