// What stands between two 1x1 convolutions: GELU, with the sums that global response normalisation and the first
// convolution's bias want of it. The convolutions themselves are gemm.h's or the library's. Included inside the
// namespace of one instruction set.

// What G_n = dy_n^T x_n holds of the gradients of gate * (W (s x) + b), in one pass over it: dW = sum_n gate_n G_n
// s_n, dgate_n = rowsum(W * G_n s_n) + b sum(dy_n), ds_n = colsum(gate_n W * G_n). A few rows of W at a time, which
// stay in the cache from sample to sample; the sums over all rows are put together in the order of the blocks.
template <bool Scaled, class T>
static void gated_products_typed(const GatedProductsArgs& a, int threads) {
    using A = acc_t<T>;
    using V = vec_t<T>;
    constexpr int kRows = 4;
    const T* products = static_cast<const T*>(a.products);
    const T* weight = static_cast<const T*>(a.weight);
    A* dweight = static_cast<A*>(a.dweight);
    A* dgate = static_cast<A*>(a.dgate);
    A* partial = static_cast<A*>(a.partial);
    const A* sums_of_dy = static_cast<const A*>(a.sums);
    const T* bias = static_cast<const T*>(a.bias);
    const int64_t blocks = (a.outputs + a.block_rows - 1) / a.block_rows;
    threads = threads_for(a.samples * a.outputs * a.inputs, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * a.block_rows;
        const int64_t end = first + a.block_rows < a.outputs ? first + a.block_rows : a.outputs;
        for (int64_t n = 0; n < a.samples; ++n) {
            const T* gate = static_cast<const T*>(a.gate) + n * a.gate_stride;
            const A* s = Scaled ? static_cast<const A*>(a.s) + n * a.inputs : nullptr;
            A* sums = Scaled ? partial + (block * a.samples + n) * a.inputs : nullptr;
            if constexpr (Scaled)
                for (int64_t c = 0; c < a.inputs; ++c) sums[c] = 0;
            const auto rows = [&](int64_t k, auto count) {
                constexpr int R = decltype(count)::value;
                V dots[R] = {};
                A by[R];
                for (int r = 0; r < R; ++r) by[r] = load(gate + k + r);
                each_vector<T>(a.inputs, [&](int64_t c, auto lanes) {
                    V column = {}, scale = {};
                    if constexpr (Scaled) scale = vload(s + c, lanes);
                    for (int r = 0; r < R; ++r) {
                        const int64_t at = (k + r) * a.inputs + c;
                        const V product = vload(products + n * a.outputs * a.inputs + at, lanes);
                        const V weighted = product * vload(weight + at, lanes);
                        V gated = product * by[r];
                        if constexpr (Scaled) {
                            column += weighted * by[r];
                            dots[r] += weighted * scale;
                            gated *= scale;
                        } else {
                            dots[r] += weighted;
                        }
                        if (n || a.add) gated += vload(dweight + at, lanes);
                        vstore(dweight + at, gated, lanes);
                    }
                    if constexpr (Scaled) vstore(sums + c, vload(sums + c, lanes) + column, lanes);
                });
                for (int r = 0; r < R; ++r) {
                    const int64_t at = n * a.outputs + k + r;
                    dgate[at] = sum_of(dots[r]) + (bias ? sums_of_dy[at] * load(bias + k + r) : A{});
                }
            };
            int64_t k = first;
            for (; k + kRows <= end; k += kRows) rows(k, Count<kRows>{});
            for (; k < end; ++k) rows(k, Count<1>{});
        }
    }
    if constexpr (Scaled) {
        A* dscale = static_cast<A*>(a.dscale);
        const int64_t size = a.samples * a.inputs;
        for (int64_t i = 0; i < size; ++i) {
            A sum = 0;
            for (int64_t block = 0; block < blocks; ++block) sum += partial[block * size + i];
            dscale[i] = sum;
        }
    }
}

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
static void gated_products(Dtype dtype, const GatedProductsArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        a.s ? gated_products_typed<true, T>(a, threads) : gated_products_typed<false, T>(a, threads);
    });
}
