// The adaLN family: LayerNorm over channels without affine, then * (1 + scale) + shift, and the gated residual that
// precedes it. One pass over memory each way: a few rows of channels stay in the first-level cache between their
// statistics and their output. S is the element type of the residual stream, T that of all else: float32 and a
// 16-bit type under autocast, where the stream keeps its digits. Included inside the namespace of one instruction
// set (see kernels.cpp).

// Two passes: E[x^2] - E[x]^2 loses every digit once |mean| is far above the deviation. What the mean itself lost
// to rounding the second pass finds, as the mean of the deviations; times -rstd that is `offset`, to be added to (x
// - mean) * rstd.
template <class A, int R>
struct Statistics {
    A mean[R], rstd[R], offset[R];
};

template <int R, class T>
DICO_INLINE Statistics<acc_t<T>, R> row_statistics(const T* x, int64_t channels, double eps) {
    using A = acc_t<T>;
    Statistics<A, R> found;
    vec_t<T> sum[R] = {}, left[R] = {}, squares[R] = {};
    each_vector<T>(channels, [&](int64_t c, auto lanes) {
        for (int r = 0; r < R; ++r) sum[r] += vload(x + r * channels + c, lanes);
    });
    for (int r = 0; r < R; ++r) found.mean[r] = sum_of(sum[r]) / static_cast<A>(channels);
    each_vector<T>(channels, [&](int64_t c, auto lanes) {
        for (int r = 0; r < R; ++r) {
            const vec_t<T> centred = only(vload(x + r * channels + c, lanes) - found.mean[r], lanes);
            left[r] += centred;
            squares[r] += centred * centred;
        }
    });
    for (int r = 0; r < R; ++r) {
        const A lost = sum_of(left[r]) / static_cast<A>(channels);
        const A variance = sum_of(squares[r]) / static_cast<A>(channels) - lost * lost;
        found.rstd[r] = A(1) / sqrt_of(variance + static_cast<A>(eps));
        found.offset[r] = -lost * found.rstd[r];
    }
    return found;
}

// y may be of a type of its own; `stride` is the distance of its rows.
template <int R, class S, class T, class Y>
DICO_INLINE void modulate_rows(const S* x, const T* shift, const T* scale, Y* y, int64_t stride, int64_t channels,
                               const Statistics<acc_t<T>, R>& of) {
    using A = acc_t<T>;
    for (int r = 0; r < R; ++r)
        each_vector<T>(channels, [&](int64_t c, auto lanes) {
            const vec_t<T> by = vload(scale + c, lanes) + A(1), plus = vload(shift + c, lanes);
            const vec_t<T> centred = vload(x + r * channels + c, lanes) - of.mean[r];
            const vec_t<T> normalised = centred * of.rstd[r] + of.offset[r];
            vstore(y + r * stride + c, normalised * by + plus, lanes);
        });
}

template <int R, class S, class T>
DICO_INLINE void gate_rows(const S* x, const T* branch, const T* gate, S* y, int64_t channels) {
    for (int r = 0; r < R; ++r)
        each_vector<T>(channels, [&](int64_t c, auto lanes) {
            const int64_t at = r * channels + c;
            vstore(y + at, vload(x + at, lanes) + vload(gate + c, lanes) * vload(branch + at, lanes), lanes);
        });
}

template <class S, class T>
static void adaln_modulate_typed(const AdalnArgs& a, int threads) {
    const S* x = static_cast<const S*>(a.x);
    T* y = static_cast<T*>(a.y);
    acc_t<T>* means = static_cast<acc_t<T>*>(a.mean);
    acc_t<T>* rstds = static_cast<acc_t<T>*>(a.rstd);
    each_block(a, threads, [=](int64_t image, int64_t first, int64_t end, int64_t) {
        const T* shift = static_cast<const T*>(a.shift) + image * a.shift_stride;
        const T* scale = static_cast<const T*>(a.scale) + image * a.scale_stride;
        each_group(image * a.rows + first, image * a.rows + end, [&](int64_t row, auto group) {
            constexpr int R = decltype(group)::value;
            const int64_t at = row * a.channels;
            const auto found = row_statistics<R>(x + at, a.channels, a.eps);
            modulate_rows<R>(x + at, shift, scale, y + at, a.channels, a.channels, found);
            for (int r = 0; r < R; ++r) means[row + r] = found.mean[r], rstds[row + r] = found.rstd[r];
        });
    });
}

template <class S, class T>
static void gated_residual_typed(const GatedArgs& a, int threads) {
    const S* x = static_cast<const S*>(a.x);
    const T* branch = static_cast<const T*>(a.branch);
    S* y = static_cast<S*>(a.y);
    each_block(a, threads, [=](int64_t image, int64_t first, int64_t end, int64_t) {
        const T* gate = static_cast<const T*>(a.gate) + image * a.gate_stride;
        each_row(image * a.rows + first, image * a.rows + end, [&](int64_t row) {
            const int64_t at = row * a.channels;
            gate_rows<1>(x + at, branch + at, gate, y + at, a.channels);
        });
    });
}

// The statistics are those of the rounded y: that is what a reader of y, this op's backward included, can see.
template <class T>
static void gated_residual_adaln_typed(const GatedAdalnArgs& a, int threads) {
    const T* x = static_cast<const T*>(a.x);
    const T* branch = static_cast<const T*>(a.branch);
    T* y = static_cast<T*>(a.y);
    T* h = static_cast<T*>(a.h);
    acc_t<T>* means = static_cast<acc_t<T>*>(a.mean);
    acc_t<T>* rstds = static_cast<acc_t<T>*>(a.rstd);
    each_block(a, threads, [=](int64_t image, int64_t first, int64_t end, int64_t) {
        const T* gate = static_cast<const T*>(a.gate) + image * a.gate_stride;
        const T* shift = static_cast<const T*>(a.shift) + image * a.shift_stride;
        const T* scale = static_cast<const T*>(a.scale) + image * a.scale_stride;
        each_group(image * a.rows + first, image * a.rows + end, [&](int64_t row, auto group) {
            constexpr int R = decltype(group)::value;
            const int64_t at = row * a.channels;
            gate_rows<R>(x + at, branch + at, gate, y + at, a.channels);
            const auto found = row_statistics<R>(y + at, a.channels, a.eps);
            modulate_rows<R>(y + at, shift, scale, h + at, a.channels, a.channels, found);
            for (int r = 0; r < R; ++r) means[row + r] = found.mean[r], rstds[row + r] = found.rstd[r];
        });
    });
}

// dbranch = gate * dy, and for each image and channel the sum over pixels of what term(at, dy there, lanes) makes.
template <class S, class T, class Args, class Term>
static void gate_backward(const Args& a, void* sums_of, int threads, Term term) {
    using A = acc_t<T>;
    const S* dy = static_cast<const S*>(a.dy);
    T* dbranch = static_cast<T*>(a.dbranch);
    A* partial = static_cast<A*>(a.partial);
    each_block(a, threads, [=](int64_t image, int64_t first, int64_t end, int64_t block) {
        const T* gate = static_cast<const T*>(a.gate) + image * a.gate_stride;
        A* sums = partial + block * a.channels;
        for (int64_t c = 0; c < a.channels; ++c) sums[c] = 0;
        each_row(image * a.rows + first, image * a.rows + end, [&](int64_t row) {
            each_vector<T>(a.channels, [&](int64_t c, auto lanes) {
                const int64_t at = row * a.channels + c;
                const vec_t<T> d = vload(dy + at, lanes);
                vstore(sums + c, vload(sums + c, lanes) + term(at, d, lanes), lanes);
                vstore(dbranch + at, vload(gate + c, lanes) * d, lanes);
            });
        });
    });
    sum_blocks(partial, a.channels, static_cast<A*>(sums_of), a, threads);
}

template <class T>
static void gated_residual_backward_typed(const GatedBackwardArgs& a, int threads) {
    const T* branch = static_cast<const T*>(a.branch);
    gate_backward<T, T>(a, a.dgate, threads,
                        [=](int64_t at, vec_t<T> d, auto lanes) { return d * vload(branch + at, lanes); });
}

// The gradient dy of a gated residual's output as that of its branch, the sums of dy over pixels, and, where the
// two types differ, dy in the branch's.
template <class S, class T>
static void gate_gradient_typed(const GateGradientArgs& a, int threads) {
    [[maybe_unused]] T* narrow = static_cast<T*>(a.narrow);
    gate_backward<S, T>(a, a.sums, threads, [=](int64_t at, vec_t<T> d, auto lanes) {
        if constexpr (sizeof(S) != sizeof(T)) vstore(narrow + at, d, lanes);
        return d;
    });
    for (int64_t image = 0; image < a.images; ++image) {
        const T* gate = static_cast<const T*>(a.gate) + image * a.gate_stride;
        const int64_t start = image * a.channels;
        each_vector<T>(a.channels, [&](int64_t c, auto lanes) {
            const vec_t<T> sums = vload(static_cast<const acc_t<T>*>(a.sums) + start + c, lanes);
            vstore(static_cast<acc_t<T>*>(a.gated) + start + c, sums * vload(gate + c, lanes), lanes);
        });
    }
}

// LayerNorm's backward. With Gated that of the residual before it as well: dx then also carries dy, the gradient
// that reaches x past the normalisation, and is handed on to the branch before it is rounded. With Residual, dx
// carries dy and the normalised output is formed anew: the weight gradient that follows wants it.
enum class Around { nothing, gated, residual };

template <Around around, class S, class T>
static void adaln_backward_typed(const AdalnBackwardArgs& a, int threads) {
    using A = acc_t<T>;
    using V = vec_t<T>;
    constexpr bool Gated = around == Around::gated, Residual = around == Around::residual;
    constexpr int kSums = Gated ? 3 : 2;
    const T* dh = static_cast<const T*>(a.dh);
    const S* x = static_cast<const S*>(a.x);
    const S* dy = static_cast<const S*>(a.dy);
    const T* branch = static_cast<const T*>(a.branch);
    S* dx = static_cast<S*>(a.dx);
    T* dbranch = static_cast<T*>(a.dbranch);
    T* h = static_cast<T*>(a.h);
    const A* means = static_cast<const A*>(a.mean);
    const A* rstds = static_cast<const A*>(a.rstd);
    A* partial = static_cast<A*>(a.partial);
    each_block(a, threads, [=](int64_t image, int64_t first, int64_t end, int64_t block) {
        const T* scale = static_cast<const T*>(a.scale) + image * a.scale_stride;
        const T* gate = static_cast<const T*>(a.gate) + image * a.gate_stride;
        const T* shift = static_cast<const T*>(a.shift) + image * a.shift_stride;
        A* dshift = partial + block * kSums * a.channels;
        A* dscale = dshift + a.channels;
        A* dgate = dscale + a.channels;
        for (int64_t c = 0; c < kSums * a.channels; ++c) dshift[c] = 0;
        each_group(image * a.rows + first, image * a.rows + end, [&](int64_t row, auto group) {
            constexpr int R = decltype(group)::value;
            A mean[R], rstd[R], g_mean[R], gx_mean[R];
            V g_sum[R] = {}, gx_sum[R] = {};
            for (int r = 0; r < R; ++r) mean[r] = means[row + r], rstd[r] = rstds[row + r];
            each_vector<T>(a.channels, [&](int64_t c, auto lanes) {
                const V by = vload(scale + c, lanes) + A(1);
                V to_shift = {}, to_scale = {};
                for (int r = 0; r < R; ++r) {
                    const int64_t at = (row + r) * a.channels + c;
                    const V d = vload(dh + at, lanes);
                    const V dxhat = d * ((vload(x + at, lanes) - mean[r]) * rstd[r]);
                    to_shift += d;
                    to_scale += dxhat;
                    g_sum[r] += d * by;
                    gx_sum[r] += dxhat * by;
                }
                vstore(dshift + c, vload(dshift + c, lanes) + to_shift, lanes);
                vstore(dscale + c, vload(dscale + c, lanes) + to_scale, lanes);
            });
            for (int r = 0; r < R; ++r) {
                g_mean[r] = sum_of(g_sum[r]) / static_cast<A>(a.channels);
                gx_mean[r] = sum_of(gx_sum[r]) / static_cast<A>(a.channels);
            }
            for (int r = 0; r < R; ++r)
                each_vector<T>(a.channels, [&](int64_t c, auto lanes) {
                    const V by = vload(scale + c, lanes) + A(1);
                    const int64_t at = (row + r) * a.channels + c;
                    const V xhat = (vload(x + at, lanes) - mean[r]) * rstd[r];
                    V d = (vload(dh + at, lanes) * by - g_mean[r] - xhat * gx_mean[r]) * rstd[r];
                    if constexpr (Gated) {
                        d += vload(dy + at, lanes);
                        vstore(dgate + c, vload(dgate + c, lanes) + d * vload(branch + at, lanes), lanes);
                        vstore(dbranch + at, d * vload(gate + c, lanes), lanes);
                    }
                    if constexpr (Residual) {
                        if (dy) d += vload(dy + at, lanes);
                        vstore(h + at, xhat * by + vload(shift + c, lanes), lanes);
                    }
                    vstore(dx + at, d, lanes);
                });
        });
    });
    const int64_t stride = kSums * a.channels;
    sum_blocks(partial, stride, static_cast<A*>(a.dshift), a, threads);
    sum_blocks(partial + a.channels, stride, static_cast<A*>(a.dscale), a, threads);
    if constexpr (Gated) sum_blocks(partial + 2 * a.channels, stride, static_cast<A*>(a.dgate), a, threads);
}

// Calls body with the Elements of the residual stream and of all else.
template <class Body>
DICO_INLINE void by_dtypes(Dtype dtype, int64_t wide_stream, Body body) {
    by_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (sizeof(T) == 2)
            if (wide_stream) return body(Element<float>{}, tag);
        body(tag, tag);
    });
}
#define DICO_TYPES typename decltype(stream)::type, typename decltype(tag)::type

static void adaln_modulate(Dtype dtype, const AdalnArgs& a, int threads) {
    by_dtypes(dtype, a.wide_stream, [&](auto stream, auto tag) { adaln_modulate_typed<DICO_TYPES>(a, threads); });
}
static void adaln_modulate_backward(Dtype dtype, const AdalnBackwardArgs& a, int threads) {
    by_dtypes(dtype, 0,
              [&](auto stream, auto tag) { adaln_backward_typed<Around::nothing, DICO_TYPES>(a, threads); });
}
static void adaln_modulate_backward_residual(Dtype dtype, const AdalnBackwardArgs& a, int threads) {
    by_dtypes(dtype, a.wide_stream,
              [&](auto stream, auto tag) { adaln_backward_typed<Around::residual, DICO_TYPES>(a, threads); });
}
static void gate_gradient(Dtype dtype, const GateGradientArgs& a, int threads) {
    by_dtypes(dtype, a.wide_stream, [&](auto stream, auto tag) { gate_gradient_typed<DICO_TYPES>(a, threads); });
}
static void gated_residual(Dtype dtype, const GatedArgs& a, int threads) {
    by_dtypes(dtype, a.wide_stream, [&](auto stream, auto tag) { gated_residual_typed<DICO_TYPES>(a, threads); });
}
static void gated_residual_backward(Dtype dtype, const GatedBackwardArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { gated_residual_backward_typed<typename decltype(tag)::type>(a, threads); });
}
static void gated_residual_adaln(Dtype dtype, const GatedAdalnArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { gated_residual_adaln_typed<typename decltype(tag)::type>(a, threads); });
}
static void gated_residual_adaln_backward(Dtype dtype, const AdalnBackwardArgs& a, int threads) {
    by_dtypes(dtype, 0,
              [&](auto stream, auto tag) { adaln_backward_typed<Around::gated, DICO_TYPES>(a, threads); });
}
#undef DICO_TYPES
