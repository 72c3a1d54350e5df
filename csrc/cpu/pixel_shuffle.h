// The operand of the skip fusion's matrix product, for some rows of the output image at a time: each output pixel's
// shuffled channels, then its skip's. And back: such rows' gradient, taken apart. Rows come in pairs, the two that
// one row of `up` shuffles into, so that its channels are read once, in order.

// The four output pixels (2h + i, 2w + j) of one pixel of up, as pointers into the joined operand.
template <class T>
struct Quad {
    T* pixel[4];
    Quad(const ShuffleArgs& a, int64_t pair, int64_t column) {
        const int64_t joined = a.shuffled + a.skipped;
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j)
                pixel[2 * i + j] =
                    static_cast<T*>(a.joined) + ((2 * pair + i) * 2 * a.width + 2 * column + j) * joined;
    }
};

template <class T>
static void pixel_shuffle_gather(const ShuffleArgs& a, int threads) {
    parallel(a.count / 2, threads, [&](int64_t pair) {
        const int64_t row = a.first / 2 + pair;  // of all images' rows of up
        for (int64_t w = 0; w < a.width; ++w) {
            const Quad<T> out(a, pair, w);
            const T* __restrict__ up = static_cast<const T*>(a.up) + (row * a.width + w) * 4 * a.shuffled;
            T* __restrict__ p0 = out.pixel[0], * __restrict__ p1 = out.pixel[1];
            T* __restrict__ p2 = out.pixel[2], * __restrict__ p3 = out.pixel[3];
#pragma omp simd
            for (int64_t c = 0; c < a.shuffled; ++c) {
                p0[c] = up[4 * c];
                p1[c] = up[4 * c + 1];
                p2[c] = up[4 * c + 2];
                p3[c] = up[4 * c + 3];
            }
            for (int q = 0; q < 4; ++q) {
                const int64_t pixel = (2 * row + q / 2) * 2 * a.width + 2 * w + q % 2;
                __builtin_memcpy(out.pixel[q] + a.shuffled, static_cast<const T*>(a.skip) + pixel * a.skipped,
                                 a.skipped * sizeof(T));
            }
        }
    });
}

template <class T>
static void pixel_shuffle_scatter(const ShuffleArgs& a, int threads) {
    parallel(a.count / 2, threads, [&](int64_t pair) {
        const int64_t row = a.first / 2 + pair;
        for (int64_t w = 0; w < a.width; ++w) {
            const Quad<T> in(a, pair, w);
            T* __restrict__ up = static_cast<T*>(a.dup) + (row * a.width + w) * 4 * a.shuffled;
            const T *p0 = in.pixel[0], *p1 = in.pixel[1], *p2 = in.pixel[2], *p3 = in.pixel[3];
#pragma omp simd
            for (int64_t c = 0; c < a.shuffled; ++c) {
                up[4 * c] = p0[c];
                up[4 * c + 1] = p1[c];
                up[4 * c + 2] = p2[c];
                up[4 * c + 3] = p3[c];
            }
            for (int q = 0; q < 4; ++q) {
                const int64_t pixel = (2 * row + q / 2) * 2 * a.width + 2 * w + q % 2;
                __builtin_memcpy(static_cast<T*>(a.dskip) + pixel * a.skipped, in.pixel[q] + a.shuffled,
                                 a.skipped * sizeof(T));
            }
        }
    });
}
