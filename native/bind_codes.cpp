// Strands that are stored in few bits, and attention over them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "arrays.h"
#include "attention.h"
#include "bindings.h"
#include "bound_codes.h"

namespace plait {

using namespace nb::literals;

namespace {

thread_local AttentionPlan scratch_plan;
thread_local AttentionScratch scratch_room;

struct BoundStored {
    StoredNumbers stored;
    std::vector<ConstArray> arrays;
};

template <class T>
const T* data_of(const ConstArray& array) {
    return static_cast<const T*>(static_cast<const void*>(array.data()));
}

void check_half(const ConstArray& array, const char* name) {
    if (number_of(array, name) != Number::fp16) refuse(std::string(name) + " must be float16.");
    check_contiguous(array, name);
}

int64_t groups_of(int64_t count, int64_t group) { return (count + group - 1) / group; }

BoundStored affine(const ConstArray& codes, const ConstArray& scale, const ConstArray& minimum, int bits,
                   bool is_along_tokens, int64_t group, int64_t skipped, int64_t num_heads, int64_t width) {
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8) refuse("Codes have 2, 3, 4 or 8 bits.");
    if (num_heads < 1 || width < 1 || width > kMostWidth)
        refuse("Codes need at least one head, and 1 to 1024 channels of each.");
    if (group < 1 || group > kLargestGroup || skipped < 0 || skipped >= group)
        refuse("A group has at least one number, and fewer of the first are skipped.");
    check_type<uint8_t>(codes, "codes", "uint8");
    check_shape(codes, "codes", {-1, -1});
    check_contiguous(codes, "codes");
    const int64_t tokens = int64_t(codes.shape(0)), row_bytes = int64_t(codes.shape(1)), channels = num_heads * width;
    if (row_bytes < bits * groups_of(channels, 8)) refuse("codes has rows that are too short for their channels.");
    const int64_t rows = is_along_tokens ? groups_of(tokens + skipped, group) : tokens;
    const int64_t columns = is_along_tokens ? channels : groups_of(channels, group);
    for (const auto* array : {&scale, &minimum}) {
        check_half(*array, "scale and minimum");
        check_shape(*array, "scale and minimum", {rows, columns});
    }
    BoundStored made;
    made.stored.num_heads = num_heads;
    made.stored.tokens = tokens;
    made.stored.width = width;
    made.stored.is_affine = true;
    made.stored.affine = {data_of<uint8_t>(codes), row_bytes, tokens * row_bytes, data_of<uint16_t>(scale),
                          data_of<uint16_t>(minimum), rows, columns, bits, is_along_tokens, group, skipped};
    made.arrays = {codes, scale, minimum};
    return made;
}

BoundStored plain(const ConstArray& numbers) {
    const Number number = number_of(numbers, "numbers");
    check_shape(numbers, "numbers", {-1, -1, -1});
    const int64_t num_heads = int64_t(numbers.shape(0)), tokens = int64_t(numbers.shape(1)), width = int64_t(numbers.shape(2));
    if (num_heads < 1 || width < 1 || width > kMostWidth)
        refuse("Numbers need at least one head, and 1 to 1024 channels of each.");
    const int64_t head_stride = stride_of(numbers, 0), stride = stride_of(numbers, 1);
    if (stride < 0 || head_stride < 0 || (tokens > 1 && stride < width)) refuse("numbers must not overlap.");
    BoundStored made;
    made.stored.num_heads = num_heads;
    made.stored.tokens = tokens;
    made.stored.width = width;
    made.stored.plain = {numbers.data(), head_stride, stride, number};
    made.arrays = {numbers};
    return made;
}

void keep(BoundNumbers& self, const ConstArray& array) { self.arrays.push_back(array); }

void set_outliers(BoundNumbers& self, const ConstArray& starts, const ConstArray& tokens, const ConstArray& channels,
                  const ConstArray& numbers) {
    const StoredNumbers& stored = self.numbers.stored;
    const int64_t num_runs = groups_of(stored.tokens, kKeyChunk) * stored.num_heads;
    check_type<int32_t>(starts, "starts", "int32");
    check_shape(starts, "starts", {num_runs + 1});
    check_type<uint8_t>(tokens, "tokens", "uint8");
    check_shape(tokens, "tokens", {-1});
    const int64_t count = int64_t(tokens.shape(0));
    check_type<int16_t>(channels, "channels", "int16");
    check_shape(channels, "channels", {count});
    check_half(numbers, "outliers");
    check_shape(numbers, "outliers", {count});
    const int32_t* from = data_of<int32_t>(starts);
    const uint8_t* of = data_of<uint8_t>(tokens);
    const int16_t* places = data_of<int16_t>(channels);
    bool is_right = from[0] == 0 && from[num_runs] == count;
    for (int64_t run = 0; run < num_runs; ++run) is_right = is_right && from[run] <= from[run + 1];
    for (int64_t i = 0; i < count; ++i) is_right = is_right && places[i] >= 0 && places[i] < stored.width;
    for (int64_t run = 0; is_right && run < num_runs; ++run) is_right = std::is_sorted(of + from[run], of + from[run + 1]);
    if (!is_right) refuse("Outliers need runs in order, the tokens of each in order, and channels of the head.");
    self.numbers.outliers = {from, of, places, data_of<uint16_t>(numbers), count};
    for (const auto* array : {&starts, &tokens, &channels, &numbers}) keep(self, *array);
}

void set_factor(BoundNumbers& self, const BoundStored& tokens, const ConstArray& channels) {
    const StoredNumbers& stored = self.numbers.stored;
    if (tokens.stored.num_heads != stored.num_heads || tokens.stored.tokens != stored.tokens)
        refuse("A low-rank part needs as many heads and tokens as the numbers.");
    check_half(channels, "channels");
    check_shape(channels, "channels", {stored.num_heads, stored.width, tokens.stored.width});
    self.numbers.factor = tokens.stored;
    self.numbers.factor_channels = data_of<uint16_t>(channels);
    self.arrays.insert(self.arrays.end(), tokens.arrays.begin(), tokens.arrays.end());
    keep(self, channels);
}

void set_kept(BoundNumbers& self, const ConstArray& kept, int64_t dim, const std::optional<ConstArray>& means) {
    const StoredNumbers& stored = self.numbers.stored;
    check_type<int16_t>(kept, "kept", "int16");
    check_shape(kept, "kept", {stored.num_heads, stored.width});
    check_contiguous(kept, "kept");
    if (dim < stored.width || dim > kMostWidth) refuse("A head has at least the kept channels, and at most 1024.");
    const int16_t* places = data_of<int16_t>(kept);
    for (int64_t i = 0; i < stored.num_heads * stored.width; ++i)
        if (places[i] < 0 || places[i] >= dim) refuse("kept must be channels of a head.");
    self.numbers.kept = places;
    self.numbers.dim = dim;
    keep(self, kept);
    self.numbers.means = nullptr;
    if (!means) return;
    check_fp32(*means, "means");
    check_shape(*means, "means", {stored.num_heads, dim});
    check_contiguous(*means, "means");
    self.numbers.means = floats(*means);
    keep(self, *means);
}

// What would describe the same numbers if the `length` bytes from `from` on, in which all of them lie, stood at `to`;
// None where some lie elsewhere.
nb::object description_at(const BoundNumbers& self, int64_t from, int64_t length, int64_t to) {
    CodedNumbers moved = self.numbers;
    bool is_inside = true;
    const auto move = [&](auto*& pointer) {
        if (pointer == nullptr) return;
        const int64_t offset = int64_t(reinterpret_cast<intptr_t>(pointer)) - from;
        is_inside = is_inside && offset >= 0 && offset <= length;
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(intptr_t(to + offset));
    };
    for (StoredNumbers* stored : {&moved.stored, &moved.factor}) {
        move(stored->affine.codes);
        move(stored->affine.scale);
        move(stored->affine.minimum);
        move(stored->plain.data);
    }
    move(moved.factor_channels);
    move(moved.outliers.starts);
    move(moved.outliers.tokens);
    move(moved.outliers.channels);
    move(moved.outliers.numbers);
    move(moved.kept);
    move(moved.means);
    if (!is_inside) return nb::none();
    return nb::bytes(&moved, sizeof moved);
}

void coded_attention(const ConstArray& q, const BoundNumbers& keys, const BoundNumbers& values, int64_t first,
                     int64_t length, float scale, int mask_kind, int64_t first_query, int64_t first_key, int64_t window,
                     float softcap, const std::optional<ConstArray>& depths, const std::optional<ConstArray>& ancestors,
                     const Array& out, const Array& lse) {
    const CodedNumbers &k = keys.numbers, &v = values.numbers;
    check_fp32(q, "q");
    check_fp32(out, "out");
    check_fp32(lse, "lse");
    check_shape(q, "q", {-1, -1, k.dim});
    const int64_t queries = int64_t(q.shape(0)), heads = int64_t(q.shape(1)), kv_heads = k.stored.num_heads;
    if (v.stored.num_heads != kv_heads || v.stored.tokens != k.stored.tokens || heads < 1 || heads % kv_heads != 0)
        refuse("Keys and values need the same heads and tokens, and query heads in a multiple of them.");
    if (first < 0 || length < 0 || first > k.stored.tokens - length)
        refuse("Attention was asked for tokens that are not stored.");
    check_shape(out, "out", {queries, heads, v.dim});
    check_contiguous(out, "out");
    check_shape(lse, "lse", {queries, heads});
    check_contiguous(lse, "lse");
    if (queries > 0 && heads > 1 && q.stride(1) != k.dim) refuse("q must have its heads next to each other.");
    Mask mask = mask_of(mask_kind, first_query, first_key - first, window, queries, depths, ancestors);
    mask.first_shown = first;
    AttentionPlan& plan = scratch_plan;
    plan.reset({heads, kv_heads, k.dim, v.dim, scale, softcap}, Pool::get().size());
    if (length > 0) {
        StrandVisit visit{};
        visit.q = floats(q);
        visit.q_stride = stride_of(q, 0);
        visit.length = first + length;
        visit.mask = mask;
        visit.coded_keys = &k;
        visit.coded_values = &v;
        plan.add_visit(visit);
    }
    plan.add_segment({queries, 0, plan.num_visits(), floats_out(out), heads * v.dim, floats_out(lse)});
    plan.finish(scratch_room);
    nb::gil_scoped_release free;
    const double work = 2.0 * double(queries) * double(heads) * double(length) * double(k.dim);
    Pool::get().run([&](Team& team) { plan.run(team); }, work);
}

}  // namespace

void bind_codes(nb::module_& m) {
    nb::class_<BoundStored>(m, "StoredNumbers")
        .def_static("affine", &affine, "codes"_a, "scale"_a, "minimum"_a, "bits"_a, "along_tokens"_a, "group"_a,
                    "skipped"_a, "num_heads"_a, "width"_a)
        .def_static("plain", &plain, "numbers"_a);
    static_assert(std::is_trivially_copyable_v<CodedNumbers>, "descriptions are copied as bytes");
    nb::class_<BoundNumbers>(m, "CodedNumbers")
        .def("__init__",
             [](BoundNumbers* self, const BoundStored& stored) {
                 new (self) BoundNumbers();
                 self->numbers.stored = stored.stored;
                 self->numbers.dim = stored.stored.width;
                 self->arrays = stored.arrays;
             },
             "stored"_a)
        .def("set_outliers", &set_outliers, "starts"_a, "tokens"_a, "channels"_a, "numbers"_a)
        .def("set_factor", &set_factor, "tokens"_a, "channels"_a)
        .def("thinned",
             [](const BoundNumbers& self, const ConstArray& kept, int64_t dim, const std::optional<ConstArray>& means) {
                 BoundNumbers thin = self;
                 set_kept(thin, kept, dim, means);
                 return thin;
             },
             "kept"_a, "dim"_a, "means"_a.none())
        .def("description_at", &description_at, "from"_a, "length"_a, "to"_a)
        .def("address", [](const BoundNumbers& self) { return int64_t(reinterpret_cast<intptr_t>(&self.numbers)); });
    m.def("coded_attention", &coded_attention, "q"_a, "keys"_a, "values"_a, "first"_a, "length"_a, "scale"_a,
          "mask_kind"_a, "first_query"_a, "first_key"_a, "window"_a, "softcap"_a, "depths"_a.none(),
          "ancestors"_a.none(), "out"_a, "lse"_a);
}

}  // namespace plait
