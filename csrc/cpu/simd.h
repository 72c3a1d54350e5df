// One vector of channels in the type that arithmetic is done in, for every element type and instruction set.
// Included inside the namespace of one instruction set: an inline function shared between translation units that
// were compiled for different processors would be merged by the linker into whichever copy it met first.

#if defined(__AVX512F__)
#define DICO_VECTOR_BYTES 64
#elif defined(__AVX__)
#define DICO_VECTOR_BYTES 32
#else
#define DICO_VECTOR_BYTES 16
#endif

struct bf16 {
    uint16_t bits;
};
// By integer operations: compilers before GCC 12, and GCC 12 for Arm, have no _Float16 in C++.
struct fp16 {
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

template <class A>
struct vector_of;
template <>
struct vector_of<float> {
    typedef float type __attribute__((vector_size(DICO_VECTOR_BYTES)));
    typedef uint32_t bits __attribute__((vector_size(DICO_VECTOR_BYTES)));
    typedef int32_t integer __attribute__((vector_size(DICO_VECTOR_BYTES)));
};
template <>
struct vector_of<double> {
    typedef double type __attribute__((vector_size(DICO_VECTOR_BYTES)));
};
template <class A>
using vec = typename vector_of<A>::type;
template <class A>
constexpr int lanes = DICO_VECTOR_BYTES / sizeof(A);

typedef uint16_t half_bits __attribute__((vector_size(DICO_VECTOR_BYTES / 2)));

// How many lanes of a vector are there: all, or the last few channels.
struct All {};
struct First {
    int count;
};

template <class V, class T>
static inline V copy_in(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

static inline vec<float> load(const float* p, All) { return copy_in<vec<float>>(p); }
static inline vec<double> load(const double* p, All) { return copy_in<vec<double>>(p); }
static inline vec<float> load(const bf16* p, All) {
    const auto wide = __builtin_convertvector(copy_in<half_bits>(p), vector_of<float>::bits);
    return (vec<float>)(wide << 16);
}
static inline vec<float> load(const fp16* p, All) {
    using bits = vector_of<float>::bits;
    const bits half = __builtin_convertvector(copy_in<half_bits>(p), bits);
    const bits magnitude = (half & 0x7fffu) << 13;
    const bits scaled = (bits)((vec<float>)magnitude * 0x1p112f);  // exponents rebiased; exact, subnormals too
    const bits value = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : scaled;
    return (vec<float>)(value | ((half & 0x8000u) << 16));
}

static inline void store(float* p, vec<float> v, All) { __builtin_memcpy(p, &v, sizeof v); }
static inline void store(double* p, vec<double> v, All) { __builtin_memcpy(p, &v, sizeof v); }
static inline void store(bf16* p, vec<float> v, All) {
    using bits = vector_of<float>::bits;
    const bits wide = (bits)v;
    const bits nearest_even = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    const bits quiet_nan = (wide >> 16) | 0x40u;  // rounding up could carry a NaN into infinity or zero
    const half_bits narrow = __builtin_convertvector((v != v) ? quiet_nan : nearest_even, half_bits);
    __builtin_memcpy(p, &narrow, sizeof narrow);
}
static inline void store(fp16* p, vec<float> v, All) {
    using bits = vector_of<float>::bits;
    const bits wide = (bits)v, magnitude = wide & 0x7fffffffu;
    const bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 1/2, whose last bit is fp16's smallest subnormal, rounds to it.
    const bits subnormal = (bits)((vec<float>)magnitude + 0.5f) - 0x3f000000u;
    bits half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? (half & 0u) | 0x7c00u : half;  // beyond the largest: infinity
    half = magnitude > 0x7f800000u ? (half & 0u) | 0x7e00u : half;
    const half_bits narrow = __builtin_convertvector(half | ((wide >> 16) & 0x8000u), half_bits);
    __builtin_memcpy(p, &narrow, sizeof narrow);
}

// The missing lanes read as zero and are not written.
template <class T>
static inline vec<acc_t<T>> load(const T* p, First some) {
    T padded[lanes<acc_t<T>>];
    __builtin_memset(padded, 0, sizeof padded);
    __builtin_memcpy(padded, p, some.count * sizeof(T));
    return load(padded, All{});
}
template <class T>
static inline void store(T* p, vec<acc_t<T>> v, First some) {
    T whole[lanes<acc_t<T>>];
    store(whole, v, All{});
    __builtin_memcpy(p, whole, some.count * sizeof(T));
}

// v with its missing lanes zero, for sums of something that is not zero where its inputs are.
template <class A>
static inline vec<A> only(vec<A> v, All) {
    return v;
}
template <class A>
static inline vec<A> only(vec<A> v, First some) {
    for (int i = some.count; i < lanes<A>; ++i) v[i] = 0;
    return v;
}

template <class A>
static inline vec<A> all(A value) {
    return vec<A>{} + value;
}

// Lanes added from first to last: the order is part of the result.
template <class A>
static inline A sum(vec<A> v) {
    A total = 0;
    for (int i = 0; i < lanes<A>; ++i) total += v[i];
    return total;
}

// body(channel, All or First) for every vector of a row of channels.
template <class A, class Body>
static inline __attribute__((always_inline)) void for_channels(int64_t channels, Body body) {
    int64_t c = 0;
    for (; c + lanes<A> <= channels; c += lanes<A>) body(c, All{});
    if (c < channels) body(c, First{static_cast<int>(channels - c)});
}

template <class A, class Some>
static inline void add(A* target, vec<A> v, Some n) {
    store(target, load(target, n) + v, n);
}

// A pointer moved on, or null for an argument that is absent.
template <class T>
static inline const T* offset(const void* base, int64_t elements) {
    return base ? static_cast<const T*>(base) + elements : nullptr;
}

// Work is cut by shape, never by the number of threads, so that partial sums and their order are the shape's.
template <class Body>
static inline void parallel(int64_t units, int threads, Body body) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < units; ++unit) body(unit);
}
