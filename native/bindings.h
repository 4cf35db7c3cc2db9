// The parts of the module, each bound in a file of its own.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>

#include "arrays.h"
#include "attention.h"

namespace plait {

void bind_additive(nanobind::module_& m);
void bind_adapter(nanobind::module_& m);
void bind_packed(nanobind::module_& m);
void bind_rows(nanobind::module_& m);
void bind_grid(nanobind::module_& m);
void bind_bits(nanobind::module_& m);
void bind_stack(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_codes(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);
void bind_program(nanobind::module_& m);

// The mask of a call's arguments, checked.
Mask mask_of(int mask_kind, int64_t first_query, int64_t first_key, int64_t window, int64_t queries,
             const std::optional<ConstArray>& depths, const std::optional<ConstArray>& ancestors);

}  // namespace plait
