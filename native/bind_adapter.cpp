// Adapters as Python makes them: tensors are borrowed and kept alive.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "bound_adapter.h"

namespace plait {

using namespace nb::literals;

namespace {

using Part = std::tuple<int64_t, ConstArray, ConstArray>;  // first output, down (rank, inputs), up (rank, outputs)

// down (rank, outputs), its bias, up (rank, outputs), its bias, the activation, whether the output is read.
using Neck = std::tuple<ConstArray, ConstArray, ConstArray, ConstArray, int, bool>;

const float* kept_vector(BoundAdapter& self, const std::optional<ConstArray>& array, const char* name, int64_t size) {
    if (!array) return nullptr;
    check_fp32(*array, name);
    check_shape(*array, name, {size});
    check_contiguous(*array, name);
    self.owners.push_back(*array);
    return floats(*array);
}

void set(BoundAdapter& self, int64_t layer, int site, int64_t inputs, int64_t outputs,
         const std::optional<ConstArray>& input_scale, const std::optional<ConstArray>& output_scale,
         const std::optional<ConstArray>& bias, const std::vector<Part>& parts, const std::optional<Neck>& bottleneck) {
    Adapter& adapter = self.adapter;
    if (layer < 0 || layer >= int64_t(adapter.layers.size()) || site < 0 || site >= kSites)
        refuse("An adapter has no such layer or site.");
    if (input_scale && site != kOutput && site != kDown)
        refuse("Inputs are scaled in front of the output and the down product only.");
    SiteDelta delta;
    delta.inputs = inputs;
    delta.outputs = outputs;
    delta.input_scale = kept_vector(self, input_scale, "input_scale", inputs);
    delta.output_scale = kept_vector(self, output_scale, "output_scale", outputs);
    delta.bias = kept_vector(self, bias, "bias", outputs);
    for (const auto& [first, down, up] : parts) {
        check_fp32(down, "down");
        check_shape(down, "down", {-1, inputs});
        check_contiguous(down, "down");
        const int64_t rank = int64_t(down.shape(0));
        check_fp32(up, "up");
        check_shape(up, "up", {rank, -1});
        check_contiguous(up, "up");
        const int64_t count = int64_t(up.shape(1));
        if (rank < 1 || first < 0 || count < 1 || first > outputs - count)
            refuse("A part of an adapter needs a rank of at least 1 and outputs that its product has.");
        self.owners.push_back(down);
        self.owners.push_back(up);
        delta.parts.push_back({first, count, rank, floats(down), floats(up)});
        adapter.most_rank = std::max(adapter.most_rank, rank);
    }
    if (bottleneck) {
        if (site != kOutput && site != kDown) refuse("A bottleneck ends a branch, at the output or the down product.");
        const auto& [down, down_bias, up, up_bias, activation, reads_output] = *bottleneck;
        check_fp32(down, "down");
        check_shape(down, "down", {-1, outputs});
        check_contiguous(down, "down");
        const int64_t rank = int64_t(down.shape(0));
        check_fp32(up, "up");
        check_shape(up, "up", {rank, outputs});
        check_contiguous(up, "up");
        if (rank < 1 || activation < 0 || activation > int(Activation::relu))
            refuse("A bottleneck needs a rank of at least 1 and an activation from 0 to 3.");
        self.owners.push_back(down);
        self.owners.push_back(up);
        delta.bottleneck = {rank, floats(down), floats(up), kept_vector(self, down_bias, "down_bias", rank),
                            kept_vector(self, up_bias, "up_bias", outputs), Activation(activation), reads_output};
        adapter.most_rank = std::max(adapter.most_rank, rank);
    }
    adapter.layers[size_t(layer)].sites[site] = std::move(delta);
}

}  // namespace

void bind_adapter(nb::module_& m) {
    nb::class_<BoundAdapter>(m, "Adapter")
        .def(
            "__init__",
            [](BoundAdapter* self, int64_t layers) {
                if (layers < 1 || layers > (1 << 16)) refuse("An adapter needs 1 to 65536 layers.");
                new (self) BoundAdapter();
                self->adapter.layers.resize(size_t(layers));
            },
            "layers"_a)
        .def("set", &set, "layer"_a, "site"_a, "inputs"_a, "outputs"_a, "input_scale"_a.none(),
             "output_scale"_a.none(), "bias"_a.none(), "parts"_a, "bottleneck"_a.none() = nb::none());
}

}  // namespace plait
