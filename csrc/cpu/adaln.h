// adaLN, gated residual and the two fused. A row of channels stays in the first-level cache between its statistics
// and its output, so memory is passed over once. Rows are taken in blocks of kRowBlock, each with sums of its own.

template <class T>
struct Rows {
    const AdalnArgs& a;
    int64_t image, first, count;

    Rows(const AdalnArgs& args, int64_t unit) : a(args) {
        const int64_t blocks = row_blocks(args.rows);
        image = unit / blocks;
        const int64_t begin = unit % blocks * kRowBlock;
        first = image * args.rows + begin;
        count = args.rows - begin < kRowBlock ? args.rows - begin : kRowBlock;
    }
    const T* in(const void* base, int64_t row) const { return offset<T>(base, row * a.channels); }
    T* out(void* base, int64_t row) const { return const_cast<T*>(in(base, row)); }
    const T* vector(const void* base, int64_t stride) const { return offset<T>(base, image * stride); }
};

template <class A>
struct Statistics {
    A mean, rstd;
};

// Two passes, the second correcting the mean that the first one rounded: E[x^2] - E[x]^2 would lose every digit
// once |mean| is far above the deviation, and a sum of many large values loses the last ones of the mean.
template <class T>
static inline Statistics<acc_t<T>> statistics(const T* x, int64_t channels, acc_t<T> eps) {
    using A = acc_t<T>;
    vec<A> total{};
    for_channels<A>(channels, [&](int64_t c, auto n) { total += load(x + c, n); });
    const A guess = sum<A>(total) / static_cast<A>(channels);
    vec<A> rest{}, squares{};
    for_channels<A>(channels, [&](int64_t c, auto n) {
        const vec<A> centred = only<A>(load(x + c, n) - guess, n);
        rest += centred;
        squares += centred * centred;
    });
    const A correction = sum<A>(rest) / static_cast<A>(channels);
    const A variance = sum<A>(squares) / static_cast<A>(channels) - correction * correction;
    return {guess + correction, A(1) / sqrt_of((variance > 0 ? variance : 0) + eps)};
}

template <class T>
static inline void modulate(const T* x, const T* shift, const T* scale, T* y, int64_t channels,
                            Statistics<acc_t<T>> s) {
    using A = acc_t<T>;
    for_channels<A>(channels, [&](int64_t c, auto n) {
        const vec<A> normalised = (load(x + c, n) - s.mean) * s.rstd;
        store(y + c, normalised * (A(1) + load(scale + c, n)) + load(shift + c, n), n);
    });
}

template <class T>
static inline void gated(const T* x, const T* branch, const T* gate, T* y, int64_t channels) {
    for_channels<acc_t<T>>(channels, [&](int64_t c, auto n) {
        store(y + c, load(x + c, n) + load(gate + c, n) * load(branch + c, n), n);
    });
}

template <class T>
static inline void keep(const AdalnArgs& a, int64_t row, Statistics<acc_t<T>> s) {
    static_cast<acc_t<T>*>(a.mean)[row] = s.mean;
    static_cast<acc_t<T>*>(a.rstd)[row] = s.rstd;
}

// Forward of adaln_modulate (no branch), gated_residual (no shift) or both (gated_residual_adaln).
template <class T>
static void adaln_forward(const AdalnArgs& a, int threads) {
    const acc_t<T> eps = static_cast<acc_t<T>>(a.eps);
    parallel(a.images * row_blocks(a.rows), threads, [&](int64_t unit) {
        const Rows<T> rows(a, unit);
        const T* gate = rows.vector(a.gate, a.gate_stride);
        const T* shift = rows.vector(a.shift, a.shift_stride);
        const T* scale = rows.vector(a.scale, a.scale_stride);
        for (int64_t row = rows.first; row < rows.first + rows.count; ++row) {
            const T* x = rows.in(a.x, row);
            if (a.branch) {
                gated(x, rows.in(a.branch, row), gate, rows.out(a.y, row), a.channels);
                x = rows.out(a.y, row);  // rounded, as whoever reads y will see it
            }
            if (a.shift) {
                const Statistics<acc_t<T>> s = statistics(x, a.channels, eps);
                modulate(x, shift, scale, rows.out(a.h, row), a.channels, s);
                keep<T>(a, row, s);
            }
        }
    });
}

// Sums of one block of rows: kSums vectors of channels in the workspace, zeroed here.
template <class A>
static inline A* block_sums(const AdalnArgs& a, int64_t unit) {
    A* sums = static_cast<A*>(a.workspace) + unit * kSums * a.channels;
    __builtin_memset(sums, 0, kSums * a.channels * sizeof(A));
    return sums;
}

// Gradient of adaLN at y (dh arrives, dshift and dscale leave), of the gated residual (dgate, dbranch), or of both,
// where the residual's own gradient dy joins.
template <class T>
static void adaln_backward(const AdalnArgs& a, int threads) {
    using A = acc_t<T>;
    const int64_t blocks = row_blocks(a.rows), channels = a.channels;
    const A inverse = A(1) / static_cast<A>(channels);
    parallel(a.images * blocks, threads, [&](int64_t unit) {
        const Rows<T> rows(a, unit);
        const T* gate = rows.vector(a.gate, a.gate_stride);
        const T* scale = rows.vector(a.scale, a.scale_stride);
        A* dgate = block_sums<A>(a, unit);
        A *dshift = dgate + channels, *dscale = dshift + channels;
        for (int64_t row = rows.first; row < rows.first + rows.count; ++row) {
            const T *dy = rows.in(a.dy, row), *dh = rows.in(a.dh, row), *x = rows.in(a.x, row);
            const T* branch = rows.in(a.branch, row);
            T *dx = rows.out(a.y, row), *dbranch = rows.out(a.h, row);
            A mean = 0, rstd = 0, along_one = 0, along_x = 0;
            if (a.dh) {
                mean = static_cast<const A*>(a.mean)[row];
                rstd = static_cast<const A*>(a.rstd)[row];
                vec<A> ones{}, dots{};
                for_channels<A>(channels, [&](int64_t c, auto n) {
                    const vec<A> d = load(dh + c, n), normalised = (load(x + c, n) - mean) * rstd;
                    const vec<A> g = d * (A(1) + load(scale + c, n));  // zero in the missing lanes, as d is
                    ones += g;
                    dots += g * normalised;
                    add(dshift + c, d, n);
                    add(dscale + c, d * normalised, n);
                });
                along_one = sum<A>(ones) * inverse;
                along_x = sum<A>(dots) * inverse;
            }
            for_channels<A>(channels, [&](int64_t c, auto n) {
                vec<A> d = a.dy ? load(dy + c, n) : vec<A>{};
                if (a.dh) {
                    const vec<A> normalised = (load(x + c, n) - mean) * rstd;
                    const vec<A> g = load(dh + c, n) * (A(1) + load(scale + c, n));
                    d += rstd * (g - along_one - normalised * along_x);
                    store(dx + c, d, n);
                }
                if (a.branch) {
                    store(dbranch + c, d * load(gate + c, n), n);
                    add(dgate + c, only<A>(d, n) * load(branch + c, n), n);
                }
            });
        }
    });
    // The blocks of an image in order, whatever thread did them.
    parallel(a.images, threads, [&](int64_t image) {
        A* first = static_cast<A*>(a.workspace) + image * blocks * kSums * channels;
        A* results = static_cast<A*>(a.sums) + image * kSums * channels;
        for_channels<A>(kSums * channels, [&](int64_t c, auto n) {
            vec<A> total = load(first + c, n);
            for (int64_t block = 1; block < blocks; ++block) total += load(first + block * kSums * channels + c, n);
            store(results + c, total, n);
        });
    });
}
