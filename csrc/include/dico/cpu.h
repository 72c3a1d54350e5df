// The CPU kernels as the rest of the library sees them: one table of functions an instruction set.
#pragma once

#include <string>
#include <vector>

#include "dico/types.h"

namespace dico::cpu {

struct Kernels {
    const char* isa;
    void (*adaln_modulate)(Dtype, const AdalnArgs&, int threads);
};

// Names compiled in that this processor can run, best first.
std::vector<std::string> available_isas();
// Names compiled in, best first.
std::vector<std::string> compiled_isas();
// The table in use: the best available one until select_isa names another.
const Kernels& kernels();
// Throws std::invalid_argument when the name was not compiled in or cannot run here.
void select_isa(const std::string& name);

}  // namespace dico::cpu
