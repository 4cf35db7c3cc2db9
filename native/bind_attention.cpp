// Attention of one segment over one strand, and the merge of two parts.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "arrays.h"
#include "attention.h"
#include "bindings.h"

namespace plait {

using namespace nb::literals;

namespace {

thread_local AttentionPlan scratch_plan;
thread_local AttentionScratch scratch_room;

}  // namespace

Mask mask_of(int mask_kind, int64_t first_query, int64_t first_key, int64_t window, int64_t queries,
             const std::optional<ConstArray>& depths, const std::optional<ConstArray>& ancestors) {
    if (mask_kind < 0 || mask_kind > 2) refuse("mask_kind must be 0, 1 or 2.");
    if (window < 0) refuse("window must not be negative.");
    Mask mask{MaskKind(mask_kind), first_query, first_key, window};
    if (mask.kind == MaskKind::tree) {
        if (!depths || !ancestors) refuse("A tree needs depths and ancestors.");
        check_type<int64_t>(*depths, "depths", "int64");
        check_shape(*depths, "depths", {queries});
        check_type<int64_t>(*ancestors, "ancestors", "int64");
        check_shape(*ancestors, "ancestors", {queries, -1});
        check_contiguous(*ancestors, "ancestors");
        mask.depths = static_cast<const int64_t*>(depths->data());
        mask.ancestors = static_cast<const uint64_t*>(static_cast<const void*>(ancestors->data()));
        mask.words = int64_t(ancestors->shape(1));
    }
    return mask;
}

namespace {

void partial_attention(const ConstArray& q, const ConstArray& keys, const ConstArray& values, float scale, int mask_kind,
                       int64_t first_query, int64_t first_key, int64_t window, float softcap,
                       const std::optional<ConstArray>& depths, const std::optional<ConstArray>& ancestors,
                       const Array& out, const Array& lse) {
    check_fp32(q, "q");
    check_fp32(out, "out");
    check_fp32(lse, "lse");
    check_shape(q, "q", {-1, -1, -1});
    const int64_t queries = int64_t(q.shape(0)), heads = int64_t(q.shape(1)), dim = int64_t(q.shape(2));
    const Number number = number_of(keys, "keys");
    if (number_of(values, "values") != number) refuse("keys and values must have the same dtype.");
    check_shape(keys, "keys", {-1, -1, dim});
    const int64_t kv_heads = int64_t(keys.shape(0)), length = int64_t(keys.shape(1));
    check_shape(values, "values", {kv_heads, length, -1});
    const int64_t value_dim = int64_t(values.shape(2));
    if (kv_heads < 1 || heads < 1 || heads % kv_heads != 0 || dim < 1 || value_dim < 1)
        refuse("Attention needs at least one head and channel, and query heads in a multiple of the " +
               std::to_string(kv_heads) + " key/value heads.");
    check_shape(out, "out", {queries, heads, value_dim});
    check_contiguous(out, "out");
    check_shape(lse, "lse", {queries, heads});
    check_contiguous(lse, "lse");
    if (queries > 0 && heads > 1 && q.stride(1) != dim) refuse("q must have its heads next to each other.");
    const Mask mask = mask_of(mask_kind, first_query, first_key, window, queries, depths, ancestors);
    AttentionPlan& plan = scratch_plan;
    plan.reset({heads, kv_heads, dim, value_dim, scale, softcap}, Pool::get().size());
    if (length > 0)
        plan.add_visit({floats(q), stride_of(q, 0), keys.data(), values.data(), stride_of(keys, 0), stride_of(keys, 1),
                        stride_of(values, 0), stride_of(values, 1), length, number, mask});
    plan.add_segment({queries, 0, plan.num_visits(), floats_out(out), heads * value_dim, floats_out(lse)});
    plan.finish(scratch_room);
    nb::gil_scoped_release free;
    const double work = 2.0 * double(queries) * double(heads) * double(length) * double(dim);
    Pool::get().run([&](Team& team) { plan.run(team); }, work);
}

void merge(const ConstArray& out_a, const ConstArray& lse_a, const ConstArray& out_b, const ConstArray& lse_b,
           const Array& out, const Array& lse) {
    check_shape(out_a, "out_a", {-1, -1});
    const int64_t rows = int64_t(out_a.shape(0)), dim = int64_t(out_a.shape(1));
    check_shape(out_b, "out_b", {rows, dim});
    check_shape(out, "out", {rows, dim});
    check_shape(lse_a, "lse_a", {rows});
    check_shape(lse_b, "lse_b", {rows});
    check_shape(lse, "lse", {rows});
    check_fp32(out_a, "out_a");
    check_fp32(out_b, "out_b");
    check_fp32(lse_a, "lse_a");
    check_fp32(lse_b, "lse_b");
    check_fp32(out, "out");
    check_fp32(lse, "lse");
    const int64_t lda = stride_of(out_a, 0), ldb = stride_of(out_b, 0), ldo = stride_of(out, 0);
    for (int64_t r = 0; r < rows; ++r) {
        const float a = floats(lse_a)[r], b = floats(lse_b)[r], nothing = -__builtin_inff();
        float top = a > b || a != a ? a : b;
        if (top == nothing) top = 0.0f;
        const float shift[2] = {a - top, b - top};
        float weight[2];
        kernels().exp(shift, 2, weight);
        const float total = weight[0] + weight[1];
        const float* from_a = floats(out_a) + r * lda;
        const float* from_b = floats(out_b) + r * ldb;
        float* to = floats_out(out) + r * ldo;
        const float divisor = total == 0.0f ? 1.0f : total;
        for (int64_t c = 0; c < dim; ++c) to[c] = (from_a[c] * weight[0] + from_b[c] * weight[1]) / divisor;
        floats_out(lse)[r] = total == 0.0f ? nothing : float(double(top) + std::log(double(total)));
    }
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("partial_attention", &partial_attention, "q"_a, "keys"_a, "values"_a, "scale"_a, "mask_kind"_a,
          "first_query"_a, "first_key"_a, "window"_a, "softcap"_a, "depths"_a.none(), "ancestors"_a.none(), "out"_a,
          "lse"_a);
    m.def("merge", &merge);
}

}  // namespace plait
