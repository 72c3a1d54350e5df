// Chooses the table of CPU kernels for the processor at hand. Compiled for the base instruction set.
#include <atomic>
#include <stdexcept>

#include "dico/cpu.h"

namespace dico::cpu {

#ifdef DICO_HAS_ISA_v4bf16
namespace v4bf16 {
extern const Kernels table;
}
#endif
#ifdef DICO_HAS_ISA_v4
namespace v4 {
extern const Kernels table;
}
#endif
#ifdef DICO_HAS_ISA_v3
namespace v3 {
extern const Kernels table;
}
#endif
namespace base {
extern const Kernels table;
}

namespace {

struct Candidate {
    const Kernels* table;
    bool runs_here;
};

#if defined(__x86_64__)
bool has_v3() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
           __builtin_cpu_supports("movbe");
}
bool has_v4() {
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
bool has_v4bf16() { return has_v4() && __builtin_cpu_supports("avx512bf16"); }
#endif

const std::vector<Candidate>& candidates() {
    static const std::vector<Candidate> all = {
#ifdef DICO_HAS_ISA_v4bf16
        {&v4bf16::table, has_v4bf16()},
#endif
#ifdef DICO_HAS_ISA_v4
        {&v4::table, has_v4()},
#endif
#ifdef DICO_HAS_ISA_v3
        {&v3::table, has_v3()},
#endif
        {&base::table, true},
    };
    return all;
}

const Kernels* best() {
    for (const Candidate& c : candidates())
        if (c.runs_here) return c.table;
    return &base::table;
}

std::atomic<const Kernels*>& selected() {
    static std::atomic<const Kernels*> table{best()};
    return table;
}

std::string joined(const std::vector<std::string>& names) {
    std::string out;
    for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
    return out;
}

}  // namespace

int64_t grain = 32768;

std::vector<std::string> compiled_isas() {
    std::vector<std::string> names;
    for (const Candidate& c : candidates()) names.emplace_back(c.table->isa);
    return names;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Candidate& c : candidates())
        if (c.runs_here) names.emplace_back(c.table->isa);
    return names;
}

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

void select_isa(const std::string& name) {
    for (const Candidate& c : candidates())
        if (c.runs_here && name == c.table->isa) {
            selected().store(c.table, std::memory_order_relaxed);
            return;
        }
    throw std::invalid_argument("CPU instruction set '" + name + "' cannot run here; accepted: " +
                                joined(available_isas()) + " (compiled in: " + joined(compiled_isas()) + ")");
}

}  // namespace dico::cpu
