// GELU in its exact form, x * Phi(x), and its derivative Phi(x) + x * phi(x).
// float: erf by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7); double: the library's erf.

// 2^y for y in [-126, 0], to a few ulp: y split into a whole part, which goes into the exponent, and a fraction in
// [-1/2, 1/2], whose power is a polynomial (Taylor of exp(f ln 2), degree 7).
static inline vec<float> exp2_of(vec<float> y) {
    using integer = vector_of<float>::integer;
    const vec<float> magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const vec<float> whole = (y + magic) - magic;
    const vec<float> f = y - whole;
    vec<float> p = all(1.5252733e-5f);
    p = p * f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    const integer exponent = (__builtin_convertvector(whole, integer) + 127) << 23;
    return p * (vec<float>)exponent;
}

template <class A>
struct Normal {
    vec<A> cdf;  // Phi(x)
    vec<A> pdf;  // phi(x)
};

static inline Normal<float> normal(vec<float> x) {
    const vec<float> half_square = x * x * -0.72134752f;  // -x^2 / 2 in powers of two
    const vec<float> e = exp2_of(half_square < -126.0f ? all(-126.0f) : half_square);
    const vec<float> z = (x < 0.0f ? -x : x) * 0.70710678f;
    const vec<float> t = 1.0f / (1.0f + 0.3275911f * z);
    vec<float> p = all(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vec<float> tail = 0.5f * p * t * e;  // Phi(-|x|)
    return {x < 0.0f ? tail : 1.0f - tail, e * 0.39894228f};
}

static inline Normal<double> normal(vec<double> x) {
    Normal<double> out;
    for (int i = 0; i < lanes<double>; ++i) {
        out.cdf[i] = 0.5 * erfc(-x[i] * 0.70710678118654752440);
        out.pdf[i] = exp(-0.5 * x[i] * x[i]) * 0.39894228040143267794;
    }
    return out;
}

template <class V>
static inline V gelu(V x) {
    return x * normal(x).cdf;
}
template <class V>
static inline V gelu_derivative(V x) {
    const auto n = normal(x);
    return n.cdf + x * n.pdf;
}
