// Every CPU kernel, compiled once per instruction set: CMake gives each copy its -march and DICO_ISA, the name of
// the namespace all of it lives in. No standard library templates here: they would be shared across the copies.
#include <math.h>
#include <stdint.h>

#include "dico/cpu.h"

#ifndef DICO_ISA
#error "DICO_ISA must name the instruction set this copy is compiled for"
#endif
#define DICO_STRING_(x) #x
#define DICO_STRING(x) DICO_STRING_(x)

namespace dico::cpu::DICO_ISA {

static inline float sqrt_of(float v) { return __builtin_sqrtf(v); }
static inline double sqrt_of(double v) { return __builtin_sqrt(v); }

#include "convert.h"
// In the order of their files' names.
#include "adaln.h"

extern const Kernels table;
const Kernels table = {DICO_STRING(DICO_ISA), adaln_modulate};

}  // namespace dico::cpu::DICO_ISA
