// Sums over the pixels of each channel, and a scale and shift for each channel: what channel attention (CCA) and
// global response normalisation (GRN) are made of, forward and backward.

template <class T>
static void channel_sums(const ChannelArgs& a, int threads) {
    using A = acc_t<T>;
    const int64_t blocks = row_blocks(a.rows), channels = a.channels;
    parallel(a.images * blocks, threads, [&](int64_t unit) {
        A* sums = static_cast<A*>(a.workspace) + unit * channels;
        __builtin_memset(sums, 0, channels * sizeof(A));
        const int64_t image = unit / blocks, begin = unit % blocks * kRowBlock;
        const int64_t end = begin + kRowBlock < a.rows ? begin + kRowBlock : a.rows;
        for (int64_t row = image * a.rows + begin; row < image * a.rows + end; ++row) {
            const T* x = static_cast<const T*>(a.x) + row * channels;
            const T* z = offset<T>(a.z, row * channels);
            for_channels<A>(channels, [&](int64_t c, auto n) {
                const vec<A> v = load(x + c, n);
                add(sums + c, a.z ? v * load(z + c, n) : v, n);
            });
        }
    });
    parallel(a.images, threads, [&](int64_t image) {
        const A* first = static_cast<const A*>(a.workspace) + image * blocks * channels;
        A* out = static_cast<A*>(a.y) + image * channels;
        for_channels<A>(channels, [&](int64_t c, auto n) {
            vec<A> total = load(first + c, n);
            for (int64_t block = 1; block < blocks; ++block) total += load(first + block * channels + c, n);
            store(out + c, total, n);
        });
    });
}

// y = x * s + z * r + shift; z and r, and shift, may be absent.
template <class T>
static void channel_affine(const ChannelArgs& a, int threads) {
    using A = acc_t<T>;
    const int64_t blocks = row_blocks(a.rows), channels = a.channels;
    parallel(a.images * blocks, threads, [&](int64_t unit) {
        const int64_t image = unit / blocks, begin = unit % blocks * kRowBlock;
        const int64_t end = begin + kRowBlock < a.rows ? begin + kRowBlock : a.rows;
        const A* s = offset<A>(a.s, image * a.s_stride);
        const A* r = offset<A>(a.r, image * a.r_stride);
        const A* shift = offset<A>(a.shift, image * a.shift_stride);
        for (int64_t row = image * a.rows + begin; row < image * a.rows + end; ++row) {
            const T* x = static_cast<const T*>(a.x) + row * channels;
            const T* z = offset<T>(a.z, row * channels);
            T* y = static_cast<T*>(a.y) + row * channels;
            for_channels<A>(channels, [&](int64_t c, auto n) {
                vec<A> v = load(x + c, n) * load(s + c, n);
                if (a.z) v += load(z + c, n) * load(r + c, n);
                if (a.shift) v += load(shift + c, n);
                store(y + c, v, n);
            });
        }
    });
}
