// Depthwise k x k convolution, zero padding, channels innermost, with GELU or without, and its backward.
//
// A few vectors of channels at a time, rows of the image stream through a ring of the k rows that a row of outputs
// needs. The ring is widened to the accumulation type, or holds neighbours in pairs, and is padded with zeros at
// both ends, a row outside the image is a row of zeros: the arithmetic knows no borders. Within the ring one vector
// of channels is contiguous along the row, so that what the inner loops touch fits the first-level cache. Included
// inside the namespace of one instruction set.

// Outputs along a row that are summed together: each loaded pixel serves all of them, and eight sums hardly wait
// for one another; but with the taps of a wide kernel's row they are more than 16 registers.
constexpr int kLongestTile = 8;
#if defined(__AVX512F__)
template <int K>
constexpr int kTile = 8;
#else
template <int K>
constexpr int kTile = K <= 3 ? 8 : 4;
#endif
constexpr int kRingVectors = 4;

struct DepthwiseShape {
    int64_t padded;         // vectors of a ring's row
    int64_t ring;           // vectors of a ring
    int64_t taps;           // vectors of the weights, transposed, for all channels
    int64_t channel_units;  // blocks of kRingVectors vectors of channels
    int64_t per_thread;     // vectors of scratch
};

template <class T>
static DepthwiseShape depthwise_shape(int64_t channels, int64_t width, int64_t k, bool backward) {
    DepthwiseShape s;
    const int64_t vectors = (channels + kLanes<T> - 1) / kLanes<T>;
    s.padded = (width + kLongestTile - 1) / kLongestTile * kLongestTile + k - 1;
    s.ring = kRingVectors * k * s.padded;
    s.taps = vectors * k * k;
    s.channel_units = (vectors + kRingVectors - 1) / kRingVectors;
    s.per_thread = s.padded + s.ring * (backward ? 2 : 1) + (backward ? kRingVectors * (k * k + 1) : 0);
    return s;
}

static int64_t depthwise_scratch(Dtype dtype, int64_t channels, int64_t width, int64_t k, bool backward,
                                 int threads) {
    int64_t vectors = 0;
    by_dtype(dtype, [&](auto tag) {
        const DepthwiseShape s = depthwise_shape<typename decltype(tag)::type>(channels, width, k, backward);
        vectors = s.taps + threads * s.per_thread;
    });
    return vectors * kVectorBytes;
}

// The weights (channels, k * k) as taps[vector of channels][k * k], zero past the last channel. Called inside a
// parallel region.
template <class T>
static void transpose_taps(const T* weight, vec_t<T>* taps, int64_t channels, int64_t kk) {
    acc_t<T>* to = reinterpret_cast<acc_t<T>*>(taps);
    const int64_t vectors = (channels + kLanes<T> - 1) / kLanes<T>;
#pragma omp for schedule(static)
    for (int64_t v = 0; v < vectors; ++v)
        for (int64_t t = 0; t < kk; ++t)
            for (int64_t i = 0; i < kLanes<T>; ++i) {
                const int64_t c = v * kLanes<T> + i;
                to[(v * kk + t) * kLanes<T> + i] = c < channels ? load(weight + c * kk + t) : 0;
            }
}

// Whether a row is summed by the processor's products of pairs of bfloat16, which take subnormal numbers for zero.
template <class T, int K>
struct InPairs {
    static constexpr bool value = kPair<T> == 2 && K >= 5;
};

// k rows of kRingVectors vectors of channels, one of them after the other; row r of the image lies in slot r mod k.
template <class T, int K, bool Pairs = false>
struct Ring {
    using V = vec_t<T>;
    V* data;
    const V* zeros;
    int64_t padded, height, width;

    void clear_padding() const {
        for (int64_t row = 0; row < kRingVectors * K; ++row) {
            for (int64_t w = 0; w < K / 2; ++w) data[row * padded + w] = V{};
            for (int64_t w = K / 2 + width; w < padded; ++w) data[row * padded + w] = V{};
        }
    }
    // Where column 0 of the image lies.
    V* inside(int64_t r, int v) const { return data + (v * K + r % K) * padded + K / 2; }
    bool in_image(int64_t r) const { return r >= 0 && r < height; }
    const V* row(int64_t r, int v) const { return in_image(r) ? data + (v * K + r % K) * padded : zeros; }
    // The K rows around r.
    void around(int64_t r, int v, const V** rows) const {
        for (int i = 0; i < K; ++i) rows[i] = row(r + i - K / 2, v);
    }
    // image: the first row's first pixel's first channel of this block.
    void fill(const T* image, int64_t r, int64_t row_stride, int64_t stride, int64_t channels) const {
        if (!in_image(r)) return;
        const T* from = image + r * row_stride;
        for (int64_t w = 0; w < width; ++w, from += stride) {
            V* to = inside(r, 0) + w;
            each_vector<T>(channels, [&](int64_t c, auto lanes) {
                if constexpr (Pairs) {  // in each lane a pixel and, above it, its right neighbour
                    const vuint pixel = (vuint)vload(from + c, lanes);
                    to[-1] = (V)((w ? (vuint)to[-1] : vuint{}) | pixel);
                    to[0] = (V)(pixel >> 16);
                } else {
                    *to = vload(from + c, lanes);
                }
                to += K * padded;
            });
        }
    }
};

// emit(w, sum over the taps) for every column; Flip turns the kernel by 180 degrees.
template <int K, bool Flip, class V, class Emit>
DICO_INLINE void stencil(const V* const* rows, const V* taps, V bias, int64_t width, Emit emit) {
    for (int64_t w = 0; w < width; w += kTile<K>) {
        V sum[kTile<K>];
#pragma GCC unroll 8
        for (int t = 0; t < kTile<K>; ++t) sum[t] = bias;
        for (int i = 0; i < K; ++i) {
            V tap[K];
#pragma GCC unroll 16
            for (int j = 0; j < K; ++j) tap[j] = taps[Flip ? K * K - 1 - (i * K + j) : i * K + j];
#pragma GCC unroll 16
            for (int p = 0; p < kTile<K> + K - 1; ++p) {
                const V pixel = rows[i][w + p];
#pragma GCC unroll 16
                for (int j = 0; j < K; ++j)
                    if (p - j >= 0 && p - j < kTile<K>) sum[p - j] += pixel * tap[j];
            }
        }
        // Not unrolled: what is emitted may be long.
        const int64_t count = width - w < kTile<K> ? width - w : kTile<K>;
        for (int64_t t = 0; t < count; ++t) emit(w + t, sum[t]);
    }
}

#if defined(__AVX512BF16__)
// Of each row's taps pairs, and the last one by itself: what it would be paired with is no pixel of this kernel's.
template <int K>
static void pair_taps(vfloat* taps, int64_t vectors) {
#pragma omp for schedule(static)
    for (int64_t v = 0; v < vectors; ++v)
        for (int i = 0; i < K; ++i) {
            vfloat* row = taps + (v * K + i) * K;
            for (int m = 0; m < K / 2; ++m) row[m] = (vfloat)(((vuint)row[2 * m] >> 16) | (vuint)row[2 * m + 1]);
            row[K / 2] = row[K - 1];
        }
}

// As stencil, of rows and taps in pairs.
template <int K, class Emit>
DICO_INLINE void stencil_in_pairs(const vfloat* const* rows, const vfloat* taps, vfloat bias, int64_t width,
                                  Emit emit) {
    for (int64_t w = 0; w < width; w += kTile<K>) {
        vfloat sum[kTile<K>];
#pragma GCC unroll 8
        for (int t = 0; t < kTile<K>; ++t) sum[t] = bias;
        for (int i = 0; i < K; ++i) {
            vfloat tap[K / 2 + 1];
#pragma GCC unroll 8
            for (int j = 0; j <= K / 2; ++j) tap[j] = taps[i * K + j];
#pragma GCC unroll 16
            for (int p = 0; p < kTile<K> + K - 2; ++p) {
                const vfloat pair = rows[i][w + p];
#pragma GCC unroll 8
                for (int m = 0; m < K / 2; ++m)
                    if (p - 2 * m >= 0 && p - 2 * m < kTile<K>)
                        sum[p - 2 * m] =
                            (vfloat)_mm512_dpbf16_ps((__m512)sum[p - 2 * m], (__m512bh)pair, (__m512bh)tap[m]);
                if (p - (K - 2) >= 0) sum[p - (K - 2)] += (vfloat)((vuint)pair & 0xffff0000u) * tap[K / 2];
            }
        }
        const int64_t count = width - w < kTile<K> ? width - w : kTile<K>;
        for (int64_t t = 0; t < count; ++t) emit(w + t, sum[t]);
    }
}
#endif

// sums[i * K + j] += the sum over a row of d[w] * rows[i][w + j], sums[K * K] += that of d. A 3 x 3 kernel's nine
// sums are formed together, as three would wait for one another; a wider kernel's rows have sums enough each.
template <int K, class V>
DICO_INLINE void tap_gradients(const V* const* rows, const V* d, V* sums, int64_t width) {
    constexpr int kRows = K <= 3 ? K : 1, kStep = 4;
    for (int base = 0; base < K; base += kRows) {
        V sum[kRows][K] = {};
        for (int64_t w = 0; w < width; w += kStep) {
            V step[kStep];
#pragma GCC unroll 4
            for (int t = 0; t < kStep; ++t) step[t] = d[w + t];
#pragma GCC unroll 3
            for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
                for (int p = 0; p < kStep + K - 1; ++p) {
                    const V pixel = rows[base + i][w + p];
#pragma GCC unroll 16
                    for (int j = 0; j < K; ++j)
                        if (p - j >= 0 && p - j < kStep) sum[i][j] += pixel * step[p - j];
                }
        }
        for (int i = 0; i < kRows; ++i)
            for (int j = 0; j < K; ++j) sums[(base + i) * K + j] += sum[i][j];
    }
    V total[kStep] = {};
    for (int64_t w = 0; w < width; w += kStep)
        for (int t = 0; t < kStep; ++t) total[t] += d[w + t];
    sums[K * K] += (total[0] + total[1]) + (total[2] + total[3]);
}

template <class T>
DICO_INLINE vec_t<T> bias_of(const void* bias, int64_t c, int64_t left) {
    if (!bias) return vec_t<T>{};
    const T* from = static_cast<const T*>(bias) + c;
    return left >= kLanes<T> ? vload(from) : vload(from, static_cast<int>(left));
}

template <class T, int K>
static void depthwise_typed(const DepthwiseArgs& a, int threads) {
    using V = vec_t<T>;
    constexpr int L = kLanes<T>;
    constexpr bool Pairs = InPairs<T, K>::value;
    const DepthwiseShape shape = depthwise_shape<T>(a.channels, a.width, K, false);
    V* const taps = static_cast<V*>(a.scratch);
    const int64_t row_blocks = (a.height + a.block_height - 1) / a.block_height;
    const int64_t units = a.images * row_blocks * shape.channel_units;
    // Two taps take about as long as an element of a pass.
    threads = threads_for(a.images * a.height * a.width * a.channels * ((K * K + 1) / 2), threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        V* const own = taps + shape.taps + thread_number() * shape.per_thread;
        for (int64_t w = 0; w < shape.padded; ++w) own[w] = V{};
        const Ring<T, K, Pairs> ring = {own + shape.padded, own, shape.padded, a.height, a.width};
        ring.clear_padding();
        transpose_taps(static_cast<const T*>(a.weight), taps, a.channels, K * K);
#if defined(__AVX512BF16__)
        if constexpr (Pairs) pair_taps<K>(taps, shape.taps / (K * K));
#endif
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < units; ++unit) {
            const int64_t c0 = unit % shape.channel_units * kRingVectors * L;
            const int64_t block = unit / shape.channel_units;
            const int64_t first = block % row_blocks * a.block_height;
            const int64_t end = first + a.block_height < a.height ? first + a.block_height : a.height;
            const int64_t row_stride = a.width * a.channels;
            const int64_t start = block / row_blocks * a.height * row_stride + c0;
            const int64_t channels = a.channels - c0 < kRingVectors * L ? a.channels - c0 : kRingVectors * L;
            const T* x = static_cast<const T*>(a.x) + start;
            T* y = static_cast<T*>(a.y) + start;
            V totals[kRingVectors] = {};
            for (int64_t r = first - K / 2; r < first + K / 2; ++r)
                ring.fill(x, r, row_stride, a.channels, channels);
            for (int64_t r = first; r < end; ++r) {
                ring.fill(x, r + K / 2, row_stride, a.channels, channels);
                each_vector<T>(channels, [&](int64_t c, auto lanes) {
                    const V* rows[K];
                    ring.around(r, static_cast<int>(c / L), rows);
                    T* to = y + r * row_stride + c;
                    const V bias = bias_of<T>(a.bias, c0 + c, channels - c);
                    V total = {};
                    const V* const own_taps = taps + (c0 + c) / L * K * K;
                    const auto emit = [&](int64_t w, V sum) {
                        vstore(to + w * a.channels, a.gelu ? gelu<T>(sum) : sum, lanes);
                        if (a.sums) total += vload(to + w * a.channels, lanes);  // of the rounded values
                    };
#if defined(__AVX512BF16__)
                    if constexpr (Pairs)
                        stencil_in_pairs<K>(rows, own_taps, bias, a.width, emit);
                    else
#endif
                        stencil<K, false>(rows, own_taps, bias, a.width, emit);
                    totals[c / L] += total;
                });
            }
            if (a.sums)
                each_vector<T>(channels, [&](int64_t c, auto lanes) {
                    vstore(static_cast<acc_t<T>*>(a.partial) + block * a.channels + c0 + c, totals[c / L], lanes);
                });
        }
    }
    if (a.sums)
        sum_blocks(static_cast<const acc_t<T>*>(a.partial), a.channels, static_cast<acc_t<T>*>(a.sums),
                   Image{a.images, row_blocks, a.channels, 1}, threads);
}

// One pass over x and dy: the row of dz = dy * GELU'(z), with z computed anew, goes into a ring of its own, from
// which the row K / 2 above it takes its dx. The weights' gradients meet dz's row and x's ring in the cache. The
// sums are kept for a.partitions stretches of (image, block of rows), and the stretches added up at the end.
template <class T, int K>
static void depthwise_backward_typed(const DepthwiseBackwardArgs& a, int threads) {
    using A = acc_t<T>;
    using V = vec_t<T>;
    constexpr int L = kLanes<T>, P = K / 2, kSums = K * K + 1;
    const DepthwiseShape shape = depthwise_shape<T>(a.channels, a.width, K, true);
    V* const taps = static_cast<V*>(a.scratch);
    A* const partial = static_cast<A*>(a.partial);
    const int64_t row_blocks = (a.height + a.block_height - 1) / a.block_height;
    const int64_t blocks = a.images * row_blocks;
    const int64_t row_stride = a.width * a.channels;
    threads = threads_for(a.images * a.height * a.width * a.channels * K * K, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        V* const own = taps + shape.taps + thread_number() * shape.per_thread;
        for (int64_t w = 0; w < shape.padded; ++w) own[w] = V{};
        const Ring<T, K> xs = {own + shape.padded, own, shape.padded, a.height, a.width};
        const Ring<T, K> dzs = {xs.data + shape.ring, own, shape.padded, a.height, a.width};
        V* const sums = dzs.data + shape.ring;
        xs.clear_padding();
        dzs.clear_padding();
        transpose_taps(static_cast<const T*>(a.weight), taps, a.channels, K * K);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < a.partitions * shape.channel_units; ++unit) {
            const int64_t c0 = unit % shape.channel_units * kRingVectors * L;
            const int64_t partition = unit / shape.channel_units;
            const int64_t channels = a.channels - c0 < kRingVectors * L ? a.channels - c0 : kRingVectors * L;
            for (int i = 0; i < kRingVectors * kSums; ++i) sums[i] = V{};
            for (int64_t block = partition * blocks / a.partitions; block < (partition + 1) * blocks / a.partitions;
                 ++block) {
                const int64_t first = block % row_blocks * a.block_height;
                const int64_t end = first + a.block_height < a.height ? first + a.block_height : a.height;
                const int64_t start = block / row_blocks * a.height * row_stride + c0;
                const T* x = static_cast<const T*>(a.x) + start;
                const T* dy = static_cast<const T*>(a.dy) + start;
                T* dx = static_cast<T*>(a.dx) + start;
                // Without GELU no z is needed, and x only around the block's own rows.
                for (int64_t r = first - (a.gelu ? 2 * P : P); r < first; ++r)
                    xs.fill(x, r, row_stride, a.channels, channels);
                for (int64_t r = first - P; r < end + P; ++r) {
                    const bool own_row = r >= first && r < end;
                    if (a.gelu || r < end) xs.fill(x, r + P, row_stride, a.channels, channels);
                    if (!a.gelu) dzs.fill(dy, r, row_stride, a.channels, channels);
                    each_vector<T>(channels, [&](int64_t c, auto lanes) {
                        const int v = static_cast<int>(c / L);
                        const V* const tap = taps + (c0 + c) / L * K * K;
                        const V* rows[K];
                        V* const dz = dzs.inside(r, v);
                        if (a.gelu && dzs.in_image(r)) {
                            const T* from = dy + r * row_stride + c;
                            const V bias = bias_of<T>(a.bias, c0 + c, channels - c);
                            xs.around(r, v, rows);
                            stencil<K, false>(rows, tap, bias, a.width, [&](int64_t w, V z) {
                                dz[w] = vload(from + w * a.channels, lanes) * gelu_slope<T>(z);
                            });
                        }
                        if (own_row) {
                            xs.around(r, v, rows);
                            tap_gradients<K>(rows, dz, sums + v * kSums, a.width);
                        }
                        if (r - P >= first) {
                            T* to = dx + (r - P) * row_stride + c;
                            dzs.around(r - P, v, rows);
                            stencil<K, true>(rows, tap, V{}, a.width,
                                             [&](int64_t w, V sum) { vstore(to + w * a.channels, sum, lanes); });
                        }
                    });
                }
            }
            each_vector<T>(channels, [&](int64_t c, auto lanes) {
                for (int t = 0; t < kSums; ++t)
                    vstore(partial + (partition * kSums + t) * a.channels + c0 + c, sums[c / L * kSums + t], lanes);
            });
        }
        A* const dweight = static_cast<A*>(a.dweight);
        A* const dbias = static_cast<A*>(a.dbias);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < a.channels; ++c)
            for (int t = 0; t < kSums; ++t) {
                A sum = 0;
                for (int64_t p = 0; p < a.partitions; ++p) sum += partial[(p * kSums + t) * a.channels + c];
                *(t < K * K ? dweight + c * K * K + t : dbias + c) = sum;
            }
    }
}

// Calls body with the Count of a kernel size that exists.
template <class Body>
static inline void by_kernel_size(int64_t k, Body body) {
    switch (k) {
        case 1: return body(Count<1>{});
        case 3: return body(Count<3>{});
        case 5: return body(Count<5>{});
        case 7: return body(Count<7>{});
        case 9: return body(Count<9>{});
    }
}

static void depthwise(Dtype dtype, const DepthwiseArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) {
        by_kernel_size(
            a.k, [&](auto k) { depthwise_typed<typename decltype(tag)::type, decltype(k)::value>(a, threads); });
    });
}
static void depthwise_backward(Dtype dtype, const DepthwiseBackwardArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) {
        by_kernel_size(a.k, [&](auto k) {
            depthwise_backward_typed<typename decltype(tag)::type, decltype(k)::value>(a, threads);
        });
    });
}
