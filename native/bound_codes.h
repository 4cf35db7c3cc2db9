// Coded keys or values as Python holds them: the views, and the arrays that they look at.
#pragma once

#include <vector>

#include "arrays.h"
#include "codes.h"

namespace plait {

struct BoundNumbers {
    CodedNumbers numbers;
    std::vector<ConstArray> arrays;
};

}  // namespace plait
