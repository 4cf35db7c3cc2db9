// A whole decoder as one call.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "bound_adapter.h"
#include "bound_projection.h"
#include "program.h"

namespace plait {

using namespace nb::literals;

namespace {

constexpr int64_t kMostHeadDim = 1024;  // room of Program::attention
constexpr int64_t kFurthest = int64_t(1) << 40;

struct BoundProgram {
    Program program;
    std::vector<nb::object> owners;
    std::mutex running;
};

std::vector<float> vector_of(const std::optional<ConstArray>& array, const char* name, int64_t size) {
    if (!array) return {};
    check_fp32(*array, name);
    check_shape(*array, name, {size});
    return std::vector<float>(floats(*array), floats(*array) + size);
}

const Projection& keep(BoundProgram& self, const nb::object& object) {
    self.owners.push_back(object);
    return nb::cast<const BoundProjection&>(object).projection;
}

void add_layer(BoundProgram& self, float epsilon, const ConstArray& mixer_norm, const ConstArray& feed_forward_norm,
               const std::optional<ConstArray>& mixer_output_norm,
               const std::optional<ConstArray>& feed_forward_output_norm, const std::optional<ConstArray>& query_norm,
               const std::optional<ConstArray>& key_norm, const nb::object& query_key_value, const nb::object& output,
               const nb::object& gate, const nb::object& up, int activation, const nb::object& down, int64_t num_heads,
               int64_t num_kv_heads, int64_t head_dim, float scale, float softcap, const std::optional<ConstArray>& slopes) {
    const int64_t width = self.program.width;
    if (head_dim < 1 || head_dim > kMostHeadDim || num_kv_heads < 1 || num_heads < 1 || num_heads % num_kv_heads != 0)
        refuse("A layer needs heads of 1 to 1024 channels, and query heads in a multiple of the key/value heads.");
    if (activation < 0 || activation > 3) refuse("activation must be 0, 1, 2 or 3.");
    Layer layer;
    layer.epsilon = epsilon;
    layer.mixer_norm = vector_of(mixer_norm, "mixer_norm", width);
    layer.feed_forward_norm = vector_of(feed_forward_norm, "feed_forward_norm", width);
    layer.mixer_output_norm = vector_of(mixer_output_norm, "mixer_output_norm", width);
    layer.feed_forward_output_norm = vector_of(feed_forward_output_norm, "feed_forward_output_norm", width);
    layer.query_norm = vector_of(query_norm, "query_norm", head_dim);
    layer.key_norm = vector_of(key_norm, "key_norm", head_dim);
    layer.query_key_value = keep(self, query_key_value);
    layer.output = keep(self, output);
    if (!gate.is_none()) layer.gate.gate = keep(self, gate);
    layer.gate.up = keep(self, up);
    layer.gate.activation = Activation(activation);
    layer.down = keep(self, down);
    layer.heads = {num_heads, num_kv_heads, head_dim, head_dim, scale, softcap};
    layer.slopes = vector_of(slopes, "slopes", num_heads);
    const int64_t inner = layer.gate.up.num_outputs;
    const bool has_shapes = layer.query_key_value.columns == width &&
                            layer.query_key_value.num_outputs == (num_heads + 2 * num_kv_heads) * head_dim &&
                            layer.output.columns == num_heads * head_dim && layer.output.num_outputs == width &&
                            layer.gate.up.columns == width && inner % kBlock == 0 && layer.down.columns == inner &&
                            layer.down.num_outputs == width &&
                            (gate.is_none() || (layer.gate.gate.columns == width && layer.gate.gate.num_outputs == inner));
    if (!has_shapes) refuse("The matrices of a layer do not fit its width, heads and inner width.");
    if (!self.program.layers.empty()) {
        const Layer& first = self.program.layers.front();
        if (first.output.columns != layer.output.columns || first.down.columns != inner)
            refuse("All layers of a program must have the same number of query channels and the same inner width.");
    }
    self.program.layers.push_back(std::move(layer));
}

// A table of whole numbers, one row for each item.
struct Table {
    const int64_t* data;
    int64_t rows, columns;
    int64_t operator()(int64_t row, int64_t column) const { return data[row * columns + column]; }
};

Table table_of(const ConstArray& array, const char* name, int64_t columns) {
    check_type<int64_t>(array, name, "int64");
    check_shape(array, name, {-1, columns});
    check_contiguous(array, name);
    return {static_cast<const int64_t*>(array.data()), int64_t(array.shape(0)), columns};
}

void expect(bool is_right, const char* what) {
    if (!is_right) refuse(std::string("The program was given ") + what + ".");
}

// Whether an adapter was made for the products of a program.
bool fits(const Adapter& adapter, const Program& program) {
    if (adapter.layers.size() != program.layers.size()) return false;
    for (size_t index = 0; index < program.layers.size(); ++index) {
        const Layer& layer = program.layers[index];
        const Projection* projections[kSites] = {&layer.query_key_value, &layer.output, &layer.gate.gate, &layer.gate.up,
                                                 &layer.down};
        for (int site = 0; site < kSites; ++site) {
            const SiteDelta& delta = adapter.layers[index].sites[site];
            const Projection& of = *projections[site];
            if (!delta.is_empty() && (of.parts.empty() || delta.inputs != of.columns || delta.outputs != of.num_outputs))
                return false;
            if (delta.bottleneck.rank > 0 && delta.outputs != program.width) return false;
        }
    }
    return true;
}

using Tree = std::tuple<int64_t, ConstArray, ConstArray>;  // segment, depths, ancestors

int64_t run(BoundProgram& self, const Array& x, const ConstArray& segments,
         const std::vector<std::tuple<ConstArray, ConstArray>>& tables, const ConstArray& targets,
         const ConstArray& visits, const ConstArray& choices, const ConstArray& observed, const std::vector<Tree>& trees,
         const ConstArray& logit_rows, const std::optional<Array>& hidden, const std::optional<Array>& logits,
         const nb::list& adapters, const std::optional<ConstArray>& growth) {
    Program& program = self.program;
    const int64_t num_layers = int64_t(program.layers.size());
    check_fp32(x, "x");
    check_shape(x, "x", {-1, program.width});
    check_contiguous(x, "x");
    RunArguments a;
    a.x = floats_out(x);
    a.rows = int64_t(x.shape(0));

    // first row, rows, position of the first row, kind of mask
    const Table segment_table = table_of(segments, "segments", 4);
    std::vector<Mask> masks;
    int64_t next_row = 0;
    for (int64_t s = 0; s < segment_table.rows; ++s) {
        a.segments.push_back({segment_table(s, 0), segment_table(s, 1)});
        expect(segment_table(s, 0) == next_row && segment_table(s, 1) >= 0, "segments that do not cover the rows in order");
        next_row += segment_table(s, 1);
        const int64_t kind = segment_table(s, 3);
        expect(kind >= 0 && kind <= 2, "an unknown mask");
        Mask mask;
        mask.kind = MaskKind(kind);
        mask.first_query = segment_table(s, 2);
        masks.push_back(mask);
    }
    expect(next_row == a.rows, "segments that do not cover the rows");
    for (const auto& [segment, depths, ancestors] : trees) {
        expect(segment >= 0 && segment < segment_table.rows, "a tree of no segment");
        const int64_t count = a.segments[size_t(segment)].num_rows;
        check_type<int64_t>(depths, "depths", "int64");
        check_shape(depths, "depths", {count});
        check_type<int64_t>(ancestors, "ancestors", "int64");
        check_shape(ancestors, "ancestors", {count, -1});
        check_contiguous(ancestors, "ancestors");
        Mask& mask = masks[size_t(segment)];
        mask.depths = static_cast<const int64_t*>(depths.data());
        mask.ancestors = static_cast<const uint64_t*>(static_cast<const void*>(ancestors.data()));
        mask.words = int64_t(ancestors.shape(1));
    }
    for (const Mask& mask : masks) expect((mask.kind == MaskKind::tree) == (mask.depths != nullptr), "a tree mask without its tree");

    for (const auto& [cos, sin] : tables) {
        check_fp32(cos, "cos");
        check_fp32(sin, "sin");
        check_shape(cos, "cos", {a.rows, -1});
        check_shape(sin, "sin", {a.rows, int64_t(cos.shape(1))});
        check_contiguous(cos, "cos");
        check_contiguous(sin, "sin");
        a.tables.push_back({floats(cos), floats(sin), int64_t(cos.shape(1))});
    }
    const auto check_table = [&](int64_t table, int64_t layer) {
        expect(table >= -1 && table < int64_t(a.tables.size()), "an unknown table of angles");
        expect(table < 0 || 2 * a.tables[size_t(table)].half <= program.layers[size_t(layer)].heads.head_dim,
               "angles for more channels than a head has");
    };

    // keys, values, key head stride, key stride, value head stride, value stride, capacity, at, number, table
    const Table target_table = table_of(targets, "targets", 10);
    const int64_t num_segments = segment_table.rows;
    expect(target_table.rows == num_layers * num_segments, "not one target for each layer and segment");
    for (int64_t layer = 0; layer < num_layers; ++layer) {
        std::vector<Target> of_layer;
        for (int64_t s = 0; s < num_segments; ++s) {
            const int64_t i = layer * num_segments + s, at = target_table(i, 7), number = target_table(i, 8);
            expect(number >= 0 && number <= 2, "an unknown number format");
            expect(at >= 0 && a.segments[size_t(s)].num_rows <= target_table(i, 6) - at, "rows that do not fit their strand");
            check_table(target_table(i, 9), layer);
            of_layer.push_back({reinterpret_cast<void*>(target_table(i, 0)), reinterpret_cast<void*>(target_table(i, 1)),
                                target_table(i, 2), target_table(i, 3), target_table(i, 4), target_table(i, 5), at,
                                Number(number), target_table(i, 9)});
        }
        a.targets.push_back(std::move(of_layer));
    }

    const auto expect_place = [&](const Table& table, int64_t i) {
        expect(table(i, 0) >= 0 && table(i, 0) < num_layers && table(i, 1) >= 0 && table(i, 1) < num_segments,
               "a visit of no layer or segment");
        check_table(table(i, 2), table(i, 0));
    };

    // Visits and choices begin alike: layer, segment, table, window, kind of mask (-1 for that of the segment), nearest.
    const auto shown_of = [&](const Table& table, int64_t i) {
        expect_place(table, i);
        const int64_t window = table(i, 3), kind = table(i, 4);
        expect(window >= 0 && kind >= -1 && kind <= 1 && table(i, 5) >= 0, "a visit with a wrong window, mask or distance");
        Mask mask = masks[size_t(table(i, 1))];
        if (kind >= 0) mask.kind = MaskKind(kind);
        mask.window = window;
        mask.nearest = table(i, 5);
        return mask;
    };
    const auto expect_order = [&](const auto& of_layer, int64_t segment) {
        expect(of_layer.empty() || of_layer.back().segment <= segment, "visits that are not in the order of segments");
    };

    // What is taken off scores by distances from -reach to reach.
    int64_t reach = -1;
    if (growth) {
        check_fp32(*growth, "growth");
        check_shape(*growth, "growth", {-1});
        expect(growth->shape(0) % 2 == 1, "growth that is not of as many distances to both sides");
        reach = int64_t(growth->shape(0)) / 2;
        a.growth = floats(*growth) + reach;
    }
    const auto expect_reach = [&](int64_t layer, int64_t least, int64_t most) {
        expect(program.layers[size_t(layer)].slopes.empty() || (-reach <= least && most <= reach),
               "distances for which it has no growth");
    };

    // ... first and last visitor, what is added to the log-sum-exp, group, temper and share, numbers as bits of fp64, how
    // the queries stand and where
    constexpr int64_t kStrandAt = 14;
    const auto number_at = [](const int64_t& bits) {
        double number;
        std::memcpy(&number, &bits, sizeof number);
        return float(number);
    };
    const Table visit_table = table_of(visits, "visits", kStrandAt + kStrandColumns);
    a.visits.resize(size_t(num_layers));
    for (int64_t i = 0; i < visit_table.rows; ++i) {
        const Mask mask = shown_of(visit_table, i);
        const int64_t layer = visit_table(i, 0), segment = visit_table(i, 1);
        const int64_t* row = visit_table.data + i * visit_table.columns;
        const Run visitors{row[6], row[7]};
        const Weight weight{number_at(row[8]), row[9], number_at(row[10]), number_at(row[11])};
        const int64_t standing = row[12], stands_at = row[13];
        row += kStrandAt;
        expect(visitors.first >= 0 && visitors.last >= visitors.first, "a wrong run of visiting queries");
        expect(std::isfinite(weight.added) && weight.group >= 0 && std::isfinite(weight.temper) && weight.temper > 0 &&
                   std::isfinite(weight.share) && weight.share > 0,
               "a visit with a wrong weight");
        const int64_t number = row[7], length = row[8] + row[10];
        expect(row[8] >= 0 && row[10] >= 0 && number >= 0 && number <= kCodedFormat, "a strand with a wrong length or format");
        if (number == kCodedFormat) {
            const auto& k = *reinterpret_cast<const CodedNumbers*>(row[0]);
            const auto& v = *reinterpret_cast<const CodedNumbers*>(row[1]);
            const Heads& heads = program.layers[size_t(layer)].heads;
            expect(k.stored.num_heads == heads.num_kv_heads && v.stored.num_heads == heads.num_kv_heads &&
                       k.dim == heads.head_dim && v.dim == heads.value_dim && length <= k.stored.tokens &&
                       length <= v.stored.tokens,
                   "codes that do not fit their layer");
        }
        expect(standing >= 0 && standing <= 2 && std::abs(stands_at) < kFurthest && std::abs(row[9]) < kFurthest &&
                   length < kFurthest,
               "a place or distance that cannot be");
        const int64_t first_query = standing == 0 ? mask.first_query : stands_at;
        // A node of a draft stands no further on than it is stored, and no further back than the first one.
        const int64_t first_key = mask.kind == MaskKind::tree ? std::min(row[9], mask.first_query) : row[9];
        const int64_t last_query = standing == 0 ? first_query + a.segments[size_t(segment)].num_rows - 1 : stands_at;
        if (standing == 2) expect_reach(layer, stands_at, stands_at);
        else if (row[10] > 0) expect_reach(layer, first_query - (row[9] + row[10] - 1), last_query - first_key);
        auto& of_layer = a.visits[size_t(layer)];
        expect_order(of_layer, segment);
        of_layer.push_back({segment, visit_of(row, mask), visit_table(i, 2)});
        StrandVisit& visit = of_layer.back().visit;
        visit.standing = Standing(standing);
        visit.stands_at = stands_at;
        visit.visitors = visitors;
        visit.weight = weight;
    }

    // ... place, address of the index, candidates, address of their strands, most, address of the numbers found, distance
    const Table choice_table = table_of(choices, "choices", 13);
    a.choices.resize(size_t(num_layers));
    for (int64_t i = 0; i < choice_table.rows; ++i) {
        const Mask mask = shown_of(choice_table, i);
        const int64_t segment = choice_table(i, 1);
        expect(choice_table(i, 6) >= 0 && choice_table(i, 8) >= 0 && choice_table(i, 10) >= 0, "a wrong choice");
        expect(mask.kind != MaskKind::tree, "a choice under a tree mask");
        expect_reach(choice_table(i, 0), choice_table(i, 12), choice_table(i, 12));
        auto& of_layer = a.choices[size_t(choice_table(i, 0))];
        expect_order(of_layer, segment);
        of_layer.push_back({segment, choice_table(i, 6), reinterpret_cast<const float*>(choice_table(i, 7)), choice_table(i, 8),
                            reinterpret_cast<const int64_t*>(choice_table(i, 9)), choice_table(i, 10),
                            reinterpret_cast<int64_t*>(choice_table(i, 11)), mask, choice_table(i, 2), choice_table(i, 12)});
    }

    // layer, segment, table of the queries, addresses of the queries and of their log-sum-exp
    const Table observed_table = table_of(observed, "observed", 5);
    a.observed.resize(size_t(num_layers));
    for (int64_t i = 0; i < observed_table.rows; ++i) {
        expect_place(observed_table, i);
        const int64_t segment = observed_table(i, 1);
        auto& of_layer = a.observed[size_t(observed_table(i, 0))];
        expect(of_layer.empty() || of_layer.back().segment < segment, "two observers of a segment");
        of_layer.push_back({segment, observed_table(i, 2), reinterpret_cast<float*>(observed_table(i, 3)),
                            reinterpret_cast<float*>(observed_table(i, 4))});
    }

    expect(adapters.size() == 0 || int64_t(adapters.size()) == num_segments, "not one adapter, or None, for each segment");
    bool is_adapted = false;
    for (nb::handle given : adapters) {
        a.adapters.push_back(given.is_none() ? nullptr : &nb::cast<const BoundAdapter&>(given).adapter);
        if (a.adapters.back() == nullptr) continue;
        is_adapted = true;
        expect(fits(*a.adapters.back(), program), "an adapter for other layers or widths");
    }
    if (!is_adapted) a.adapters.clear();

    const Table row_table = table_of(logit_rows, "logit_rows", 1);
    for (int64_t i = 0; i < row_table.rows; ++i) {
        expect(row_table(i, 0) >= 0 && row_table(i, 0) < a.rows, "a logit row that does not exist");
        a.logit_rows.push_back(row_table(i, 0));
    }
    if (hidden) {
        check_fp32(*hidden, "hidden");
        check_shape(*hidden, "hidden", {row_table.rows, program.width});
        check_contiguous(*hidden, "hidden");
        a.hidden = floats_out(*hidden);
    }
    if (logits) {
        expect(program.head.num_outputs > 0, "logits to write, but has no head");
        check_fp32(*logits, "logits");
        check_shape(*logits, "logits", {row_table.rows, program.head.num_outputs});
        check_contiguous(*logits, "logits");
        a.logits = floats_out(*logits);
    }
    nb::gil_scoped_release free;
    std::lock_guard<std::mutex> lock(self.running);
    return program.run(a);
}

}  // namespace

void bind_program(nb::module_& m) {
    nb::class_<BoundProgram>(m, "Program")
        .def(
            "__init__",
            [](BoundProgram* self, int64_t width, float epsilon, const std::optional<ConstArray>& final_norm,
               const nb::object& head) {
                if (width < kBlock || width % kBlock != 0) refuse("The width of a program must be a multiple of 32.");
                new (self) BoundProgram();
                self->program.width = width;
                self->program.epsilon = epsilon;
                self->program.final_norm = vector_of(final_norm, "final_norm", width);
                if (!head.is_none()) {
                    self->program.head = keep(*self, head);
                    if (self->program.head.columns != width) refuse("The head must have as many columns as the width.");
                }
            },
            "width"_a, "epsilon"_a, "final_norm"_a.none(), "head"_a.none())
        .def("add_layer", &add_layer, nb::kw_only(), "epsilon"_a, "mixer_norm"_a, "feed_forward_norm"_a,
             "mixer_output_norm"_a.none(), "feed_forward_output_norm"_a.none(), "query_norm"_a.none(),
             "key_norm"_a.none(), "query_key_value"_a, "output"_a, "gate"_a.none(), "up"_a, "activation"_a, "down"_a,
             "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "scale"_a, "softcap"_a, "slopes"_a.none() = nb::none())
        .def("run", &run, "x"_a, "segments"_a, "tables"_a, "targets"_a, "visits"_a, "choices"_a, "observed"_a,
             "trees"_a, "logit_rows"_a, "hidden"_a.none(), "logits"_a.none(), "adapters"_a = nb::list(),
             "growth"_a.none() = nb::none());
}

}  // namespace plait
