// The data movements around the products of a dense convolution, stride 1, zeros around: the k x k neighbours of
// each pixel as a row of a matrix, and that matrix's gradient added up where its elements came from. A row has
// element (c, i, j), channel c of pixel (h + i - k / 2, w + j - k / 2), in the order of the weight's memory, which
// so is the matrix to multiply by as it lies. Included inside the namespace of one instruction set.

// body(tap, distance in pixels) for each pixel that is the tap's of (h, w) and inside of the image; outside(tap)
// for the others. Towards: each pixel of whose taps (h, w) is that one.
template <bool Towards, class Body, class Outside>
DICO_INLINE void each_neighbour(const PatchesArgs& a, int64_t h, int64_t w, Body body, Outside outside) {
    const int64_t half = a.k / 2;
    for (int64_t i = 0; i < a.k; ++i)
        for (int64_t j = 0; j < a.k; ++j) {
            const int64_t down = Towards ? half - i : i - half, right = Towards ? half - j : j - half;
            if (h + down >= 0 && h + down < a.height && w + right >= 0 && w + right < a.width)
                body(i * a.k + j, down * a.width + right);
            else
                outside(i * a.k + j);
        }
}

// body(h, w, number of the pixel among all images') for each pixel, a row of an image at a time.
template <class Body>
static inline void each_pixel(const PatchesArgs& a, int threads, Body body) {
    const int64_t rows = a.images * a.height;
    threads = threads_for(rows * a.width * a.channels * a.k * a.k, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t w = 0; w < a.width; ++w) body(row % a.height, w, row * a.width + w);
}

// Elements are moved, not computed with, so only their size matters.
template <class U>
static void patches_typed(const PatchesArgs& a, int threads) {
    const int64_t taps = a.k * a.k;
    each_pixel(a, threads, [=](int64_t h, int64_t w, int64_t pixel) {
        U* const to = static_cast<U*>(a.patches) + pixel * a.channels * taps;
        each_neighbour<false>(
            a, h, w,
            [=](int64_t tap, int64_t distance) {
                const U* const from = static_cast<const U*>(a.x) + (pixel + distance) * a.channels;
                for (int64_t c = 0; c < a.channels; ++c) to[c * taps + tap] = from[c];
            },
            [=](int64_t tap) {
                for (int64_t c = 0; c < a.channels; ++c) to[c * taps + tap] = U{};
            });
    });
}

template <class T>
static void patches_backward_typed(const PatchesArgs& a, int threads) {
    const int64_t taps = a.k * a.k;
    each_pixel(a, threads, [=](int64_t h, int64_t w, int64_t pixel) {
        T* const to = static_cast<T*>(a.x) + pixel * a.channels;
        each_vector<T>(a.channels, [&](int64_t c, auto lanes) {
            acc_t<T> sums[kLanes<T>] = {};
            const int64_t left = a.channels - c, count = left < kLanes<T> ? left : kLanes<T>;
            each_neighbour<true>(
                a, h, w,
                [&](int64_t tap, int64_t distance) {
                    const T* const from =
                        static_cast<const T*>(a.patches) + ((pixel + distance) * a.channels + c) * taps + tap;
                    for (int64_t l = 0; l < count; ++l) sums[l] += load(from + l * taps);
                },
                [](int64_t) {});
            vstore(to + c, vload(sums), lanes);
        });
    });
}

static void patches(Dtype dtype, const PatchesArgs& a, int threads) {
    by_size(dtype, [&](auto tag) { patches_typed<typename decltype(tag)::type>(a, threads); });
}
static void patches_backward(Dtype dtype, const PatchesArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { patches_backward_typed<typename decltype(tag)::type>(a, threads); });
}
