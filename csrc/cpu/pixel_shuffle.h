// The two data movements around the product of pixel_shuffle_skip, for a stretch of rows of the small image at a
// time: cat[PixelShuffle2(up), skip] as the rows of a matrix, and that matrix's gradient back to where it came
// from. Pixel (2h + i, 2w + j), channel c of the shuffled image is pixel (h, w), channel 4c + 2i + j of up.
// Elements are moved, not computed with, so only their size matters. Included inside the namespace of one
// instruction set.

template <class U>
static void shuffle_gather_typed(const PixelShuffleArgs& a, int threads) {
    const int64_t wide = a.channels + a.skip_channels;
    threads = threads_for(a.rows * a.width * 4 * wide, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < a.rows; ++row) {
        const U* up = static_cast<const U*>(a.up) + row * a.width * 4 * a.channels;
        const U* skip = static_cast<const U*>(a.skip) + row * a.width * 4 * a.skip_channels;
        U* top = static_cast<U*>(a.cat) + row * a.width * 4 * wide;
        U* bottom = top + 2 * a.width * wide;
        for (int64_t w = 0; w < a.width; ++w, up += 4 * a.channels) {
            U* __restrict p0 = top + 2 * w * wide;
            U* __restrict p1 = p0 + wide;
            U* __restrict p2 = bottom + 2 * w * wide;
            U* __restrict p3 = p2 + wide;
            for (int64_t c = 0; c < a.channels; ++c) {
                p0[c] = up[4 * c];
                p1[c] = up[4 * c + 1];
                p2[c] = up[4 * c + 2];
                p3[c] = up[4 * c + 3];
            }
        }
        for (int64_t pixel = 0; pixel < 4 * a.width; ++pixel)
            __builtin_memcpy(top + pixel * wide + a.channels, skip + pixel * a.skip_channels,
                             static_cast<size_t>(a.skip_channels) * sizeof(U));
    }
}

template <class U>
static void shuffle_scatter_typed(const PixelShuffleArgs& a, int threads) {
    const int64_t wide = a.channels + a.skip_channels;
    threads = threads_for(a.rows * a.width * 4 * wide, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < a.rows; ++row) {
        U* __restrict up = static_cast<U*>(a.up) + row * a.width * 4 * a.channels;
        U* skip = static_cast<U*>(a.skip) + row * a.width * 4 * a.skip_channels;
        const U* top = static_cast<const U*>(a.cat) + row * a.width * 4 * wide;
        const U* bottom = top + 2 * a.width * wide;
        for (int64_t w = 0; w < a.width; ++w, up += 4 * a.channels) {
            const U* p0 = top + 2 * w * wide;
            const U* p1 = p0 + wide;
            const U* p2 = bottom + 2 * w * wide;
            const U* p3 = p2 + wide;
            for (int64_t c = 0; c < a.channels; ++c) {
                up[4 * c] = p0[c];
                up[4 * c + 1] = p1[c];
                up[4 * c + 2] = p2[c];
                up[4 * c + 3] = p3[c];
            }
        }
        for (int64_t pixel = 0; pixel < 4 * a.width; ++pixel)
            __builtin_memcpy(skip + pixel * a.skip_channels, top + pixel * wide + a.channels,
                             static_cast<size_t>(a.skip_channels) * sizeof(U));
    }
}

static void shuffle_gather(Dtype dtype, const PixelShuffleArgs& a, int threads) {
    by_size(dtype, [&](auto tag) { shuffle_gather_typed<typename decltype(tag)::type>(a, threads); });
}
static void shuffle_scatter(Dtype dtype, const PixelShuffleArgs& a, int threads) {
    by_size(dtype, [&](auto tag) { shuffle_scatter_typed<typename decltype(tag)::type>(a, threads); });
}
