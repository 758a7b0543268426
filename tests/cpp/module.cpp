// SPDX-License-Identifier: Apache-2.0
// palmette_primitives.run(body, name, inputs, output, n): arrays are anything with the buffer protocol. The
// caller makes sure that the CPU runs the body and that the arrays are large enough.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "primitives.h"

namespace py = pybind11;

namespace {

palmette::PrimitiveList list_of(const std::string& body) {
  using palmette::Isa;
  if (body == "scalar") return palmette::primitives<Isa::scalar>();
#if defined(__x86_64__)
  if (body == "avx2") return palmette::primitives<Isa::avx2>();
  if (body == "avx2x16") return palmette::primitives<Isa::avx2x16>();
  if (body == "avx512") return palmette::primitives<Isa::avx512>();
#endif
  throw py::value_error("no such body: " + body);
}

void run(const std::string& body, const std::string& name, const std::vector<py::buffer>& inputs,
         const py::buffer& output, int64_t n) {
  std::vector<const void*> in;
  in.reserve(inputs.size());
  for (const py::buffer& buffer : inputs) in.push_back(buffer.request().ptr);
  const palmette::PrimitiveList list = list_of(body);
  for (const palmette::Primitive* p = list.begin; p != list.end; ++p) {
    if (name == p->name) return p->run(in.data(), output.request(true).ptr, n);
  }
  throw py::key_error("no such primitive: " + name);
}

std::vector<std::string> names(const std::string& body) {
  std::vector<std::string> result;
  const palmette::PrimitiveList list = list_of(body);
  for (const palmette::Primitive* p = list.begin; p != list.end; ++p) result.emplace_back(p->name);
  return result;
}

}  // namespace

PYBIND11_MODULE(palmette_primitives, m) {
  m.def("run", &run);
  m.def("names", &names);
  m.def("lanes", [](const std::string& body) { return list_of(body).lanes; });
}
