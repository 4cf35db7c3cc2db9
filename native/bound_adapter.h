// An adapter that keeps the Python tensors it reads alive.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "adapter.h"
#include "arrays.h"

namespace plait {

struct BoundAdapter {
    Adapter adapter;
    std::vector<ConstArray> owners;
};

}  // namespace plait
