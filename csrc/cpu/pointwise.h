// What stands between two 1x1 convolutions: GELU, with the sums that global response normalisation and the first
// convolution's bias want of it. The convolutions themselves are gemm.h's or the library's. Included inside the
// namespace of one instruction set.

template <bool Squares, class T>
static void gelu_typed(const GeluArgs& a, int threads) {
    using A = acc_t<T>;
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    A* partial = static_cast<A*>(a.partial);
    each_block(a, threads, [=](int64_t image, int64_t first, int64_t end, int64_t block) {
        A* squares = partial + block * a.channels;
        if constexpr (Squares)
            for (int64_t c = 0; c < a.channels; ++c) squares[c] = 0;
        each_row(image * a.rows + first, image * a.rows + end, [&](int64_t row) {
            each_vector<T>(a.channels, [&](int64_t c, auto lanes) {
                const int64_t at = row * a.channels + c;
                vstore(y + at, gelu<T>(vload(x + at, lanes)), lanes);
                // Of the rounded values: those are what the norm belongs to.
                if constexpr (Squares) {
                    const vec_t<T> stored = vload(y + at, lanes);
                    vstore(squares + c, vload(squares + c, lanes) + stored * stored, lanes);
                }
            });
        });
    });
    if constexpr (Squares) sum_blocks(partial, a.channels, static_cast<A*>(a.sums), a, threads);
}

template <bool Affine, bool Keep, class T>
static void gelu_backward_typed(const GeluBackwardArgs& a, int threads) {
    using A = acc_t<T>;
    using V = vec_t<T>;
    const T* x = static_cast<const T*>(a.x);
    const T* dy = static_cast<const T*>(a.dy);
    T* dx = static_cast<T*>(a.dx);
    T* y = static_cast<T*>(a.y);
    A* partial = static_cast<A*>(a.partial);
    each_block(a, threads, [=](int64_t image, int64_t first, int64_t end, int64_t block) {
        const A* s = static_cast<const A*>(a.s) + (Affine ? image * a.channels : 0);
        const A* r = static_cast<const A*>(a.r) + (Affine ? image * a.channels : 0);
        A* sums = partial + block * a.channels;
        for (int64_t c = 0; c < a.channels; ++c) sums[c] = 0;
        each_row(image * a.rows + first, image * a.rows + end, [&](int64_t row) {
            each_vector<T>(a.channels, [&](int64_t c, auto lanes) {
                const int64_t at = row * a.channels + c;
                V slope, d = vload(dy + at, lanes);
                const V out = gelu_with_slope<T>(vload(x + at, lanes), slope);
                if constexpr (Affine) d = d * vload(s + c, lanes) + out * vload(r + c, lanes);
                d *= slope;
                vstore(dx + at, d, lanes);
                if constexpr (Keep) vstore(y + at, out, lanes);
                vstore(sums + c, vload(sums + c, lanes) + d, lanes);
            });
        });
    });
    sum_blocks(partial, a.channels, static_cast<A*>(a.sums), a, threads);
}

static void gelu_forward(Dtype dtype, const GeluArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        a.sums ? gelu_typed<true, T>(a, threads) : gelu_typed<false, T>(a, threads);
    });
}
static void gelu_backward(Dtype dtype, const GeluBackwardArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (a.s)
            a.y ? gelu_backward_typed<true, true, T>(a, threads) : gelu_backward_typed<true, false, T>(a, threads);
        else
            a.y ? gelu_backward_typed<false, true, T>(a, threads)
                : gelu_backward_typed<false, false, T>(a, threads);
    });
}
