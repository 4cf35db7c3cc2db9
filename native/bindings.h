// The parts of the module, each bound in a file of its own.
#pragma once

#include <nanobind/nanobind.h>

namespace plait {

void bind_packed(nanobind::module_& m);
void bind_rows(nanobind::module_& m);
void bind_grid(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);
void bind_program(nanobind::module_& m);

}  // namespace plait
