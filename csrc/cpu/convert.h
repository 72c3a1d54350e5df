// Element types, and vectors of the type that arithmetic is done in: loads and stores that convert on the way.
// Included inside the namespace of one instruction set: an inline function shared between translation units that
// were compiled for different processors would be merged by the linker into whichever copy it met first.

#define DICO_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 {
    uint16_t bits;
};
// Where the processor does not, integer operations convert: GCC before 12, and 12 for Arm, have no _Float16 in C++.
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

using vfloat = float __attribute__((vector_size(kVectorBytes)));
using vdouble = double __attribute__((vector_size(kVectorBytes)));
using vint = int32_t __attribute__((vector_size(kVectorBytes)));
using vuint = uint32_t __attribute__((vector_size(kVectorBytes)));
using vhalf = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
struct vector_of;
template <>
struct vector_of<float> {
    using type = vfloat;
};
template <>
struct vector_of<double> {
    using type = vdouble;
};
// The vector that elements of type T are widened to, and its number of lanes.
template <class T>
using vec_t = typename vector_of<acc_t<T>>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(acc_t<T>));

// What the factors of a product are held as: the accumulation type, or bfloat16 where the processor multiplies
// pairs of it.
template <class T>
struct Operand {
    using type = acc_t<T>;
    static constexpr int kPair = 1;
};
#if defined(__AVX512BF16__)
template <>
struct Operand<bf16> {
    using type = bf16;
    static constexpr int kPair = 2;
};
#endif
template <class T>
using operand_t = typename Operand<T>::type;
template <class T>
constexpr int kPair = Operand<T>::kPair;

DICO_INLINE float load(const float* p) { return *p; }
DICO_INLINE double load(const double* p) { return *p; }
DICO_INLINE float load(const bf16* p) {
    const uint32_t wide = static_cast<uint32_t>(p->bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
}

DICO_INLINE vfloat vload(const float* p) {
    vfloat v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
DICO_INLINE vdouble vload(const double* p) {
    vdouble v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
DICO_INLINE vfloat vload(const bf16* p) {
    vhalf narrow;
    __builtin_memcpy(&narrow, p, sizeof narrow);
    return (vfloat)(__builtin_convertvector(narrow, vuint) << 16);
}
#if defined(__AVX512F__)
DICO_INLINE vfloat vload(const fp16* p) {
    return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif defined(__F16C__)
DICO_INLINE vfloat vload(const fp16* p) {
    return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#else
DICO_INLINE vfloat vload(const fp16* p) {
    vhalf narrow;
    __builtin_memcpy(&narrow, p, sizeof narrow);
    const vuint half = __builtin_convertvector(narrow, vuint);
    const vuint magnitude = (half & 0x7fffu) << 13;
    const vuint scaled = (vuint)((vfloat)magnitude * 0x1p112f);  // exponents rebiased; exact, subnormals too
    const vuint value = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : scaled;
    return (vfloat)(value | ((half & 0x8000u) << 16));
}
#endif
DICO_INLINE float load(const fp16* p) {
    fp16 first[kVectorBytes / 4] = {*p};
    return vload(first)[0];
}

DICO_INLINE void vstore(float* p, vfloat v) { __builtin_memcpy(p, &v, sizeof v); }
DICO_INLINE void vstore(double* p, vdouble v) { __builtin_memcpy(p, &v, sizeof v); }
#if defined(__AVX512F__)
DICO_INLINE void vstore(fp16* p, vfloat v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
DICO_INLINE void vstore(fp16* p, vfloat v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
DICO_INLINE void vstore(fp16* p, vfloat v) {
    const vuint wide = (vuint)v, magnitude = wide & 0x7fffffffu;
    const vuint normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 1/2, whose last bit is fp16's smallest subnormal, rounds to it.
    const vuint subnormal = (vuint)((vfloat)magnitude + 0.5f) - 0x3f000000u;
    vuint half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? (half & 0u) | 0x7c00u : half;  // beyond the largest: infinity
    half = magnitude > 0x7f800000u ? (half & 0u) | 0x7e00u : half;
    const vhalf narrow = __builtin_convertvector(half | ((wide >> 16) & 0x8000u), vhalf);
    __builtin_memcpy(p, &narrow, sizeof narrow);
}
#endif
#if defined(__AVX512BF16__)
// The processor's own rounding takes subnormal numbers, results too, for zero, as its products do.
DICO_INLINE void vstore(bf16* p, vfloat v) {
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &narrow, sizeof narrow);
}
#else
DICO_INLINE void vstore(bf16* p, vfloat v) {
    const vuint wide = (vuint)v;
    const vuint nearest_even = wide + 0x7fffu + ((wide >> 16) & 1u);
    const vuint quiet_nan = wide | 0x400000u;  // rounding up could carry a NaN into infinity or zero
    const vuint chosen = v == v ? nearest_even : quiet_nan;
    const vhalf narrow = __builtin_convertvector(chosen >> 16, vhalf);
    __builtin_memcpy(p, &narrow, sizeof narrow);
}
#endif

// Channels come in whole vectors and perhaps a last, partial one. A kernel's body is written once over a number of
// lanes that is either Whole or a count; what a partial load leaves out is zero.
struct Whole {};

template <class T>
DICO_INLINE vec_t<T> vload(const T* p, Whole) {
    return vload(p);
}
template <class T>
DICO_INLINE vec_t<T> vload(const T* p, int lanes) {
    T padded[kLanes<T>] = {};
    __builtin_memcpy(padded, p, lanes * sizeof(T));
    return vload(padded);
}
template <class T>
DICO_INLINE void vstore(T* p, vec_t<T> v, Whole) {
    vstore(p, v);
}
template <class T>
DICO_INLINE void vstore(T* p, vec_t<T> v, int lanes) {
    T padded[kLanes<T>];
    vstore(padded, v);
    __builtin_memcpy(p, padded, lanes * sizeof(T));
}
// v with the lanes that hold no channel set to zero.
template <class V>
DICO_INLINE V only(V v, Whole) {
    return v;
}
template <class V>
DICO_INLINE V only(V v, int lanes) {
    for (int i = lanes; i < static_cast<int>(sizeof(V) / sizeof v[0]); ++i) v[i] = 0;
    return v;
}

template <class T, class Body>
DICO_INLINE void each_vector(int64_t channels, Body body) {
    int64_t c = 0;
    for (; c + kLanes<T> <= channels; c += kLanes<T>) body(c, Whole{});
    if (c < channels) body(c, static_cast<int>(channels - c));
}

template <class A, int bytes>
struct Sized {
    typedef A type __attribute__((vector_size(bytes)));
};
// By halves: a chain of additions as long as the vector would wait for each of them.
template <class A, int bytes>
DICO_INLINE A lane_sum(typename Sized<A, bytes>::type v) {
    if constexpr (bytes == 2 * sizeof(A)) {
        return v[0] + v[1];
    } else {
        typename Sized<A, bytes / 2>::type low, high;
        __builtin_memcpy(&low, &v, sizeof low);
        __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
        return lane_sum<A, bytes / 2>(low + high);
    }
}
DICO_INLINE float sum_of(vfloat v) { return lane_sum<float, kVectorBytes>(v); }
DICO_INLINE double sum_of(vdouble v) { return lane_sum<double, kVectorBytes>(v); }

template <class T>
struct Element {
    using type = T;
};

// Calls body with the Element of the dtype.
template <class Body>
DICO_INLINE void by_dtype(Dtype dtype, Body body) {
    switch (dtype) {
        case Dtype::float32: return body(Element<float>{});
        case Dtype::float64: return body(Element<double>{});
        case Dtype::bfloat16: return body(Element<bf16>{});
        case Dtype::float16: return body(Element<fp16>{});
    }
}
// With the Element of an unsigned integer of its size: for what moves elements and does not compute with them.
template <class Body>
DICO_INLINE void by_size(Dtype dtype, Body body) {
    switch (dtype) {
        case Dtype::float64: return body(Element<uint64_t>{});
        case Dtype::float32: return body(Element<uint32_t>{});
        default: return body(Element<uint16_t>{});
    }
}
