// Sums over the pixels of an image, per channel, and the affine map per channel that follows them: what channel
// attention and global response normalisation are made of. Included inside the namespace of one instruction set.

// The sums of kVectors vectors of channels over the rows, in registers; with Dots, of products.
template <int kVectors, bool Dots, class T, class Lanes>
DICO_INLINE void sum_rows(const T* a, const T* b, acc_t<T>* out, int64_t rows, int64_t channels, Lanes lanes) {
    vec_t<T> sum[kVectors] = {};
    for (int64_t row = 0; row < rows; ++row)
        for (int v = 0; v < kVectors; ++v) {
            const int64_t at = row * channels + v * kLanes<T>;
            vec_t<T> value = vload(a + at, lanes);
            if constexpr (Dots) value *= vload(b + at, lanes);
            sum[v] += value;
        }
    for (int v = 0; v < kVectors; ++v) vstore(out + v * kLanes<T>, sum[v], lanes);
}

template <bool Dots, class T>
static void channel_sums_typed(const ChannelSumArgs& args, int threads) {
    using A = acc_t<T>;
    constexpr int kWide = 8;
    A* partial = static_cast<A*>(args.partial);
    each_block(args, threads, [=](int64_t image, int64_t first, int64_t end, int64_t block) {
        const int64_t channels = args.channels, start = (image * args.rows + first) * channels;
        const T* a = static_cast<const T*>(args.a) + start;
        const T* b = Dots ? static_cast<const T*>(args.b) + start : nullptr;
        A* out = partial + block * channels;
        int64_t c = 0;
        for (; c + kWide * kLanes<T> <= channels; c += kWide * kLanes<T>)
            sum_rows<kWide, Dots>(a + c, b + c, out + c, end - first, channels, Whole{});
        each_vector<T>(channels - c, [&](int64_t v, auto lanes) {
            sum_rows<1, Dots>(a + c + v, b + c + v, out + c + v, end - first, channels, lanes);
        });
    });
    sum_blocks(partial, args.channels, static_cast<A*>(args.out), args, threads);
}

template <bool Second, class T>
static void channel_affine_typed(const ChannelAffineArgs& a, int threads) {
    using A = acc_t<T>;
    const T* x = static_cast<const T*>(a.x);
    const T* z = static_cast<const T*>(a.z);
    T* y = static_cast<T*>(a.y);
    each_block(a, threads, [=](int64_t image, int64_t first, int64_t end, int64_t) {
        const A* s = static_cast<const A*>(a.s) + image * a.s_stride;
        const A* r = static_cast<const A*>(a.r) + image * a.r_stride;
        const A* shift = a.shift ? static_cast<const A*>(a.shift) + image * a.shift_stride : nullptr;
        each_row(image * a.rows + first, image * a.rows + end, [&](int64_t row) {
            each_vector<T>(a.channels, [&](int64_t c, auto lanes) {
                const int64_t at = row * a.channels + c;
                vec_t<T> value = vload(x + at, lanes) * vload(s + c, lanes);
                if (shift) value += vload(shift + c, lanes);
                if constexpr (Second) value += vload(z + at, lanes) * vload(r + c, lanes);
                vstore(y + at, value, lanes);
            });
        });
    });
}

// What global response normalisation multiplies by, from the sums of squares: a few rows, on one thread.
template <class T>
static void grn_scale_typed(const GrnScaleArgs& a) {
    using A = acc_t<T>;
    const T* gamma = static_cast<const T*>(a.gamma);
    for (int64_t image = 0; image < a.images; ++image) {
        const A* squares = a.squares ? static_cast<const A*>(a.squares) + image * a.channels : nullptr;
        A* norm = static_cast<A*>(a.norm) + image * a.channels;
        A* s = static_cast<A*>(a.s) + image * a.channels;
        A sum = 0;
        if (squares)
            for (int64_t c = 0; c < a.channels; ++c) norm[c] = sqrt_of(squares[c]);
        for (int64_t c = 0; c < a.channels; ++c) sum += norm[c];
        const A mean = sum / static_cast<A>(a.channels) + static_cast<A>(a.eps);
        each_vector<T>(a.channels, [&](int64_t c, auto lanes) {
            vstore(s + c, vload(gamma + c, lanes) * (vload(norm + c, lanes) / mean) + A(1), lanes);
        });
    }
}

template <class T>
static void grn_scale_backward_typed(const GrnScaleBackwardArgs& a) {
    using A = acc_t<T>;
    const T* gamma = static_cast<const T*>(a.gamma);
    for (int64_t image = 0; image < a.images; ++image) {
        const int64_t start = image * a.channels;
        const A* ds = static_cast<const A*>(a.ds) + start;
        const A* norm = static_cast<const A*>(a.norm) + start;
        A* dgamma = static_cast<A*>(a.dgamma) + start;
        A* through = static_cast<A*>(a.through) + start;
        A sum = 0, dot = 0;
        for (int64_t c = 0; c < a.channels; ++c) {
            sum += norm[c];
            dot += load(gamma + c) * ds[c] * norm[c];
        }
        const A size = static_cast<A>(a.channels), mean = sum / size + static_cast<A>(a.eps);
        const A shared = dot / size / (mean * mean);
        // d|x| / dx = x / |x|; a channel that is zero everywhere gets zero, as torch's norm gives it.
        for (int64_t c = 0; c < a.channels; ++c) {
            dgamma[c] = ds[c] * norm[c] / mean;
            through[c] = norm[c] > 0 ? (load(gamma + c) * ds[c] / mean - shared) / norm[c] : A{};
        }
    }
}

static void grn_scale(Dtype dtype, const GrnScaleArgs& a, int) {
    by_dtype(dtype, [&](auto tag) { grn_scale_typed<typename decltype(tag)::type>(a); });
}
static void grn_scale_backward(Dtype dtype, const GrnScaleBackwardArgs& a, int) {
    by_dtype(dtype, [&](auto tag) { grn_scale_backward_typed<typename decltype(tag)::type>(a); });
}
static void channel_sums(Dtype dtype, const ChannelSumArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { channel_sums_typed<false, typename decltype(tag)::type>(a, threads); });
}
static void channel_dots(Dtype dtype, const ChannelSumArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { channel_sums_typed<true, typename decltype(tag)::type>(a, threads); });
}
static void channel_affine(Dtype dtype, const ChannelAffineArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        a.z ? channel_affine_typed<true, T>(a, threads) : channel_affine_typed<false, T>(a, threads);
    });
}

// Sums, attention and scale one after the other: of a small image, each alone takes less than calling it.
static void cca_gate(Dtype dtype, const CcaGateArgs& a, int threads) {
    ChannelSumArgs sums{};
    AttentionArgs attention{};
    ChannelAffineArgs affine{};
    static_cast<Image&>(sums) = static_cast<Image&>(affine) = a;
    sums.a = affine.x = a.x;
    sums.partial = a.partial;
    attention.sums = sums.out = a.mean;  // divided where they are
    attention.weight = a.weight;
    attention.bias = a.bias;
    attention.mean = a.mean;
    affine.s = attention.attention = a.attention;
    affine.s_stride = attention.channels = a.channels;
    attention.images = a.images;
    attention.pixels = a.rows;
    affine.y = a.y;
    channel_sums(dtype, sums, threads);
    channel_attention(dtype, attention, threads);
    channel_affine(dtype, affine, threads);
}
