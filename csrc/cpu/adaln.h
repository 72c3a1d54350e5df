// adaln_modulate: LayerNorm over channels without affine, then * (1 + scale) + shift. One pass over memory: a row
// of channels stays in the first-level cache between its statistics and its output. Included inside the namespace
// of one instruction set (see kernels.cpp).

template <class T>
static void adaln_row(const T* x, const T* shift, const T* scale, T* y, int64_t channels, acc_t<T> eps) {
    using A = acc_t<T>;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < channels; ++c) sum += load(x + c);
    const A mean = sum / static_cast<A>(channels);
    // Two passes: E[x^2] - E[x]^2 loses every digit once |mean| is far above the deviation.
    A squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < channels; ++c) {
        const A centred = load(x + c) - mean;
        squares += centred * centred;
    }
    const A rstd = A(1) / sqrt_of(squares / static_cast<A>(channels) + eps);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
        const A normalised = (load(x + c) - mean) * rstd;
        store(y + c, normalised * (A(1) + load(scale + c)) + load(shift + c));
    }
}

template <class T>
static void adaln_modulate_typed(const AdalnArgs& a, int threads) {
    const T* x = static_cast<const T*>(a.x);
    const T* shift = static_cast<const T*>(a.shift);
    const T* scale = static_cast<const T*>(a.scale);
    T* y = static_cast<T*>(a.y);
    const int64_t total = a.images * a.rows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < total; ++row) {
        const int64_t image = row / a.rows;
        adaln_row(x + row * a.channels, shift + image * a.shift_stride, scale + image * a.scale_stride,
                  y + row * a.channels, a.channels, static_cast<acc_t<T>>(a.eps));
    }
}

static void adaln_modulate(Dtype dtype, const AdalnArgs& a, int threads) {
    switch (dtype) {
        case Dtype::float32: return adaln_modulate_typed<float>(a, threads);
        case Dtype::float64: return adaln_modulate_typed<double>(a, threads);
        case Dtype::bfloat16: return adaln_modulate_typed<bf16>(a, threads);
        case Dtype::float16: return adaln_modulate_typed<_Float16>(a, threads);
    }
}
