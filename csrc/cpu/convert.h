// Loads and stores of every element type in the type that arithmetic is done in.
// Included inside the namespace of one instruction set: an inline function shared between translation units that
// were compiled for different processors would be merged by the linker into whichever copy it met first.

struct bf16 {
    uint16_t bits;
};

// Statistics and accumulation: float for every type but double.
template <class T>
struct accumulate {
    using type = float;
};
template <>
struct accumulate<double> {
    using type = double;
};
template <class T>
using acc_t = typename accumulate<T>::type;

static inline float load(const float* p) { return *p; }
static inline double load(const double* p) { return *p; }
static inline float load(const _Float16* p) { return static_cast<float>(*p); }
static inline float load(const bf16* p) {
    const uint32_t wide = static_cast<uint32_t>(p->bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
}

static inline void store(float* p, float v) { *p = v; }
static inline void store(double* p, double v) { *p = v; }
static inline void store(_Float16* p, float v) { *p = static_cast<_Float16>(v); }
static inline void store(bf16* p, float v) {
    uint32_t wide;
    __builtin_memcpy(&wide, &v, sizeof wide);
    const uint32_t nearest_even = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (wide >> 16) | 0x40u;  // rounding up could carry a NaN into infinity or zero
    const bool is_nan = (wide & 0x7fffffffu) > 0x7f800000u;
    p->bits = static_cast<uint16_t>(is_nan ? quiet_nan : nearest_even);
}
