// GELU in its exact form, x * Phi(x), and its derivative Phi(x) + x * phi(x). Included inside the namespace of one
// instruction set.

// 2^v for -126 < v <= 0, relative error 1.3e-7.
DICO_INLINE vfloat power_of_two(vfloat v) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const vfloat shifted = v + kRound;
    const vfloat f = v - (shifted - kRound);
    // Interpolates 2^f at Chebyshev's points of [-1/2, 1/2].
    vfloat p = f * 0.00133908634f + 0.00967603192f;
    p = p * f + 0.0555035711f;
    p = p * f + 0.240221075f;
    p = p * f + 0.693147188f;
    p = p * f + 1.00000008f;
    return (vfloat)((vuint)p + ((vuint)shifted << 23));
}

// 1 / v for v of 1 to 1e3, or NaN. Two units in the last place: a division would take half of GELU's time.
DICO_INLINE vfloat reciprocal(vfloat v) {
#if defined(__AVX512F__)
    const vfloat guess = (vfloat)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
    return guess + guess * (1.0f - v * guess);
#else
    return 1.0f / v;
#endif
}

// |x|, held where Phi(-|x|) is nothing beside x and its exponential is still a normal number: so infinities meet no
// zero. A NaN stays one.
DICO_INLINE vfloat magnitude_of(vfloat x) {
    const vfloat m = (vfloat)((vint)x & 0x7fffffff);
    return m > 13.0f ? vfloat{} + 13.0f : m;
}
DICO_INLINE vdouble magnitude_of(vdouble x) {
    const vdouble m = x < 0.0 ? -x : x;
    return m > 37.0 ? vdouble{} + 37.0 : m;
}

// Phi(-m) for m >= 0, and exp(-m^2 / 2) which the density needs too. Abramowitz and Stegun 7.1.26, an error of at
// most 1.5e-7 in erf; as the tail, so nothing cancels where it is small.
DICO_INLINE vfloat upper_tail(vfloat m, vfloat& bell) {
    constexpr float kP = 0.3275911f * 0.70710678f;  // its argument is m / sqrt(2)
    const vfloat t = reciprocal(m * kP + 1.0f);
    bell = power_of_two(m * m * -0.72134752f);  // log2(e) / 2
    vfloat p = t * (0.5f * 1.061405429f) - 0.5f * 1.453152027f;
    p = p * t + 0.5f * 1.421413741f;
    p = p * t - 0.5f * 0.284496736f;
    p = p * t + 0.5f * 0.254829592f;
    return p * t * bell;
}
DICO_INLINE vdouble upper_tail(vdouble m, vdouble& bell) {
    vdouble tail;
    for (int i = 0; i < kLanes<double>; ++i) {
        tail[i] = 0.5 * erfc(0.70710678118654752440 * m[i]);
        bell[i] = exp(-0.5 * m[i] * m[i]);
    }
    return tail;
}

// x * Phi(x), as max(x, 0) less what the tail takes: one rounding where the result is large.
template <class V>
DICO_INLINE V exact_gelu(V x) {
    V bell;
    const V m = magnitude_of(x);
    const V loss = m * upper_tail(m, bell);
    return (x > 0 ? x : V{}) - loss;
}
// GELU and its slope, which share the tail. The slope at -m, and 1 less that at m.
template <class V>
DICO_INLINE V exact_gelu_with_slope(V x, V& slope) {
    using A = decltype(x[0] + x[0]);
    constexpr A kDensity = static_cast<A>(0.39894228040143267794);  // 1 / sqrt(2 pi)
    V bell;
    const V m = magnitude_of(x);
    const V tail = upper_tail(m, bell);
    const V below = tail - m * bell * kDensity;
    slope = x < 0 ? below : 1 - below;
    return (x > 0 ? x : V{}) - m * tail;
}

// For bfloat16 the tail and the slope come out of a table of cubics, which costs a third: within 3e-7 of exact, and
// within a fifth of bfloat16's rounding where they are small.
template <class T>
struct ByTable {
    static constexpr bool value = false;
};
#if defined(__AVX512F__)
template <>
struct ByTable<bf16> {
    static constexpr bool value = true;
};

struct Segment {
    vfloat index, at;  // the index in the low bits
};
DICO_INLINE Segment segment_of(vfloat m) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
    const vfloat index = m * GeluTable::kPerUnit + kRound;
    return {index, m * GeluTable::kPerUnit - (index - kRound)};
}
DICO_INLINE vfloat cubic(const float (&terms)[GeluTable::kTerms][GeluTable::kSegments], Segment s) {
    vfloat term[GeluTable::kTerms];
    for (int i = 0; i < GeluTable::kTerms; ++i)
        term[i] = (vfloat)_mm512_permutex2var_ps((__m512)vload(terms[i]), (__m512i)s.index,
                                                 (__m512)vload(terms[i] + kLanes<float>));
    return ((term[3] * s.at + term[2]) * s.at + term[1]) * s.at + term[0];
}
#endif

// Of values that are, or will be, of type T.
template <class T>
DICO_INLINE vec_t<T> gelu_with_slope(vec_t<T> x, vec_t<T>& slope) {
#if defined(__AVX512F__)
    if constexpr (ByTable<T>::value) {
        const vfloat size = (vfloat)((vint)x & 0x7fffffff);
        const vfloat m = size > GeluTable::kEnd ? vfloat{} + GeluTable::kEnd : size;  // a NaN stays one
        const Segment s = segment_of(m);
        const vfloat below = cubic(gelu_table.slope, s);
        slope = x < 0 ? below : 1 - below;
        const vfloat loss = m * cubic(gelu_table.tail, s);
        return (x > 0 ? x : vfloat{}) - (size > GeluTable::kEnd ? vfloat{} : loss);  // 6e-9 at the end
    }
#endif
    return exact_gelu_with_slope(x, slope);
}
template <class T>
DICO_INLINE vec_t<T> gelu(vec_t<T> x) {
    vec_t<T> slope;
    if constexpr (ByTable<T>::value) return gelu_with_slope<T>(x, slope);
    return exact_gelu(x);
}
template <class T>
DICO_INLINE vec_t<T> gelu_slope(vec_t<T> x) {
    vec_t<T> slope;
    gelu_with_slope<T>(x, slope);
    return slope;
}
