// The Python module plait._native: every function checks what it is given, lets go of the interpreter lock and
// runs on the pool.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>

#include "arrays.h"
#include "attention.h"
#include "bindings.h"
#include "dispatch.h"
#include "linear.h"
#include "packed.h"
#include "threads.h"

namespace plait {

using namespace nb::literals;

void bind_packed(nb::module_& m) {
    nb::class_<PackedMatrix>(m, "PackedMatrix")
        .def("__init__",
             [](PackedMatrix* self, const ConstArray& blocks, const std::string& format) {
                 check_type<uint8_t>(blocks, "blocks", "uint8");
                 check_shape(blocks, "blocks", {-1, -1});
                 check_contiguous(blocks, "blocks");
                 new (self) PackedMatrix(static_cast<const uint8_t*>(blocks.data()), int64_t(blocks.shape(0)),
                                         int64_t(blocks.shape(1)), format);
             })
        .def_prop_ro("shape",
                     [](const PackedMatrix& self) { return std::make_tuple(self.view().rows, self.view().columns); })
        .def("nbytes", &PackedMatrix::nbytes)
        .def("unpack_rows", [](const PackedMatrix& self, const ConstArray& rows, const Array& out) {
            check_type<int64_t>(rows, "rows", "int64");
            check_shape(rows, "rows", {-1});
            const int64_t count = int64_t(rows.shape(0));
            check_fp32(out, "out");
            check_shape(out, "out", {count, self.view().columns});
            const int64_t* index = static_cast<const int64_t*>(rows.data());
            for (int64_t i = 0; i < count; ++i)
                if (index[i] < 0 || index[i] >= self.view().rows)
                    refuse("rows must be in [0, " + std::to_string(self.view().rows) + "). Got " +
                           std::to_string(index[i]) + ".");
            float* y = floats_out(out);
            const int64_t stride = stride_of(out, 0);
            nb::gil_scoped_release free;
            Pool::get().run([&](Team& team) {
                team.share(count, 16, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) self.unpack_row(index[i], y + i * stride);
                });
            }, 4.0 * double(count * self.view().columns));
        });
}

void bind_rows(nb::module_& m) {
    m.def("rms_norm", [](const ConstArray& x, const ConstArray& weight, float epsilon, const Array& y) {
        check_fp32(x, "x");
        check_fp32(weight, "weight");
        check_fp32(y, "y");
        check_shape(x, "x", {-1, -1});
        const int64_t rows = int64_t(x.shape(0)), n = int64_t(x.shape(1));
        check_shape(weight, "weight", {n});
        check_shape(y, "y", {rows, n});
        const int64_t ldx = stride_of(x, 0), ldy = stride_of(y, 0);
        nb::gil_scoped_release free;
        Pool::get().run([&](Team& team) {
            team.share(rows, 8, [&](int64_t begin, int64_t end) {
                for (int64_t r = begin; r < end; ++r)
                    kernels().rms_norm(floats(x) + r * ldx, floats(weight), epsilon, n, floats_out(y) + r * ldy);
            });
        }, double(rows * n));
    });

    m.def(
        "activate",
        [](int activation, const ConstArray& gate, const std::optional<ConstArray>& up, const Array& y) {
            if (activation < 0 || activation > 3) refuse("activation must be 0, 1, 2 or 3.");
            check_fp32(gate, "gate");
            check_fp32(y, "y");
            check_shape(gate, "gate", {-1, -1});
            const int64_t rows = int64_t(gate.shape(0)), n = int64_t(gate.shape(1));
            if (up) {
                check_fp32(*up, "up");
                check_shape(*up, "up", {rows, n});
            }
            check_shape(y, "y", {rows, n});
            const float* carried = up ? floats(*up) : nullptr;
            const int64_t ldg = stride_of(gate, 0), ldu = up ? stride_of(*up, 0) : 0, ldy = stride_of(y, 0);
            nb::gil_scoped_release free;
            Pool::get().run([&](Team& team) {
                team.share(rows, 8, [&](int64_t begin, int64_t end) {
                    for (int64_t r = begin; r < end; ++r)
                        kernels().activate(Activation(activation), floats(gate) + r * ldg,
                                           carried == nullptr ? nullptr : carried + r * ldu, n, floats_out(y) + r * ldy);
                });
            }, 16.0 * double(rows * n));
        },
        "activation"_a, "gate"_a, "up"_a.none(), "y"_a);

    m.def("exp", [](const ConstArray& x, const Array& y) {
        check_fp32(x, "x");
        check_fp32(y, "y");
        check_shape(x, "x", {-1});
        check_shape(y, "y", {int64_t(x.shape(0))});
        kernels().exp(floats(x), int64_t(x.shape(0)), floats_out(y));
    });

    m.def("rotate", [](const ConstArray& x, const ConstArray& cos, const ConstArray& sin, const Array& y) {
        check_fp32(x, "x");
        check_fp32(cos, "cos");
        check_fp32(sin, "sin");
        check_fp32(y, "y");
        check_shape(x, "x", {-1, -1, -1});
        const int64_t rows = int64_t(x.shape(0)), heads = int64_t(x.shape(1)), dim = int64_t(x.shape(2));
        check_shape(cos, "cos", {rows, -1});
        const int64_t half = int64_t(cos.shape(1));
        if (2 * half > dim) refuse("cos must have at most half as many columns as a head has channels.");
        check_shape(sin, "sin", {rows, half});
        check_shape(y, "y", {rows, heads, dim});
        const int64_t x_row = stride_of(x, 0), x_head = stride_of(x, 1), y_row = stride_of(y, 0), y_head = stride_of(y, 1);
        const int64_t cos_row = stride_of(cos, 0), sin_row = stride_of(sin, 0);
        nb::gil_scoped_release free;
        Pool::get().run([&](Team& team) {
            team.share(rows, 4, [&](int64_t begin, int64_t end) {
                for (int64_t r = begin; r < end; ++r)
                    for (int64_t h = 0; h < heads; ++h)
                        kernels().rotate(floats(x) + r * x_row + h * x_head, floats(cos) + r * cos_row,
                                         floats(sin) + r * sin_row, half, dim, 1.0f, floats_out(y) + r * y_row + h * y_head);
            });
        }, double(rows * heads * dim));
    });

    m.def("append", [](const ConstArray& x, const Array& storage, int64_t at) {
        check_fp32(x, "x");
        check_shape(x, "x", {-1, -1, -1});
        const int64_t rows = int64_t(x.shape(0)), heads = int64_t(x.shape(1)), dim = int64_t(x.shape(2));
        const Number number = number_of(storage, "storage");
        check_shape(storage, "storage", {heads, -1, dim});
        const int64_t capacity = int64_t(storage.shape(1));
        if (at < 0 || rows > capacity || at > capacity - rows)
            refuse("Rows [" + std::to_string(at) + ", " + std::to_string(at + rows) + ") do not fit a storage of " +
                   std::to_string(capacity) + ".");
        const int64_t x_row = stride_of(x, 0), x_head = stride_of(x, 1);
        const int64_t s_head = stride_of(storage, 0), s_row = stride_of(storage, 1), width = nbytes_of(number);
        char* base = static_cast<char*>(storage.data());
        nb::gil_scoped_release free;
        Pool::get().run([&](Team& team) {
            team.share(rows, 8, [&](int64_t begin, int64_t end) {
                for (int64_t r = begin; r < end; ++r)
                    for (int64_t h = 0; h < heads; ++h)
                        kernels().convert(floats(x) + r * x_row + h * x_head, number, dim,
                                          base + (h * s_head + (at + r) * s_row) * width);
            });
        }, double(rows * heads * dim));
    });
}

void bind_sampling(nb::module_& m) {
    m.def("log_softmax", [](const ConstArray& x, const Array& y) {
        check_fp32(x, "x");
        check_fp32(y, "y");
        check_shape(x, "x", {-1, -1});
        const int64_t rows = int64_t(x.shape(0)), n = int64_t(x.shape(1));
        check_shape(y, "y", {rows, n});
        const int64_t ldx = stride_of(x, 0), ldy = stride_of(y, 0);
        nb::gil_scoped_release free;
        Pool::get().run([&](Team& team) {
            team.share(rows, 1, [&](int64_t begin, int64_t end) {
                for (int64_t r = begin; r < end; ++r) {
                    const float* from = floats(x) + r * ldx;
                    float* to = floats_out(y) + r * ldy;
                    const float top = kernels().largest(from, n);
                    const float log = float(std::log(double(kernels().exp_sum(from, top, n, nullptr))));
                    for (int64_t i = 0; i < n; ++i) to[i] = (from[i] - top) - log;
                }
            });
        }, 16.0 * double(rows * n));
    });

    m.def("argmax", [](const ConstArray& x, const Array& y) {
        check_fp32(x, "x");
        check_type<int64_t>(y, "y", "int64");
        check_shape(x, "x", {-1, -1});
        const int64_t rows = int64_t(x.shape(0)), n = int64_t(x.shape(1));
        if (n == 0) refuse("argmax needs at least one column.");
        check_shape(y, "y", {rows});
        const int64_t ldx = stride_of(x, 0);
        nb::gil_scoped_release free;
        for (int64_t r = 0; r < rows; ++r) {
            const float* from = floats(x) + r * ldx;
            const float top = kernels().largest(from, n);
            int64_t at = 0;
            while (at < n - 1 && !(from[at] == top || (top != top && from[at] != from[at]))) ++at;
            static_cast<int64_t*>(y.data())[r] = at;
        }
    });

    m.def("top_k", [](const ConstArray& x, const Array& values, const Array& indices) {
        check_fp32(x, "x");
        check_fp32(values, "values");
        check_type<int64_t>(indices, "indices", "int64");
        check_shape(x, "x", {-1, -1});
        check_shape(values, "values", {int64_t(x.shape(0)), -1});
        const int64_t rows = int64_t(x.shape(0)), n = int64_t(x.shape(1)), k = int64_t(values.shape(1));
        check_shape(indices, "indices", {rows, k});
        if (k > n) refuse("top_k takes k up to " + std::to_string(n) + ". Got " + std::to_string(k) + ".");
        const int64_t ldx = stride_of(x, 0), ldv = stride_of(values, 0), ldi = stride_of(indices, 0);
        nb::gil_scoped_release free;
        std::vector<int64_t> order(static_cast<size_t>(n));
        for (int64_t r = 0; r < rows; ++r) {
            const float* from = floats(x) + r * ldx;
            for (int64_t i = 0; i < n; ++i) order[size_t(i)] = i;
            // NaN first, as torch has it; then large before small, and among equals the lower index.
            const auto before = [from](int64_t a, int64_t b) {
                const bool a_nan = std::isnan(from[a]), b_nan = std::isnan(from[b]);
                if (a_nan != b_nan) return a_nan;
                if (!a_nan && from[a] != from[b]) return from[a] > from[b];
                return a < b;
            };
            std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
            for (int64_t i = 0; i < k; ++i) {
                static_cast<int64_t*>(indices.data())[r * ldi + i] = order[size_t(i)];
                floats_out(values)[r * ldv + i] = from[order[size_t(i)]];
            }
        }
    });
}

}  // namespace plait

NB_MODULE(_native, m) {
    // What Python still holds when it ends is no mistake of ours to report.
    nanobind::set_leak_warnings(false);
    using namespace plait;
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Kernels* table : available()) names.push_back(table->name);
        return names;
    });
    m.def("use_isa", [](const std::string& name) { use_kernels(name.c_str()); });
    m.def("threads", [] { return Pool::get().size(); });
    m.def("set_threads", [](int count) {
        if (count < 1 || count > 1024) refuse("threads must be from 1 to 1024. Got " + std::to_string(count) + ".");
        nb::gil_scoped_release free;
        Pool::get().resize(count);
    });
    m.def("is_alone", [] { return Pool::is_alone(); });
    m.def("set_alone", [](bool alone) { Pool::set_alone(alone); });
    bind_packed(m);
    bind_rows(m);
    bind_grid(m);
    bind_stack(m);
    bind_additive(m);
    bind_bits(m);
    bind_linear(m);
    bind_attention(m);
    bind_codes(m);
    bind_sampling(m);
    bind_adapter(m);
    bind_program(m);
}
