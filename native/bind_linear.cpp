// Products: dense matrices, projections of packed ones, and the feed-forward.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "bound_projection.h"
#include "linear.h"

namespace plait {

using namespace nb::literals;

namespace {

// Scratch of the calling thread, kept between calls.
thread_local Activations scratch_inputs, scratch_inner;
thread_local std::vector<float> scratch_rows;

struct Norm {
    const float* weight = nullptr;
    float epsilon = 0;
};

Norm norm_of(const std::optional<ConstArray>& weight, float epsilon, int64_t columns) {
    if (!weight) return {};
    check_fp32(*weight, "norm weight");
    check_shape(*weight, "norm weight", {columns});
    return {floats(*weight), epsilon};
}

// Normalise rows if asked, and quantise them; every thread takes its share.
void read_rows(Team& team, const float* x, int64_t ldx, Norm norm, Activations& to, float* room) {
    const int64_t columns = to.columns();
    team.share(to.rows(), 4, [&](int64_t begin, int64_t end) {
        if (norm.weight == nullptr) return to.quantize(x, ldx, begin, end);
        float* row = room + team.index * columns;
        for (int64_t r = begin; r < end; ++r) {
            kernels().rms_norm(x + r * ldx, norm.weight, norm.epsilon, columns, row);
            to.quantize_row(row, r);
        }
    });
}

void project(const BoundProjection& projection, const ConstArray& x, const Array& y, bool is_sum,
             const std::optional<ConstArray>& norm_weight, float epsilon) {
    const Projection& p = projection.projection;
    const ProductRows of(x, y, p.columns, p.num_outputs);
    const Norm norm = norm_of(norm_weight, epsilon, p.columns);
    Pool& pool = Pool::get();
    scratch_inputs.resize(of.rows, p.columns);
    scratch_rows.resize(size_t(pool.size() * p.columns));
    Activations& inputs = scratch_inputs;
    float* room = scratch_rows.data();
    nb::gil_scoped_release free;
    pool.run([&](Team& team) {
        read_rows(team, of.x, of.ldx, norm, inputs, room);
        team.share(p.num_tiles, p.grain(team.size, of.rows),
                   [&](int64_t begin, int64_t end) { p.run(inputs, begin, end, of.y, of.ldy, is_sum); });
    }, 0.2 * double(of.rows) * double(p.num_outputs) * double(p.columns));
}

void feed_forward(const BoundProjection* gate, const BoundProjection& up, const BoundProjection& down, int activation,
                  const ConstArray& x, const Array& y, bool is_sum, const std::optional<ConstArray>& norm_weight,
                  float epsilon) {
    if (activation < 0 || activation > 3) refuse("activation must be 0, 1, 2 or 3.");
    const int64_t columns = up.projection.columns, inner = up.projection.num_outputs;
    if (inner % kBlock != 0) refuse("The inner width of a feed-forward must be a multiple of 32.");
    if (gate != nullptr && (gate->projection.columns != columns || gate->projection.num_outputs != inner))
        refuse("gate and up must have the same shape.");
    if (down.projection.columns != inner) refuse("down must have as many columns as up has rows.");
    const ProductRows of(x, y, columns, down.projection.num_outputs);
    const Norm norm = norm_of(norm_weight, epsilon, columns);
    Pool& pool = Pool::get();
    scratch_inputs.resize(of.rows, columns);
    scratch_inner.resize(of.rows, inner);
    scratch_rows.resize(size_t(pool.size() * columns));
    const Gate gated{gate == nullptr ? Projection{} : gate->projection, up.projection, Activation(activation)};
    Activations &inputs = scratch_inputs, &hidden = scratch_inner;
    float* room = scratch_rows.data();
    nb::gil_scoped_release free;
    pool.run([&](Team& team) {
        read_rows(team, of.x, of.ldx, norm, inputs, room);
        team.share(inner / kBlock, 2, [&](int64_t begin, int64_t end) { gated.run(inputs, begin, end, hidden); });
        team.share(down.projection.num_tiles, down.projection.grain(team.size, of.rows), [&](int64_t begin, int64_t end) {
            down.projection.run(hidden, begin, end, of.y, of.ldy, is_sum);
        });
    });
}

void linear_dense(const ConstArray& x, const ConstArray& weight, const std::optional<ConstArray>& bias, const Array& y) {
    const Number number = number_of(weight, "weight");
    check_shape(weight, "weight", {-1, -1});
    const int64_t outputs = int64_t(weight.shape(0)), columns = int64_t(weight.shape(1));
    const ProductRows of(x, y, columns, outputs);
    if (bias) {
        check_fp32(*bias, "bias");
        check_shape(*bias, "bias", {outputs});
    }
    const float* added = bias ? floats(*bias) : nullptr;
    const int64_t ldw = stride_of(weight, 0);
    nb::gil_scoped_release free;
    Pool::get().run([&](Team& team) {
        team.share((outputs + kTile - 1) / kTile, of.rows >= 32 ? 4 : 16, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * kTile, last = end * kTile < outputs ? end * kTile : outputs;
            // Rows pass in blocks, so that weights read once serve many rows from the cache.
            for (int64_t r = 0; r < of.rows; r += 64) {
                const int64_t count = of.rows - r < 64 ? of.rows - r : 64;
                kernels().dense_rows(of.x + r * of.ldx, of.ldx, count, weight.data(), ldw, number, columns, first, last,
                                     of.y + r * of.ldy, of.ldy);
            }
            if (added == nullptr) return;
            for (int64_t r = 0; r < of.rows; ++r)
                for (int64_t i = first; i < last; ++i) of.y[r * of.ldy + i] += added[i];
        });
    }, double(of.rows) * double(outputs) * double(columns));
}

}  // namespace

void bind_linear(nb::module_& m) {
    nb::class_<BoundProjection>(m, "Projection")
        .def(
            "__init__",
            [](BoundProjection* self, const std::vector<std::tuple<nb::object, int64_t, int64_t>>& parts,
               const std::optional<ConstArray>& bias) {
                Projection projection;
                std::vector<nb::object> owners;
                if (parts.empty()) refuse("A projection needs at least one part.");
                for (const auto& [object, first, count] : parts) {
                    projection.add(nb::cast<const PackedMatrix&>(object).view(), first, count);
                    owners.push_back(object);
                }
                std::vector<float> added;
                if (bias) {
                    check_fp32(*bias, "bias");
                    check_shape(*bias, "bias", {projection.num_outputs});
                    added.assign(floats(*bias), floats(*bias) + projection.num_outputs);
                }
                new (self) BoundProjection(std::move(projection), std::move(owners), std::move(added));
            },
            "parts"_a, "bias"_a.none() = nb::none())
        .def_prop_ro("shape", [](const BoundProjection& self) {
            return std::make_tuple(self.projection.num_outputs, self.projection.columns);
        });
    m.def("project", &project, "projection"_a, "x"_a, "y"_a, "is_sum"_a = false, "norm_weight"_a.none() = nb::none(),
          "epsilon"_a = 0.0f);
    m.def("feed_forward", &feed_forward, "gate"_a.none(), "up"_a, "down"_a, "activation"_a, "x"_a, "y"_a,
          "is_sum"_a = false, "norm_weight"_a.none() = nb::none(), "epsilon"_a = 0.0f);
    m.def("linear_dense", &linear_dense, "x"_a, "weight"_a, "bias"_a.none(), "y"_a);
}

}  // namespace plait
