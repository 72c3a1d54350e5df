// The data movement before the product of a dense convolution, stride 1, zeros around: the k x k neighbours of each
// pixel as a row of a matrix. A row has element (c, i, j), channel c of pixel (h + i - k / 2, w + j - k / 2), in
// the order of the weight's memory, which so is the matrix to multiply by as it lies. Elements are moved, not
// computed with, so only their size matters. Included inside the namespace of one instruction set.

template <class U>
static void patches_typed(const PatchesArgs& a, int threads) {
    const int64_t taps = a.k * a.k, half = a.k / 2, rows = a.images * a.height, wide = a.channels * taps;
    threads = threads_for(rows * a.width * wide, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t h = row % a.height;
        const U* const here = static_cast<const U*>(a.x) + row * a.width * a.channels;
        U* const to = static_cast<U*>(a.patches) + row * a.width * wide;
        for (int64_t w = 0; w < a.width; ++w)
            for (int64_t n = 0; n < taps; ++n) {
                const int64_t down = n / a.k - half, right = n % a.k - half;
                const bool inside = h + down >= 0 && h + down < a.height && w + right >= 0 && w + right < a.width;
                const U* from = here + ((down * a.width + w + right) * a.channels);
                U* __restrict at = to + w * wide + n;
                for (int64_t c = 0; c < a.channels; ++c) at[c * taps] = inside ? from[c] : U{};
            }
    }
}

static void patches(Dtype dtype, const PatchesArgs& a, int threads) {
    switch (dtype) {
        case Dtype::float64: return patches_typed<uint64_t>(a, threads);
        case Dtype::float32: return patches_typed<uint32_t>(a, threads);
        default: return patches_typed<uint16_t>(a, threads);
    }
}
