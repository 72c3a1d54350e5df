// The table behind GELU in bfloat16, computed when the library is loaded. Compiled for the base instruction set.
#include <cmath>

#include "dico/cpu.h"

namespace dico::cpu {
namespace {

constexpr double kPi = 3.14159265358979323846;

// Newton's form through Chebyshev's points of [-1/2, 1/2], multiplied out.
template <class F>
void interpolate(F f, float (&terms)[GeluTable::kTerms][GeluTable::kSegments]) {
    constexpr int n = GeluTable::kTerms;
    double at[n];
    for (int k = 0; k < n; ++k) at[k] = 0.5 * std::cos(kPi * (2 * k + 1) / (2 * n));
    for (int segment = 0; segment < GeluTable::kSegments; ++segment) {
        double difference[n], sum[n] = {};
        for (int k = 0; k < n; ++k) difference[k] = f((segment + at[k]) / GeluTable::kPerUnit);
        for (int order = 1; order < n; ++order)
            for (int k = n - 1; k >= order; --k)
                difference[k] = (difference[k] - difference[k - 1]) / (at[k] - at[k - order]);
        for (int k = n - 1; k >= 0; --k) {  // sum = sum * (v - at[k]) + difference[k]
            for (int i = n - 1; i > 0; --i) sum[i] = sum[i - 1] - at[k] * sum[i];
            sum[0] = difference[k] - at[k] * sum[0];
        }
        for (int i = 0; i < n; ++i) terms[i][segment] = static_cast<float>(sum[i]);
    }
}

GeluTable filled() {
    const auto tail = [](double m) { return 0.5 * std::erfc(m / std::sqrt(2.0)); };
    GeluTable table;
    interpolate(tail, table.tail);
    interpolate([&](double m) { return tail(m) - m * std::exp(-0.5 * m * m) / std::sqrt(2 * kPi); }, table.slope);
    return table;
}

}  // namespace

extern const GeluTable gelu_table;
const GeluTable gelu_table = filled();

}  // namespace dico::cpu
