// A projection that keeps the Python matrices it reads alive.
#pragma once

#include <nanobind/nanobind.h>

#include <utility>
#include <vector>

#include "linear.h"

namespace plait {

class BoundProjection {
public:
    BoundProjection(Projection given, std::vector<nanobind::object> owners, std::vector<float> bias)
        : projection(std::move(given)), owners_(std::move(owners)), bias_(std::move(bias)) {
        if (!bias_.empty()) projection.bias = bias_.data();
    }
    BoundProjection(const BoundProjection&) = delete;
    BoundProjection& operator=(const BoundProjection&) = delete;

    Projection projection;

private:
    std::vector<nanobind::object> owners_;
    std::vector<float> bias_;
};

}  // namespace plait
