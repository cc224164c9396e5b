// Which instruction set the kernels use: the best one that the processor and the operating system offer, or the one
// that the environment variable TRACE_KERNELS_ISA names.
#pragma once

#include <string>
#include <vector>

namespace tk {

enum class Isa : int { portable, avx2, avx512, avx512bf16, amx };

const char* isa_name(Isa isa);

// What was compiled in and runs here, slowest first.
std::vector<Isa> available_isas();

// The choice; the environment is read on every call, so a test can change it. Throws std::invalid_argument when the
// variable names an instruction set that is unknown, or absent here.
Isa current_isa();

}  // namespace tk
