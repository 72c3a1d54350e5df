// Dense 3x3 convolutions, stride 1, zeros around, by Winograd's F(2x2, 3x3) (Lavin and Gray 2015, "Fast algorithms
// for convolutional neural networks", section 4.1): a tile of 2x2 outputs of one channel takes 16 products of each
// input channel for 36. With B, G and A as there, and U = G w G^T made of each weight once,
//
//     y = A^T [ sum over inputs of U * (B^T x B) ] A,    x the 4x4 pixels under a tile, * elementwise:
//
// for each of the 16 elements a matrix product over many tiles. B and A only add and subtract, and a sum is over
// the inputs alone, not over the taps, too: in float32 it is more accurate than the definition. An element that a
// pixel is part of is part of no output but those that this pixel is under: what is not finite goes no further than
// by the definition, though where infinities meet they become NaN, and neither do the roundings of a pixel that
// dwarfs its neighbours. Included inside the namespace of one instruction set.

constexpr int kElements = 16;

// Of a buffer of tiles: from one element's to the next's. A line more, or those of a power of two share too few
// sets of the cache.
template <class A>
DICO_INLINE int64_t element_stride_of(int64_t inputs, int64_t tiles) {
    return tiles * row_stride_of<A>(inputs) + 64 / sizeof(A);
}
template <class A>
DICO_INLINE int64_t tile_scratch_of(int64_t inputs, int64_t tiles) {
    return kElements * (element_stride_of<A>(inputs, tiles) + tiles * kPanel<A>);
}

static int64_t winograd_packed_size(Dtype dtype, int64_t outputs, int64_t inputs) {
    return kElements * packed_size(dtype == Dtype::float64 ? dtype : Dtype::float32, outputs, inputs);
}
static int64_t winograd_scratch(Dtype dtype, int64_t inputs, int64_t block_tiles, int threads) {
    int64_t bytes = 0;
    by_dtype(dtype, [&](auto tag) {
        using A = acc_t<typename decltype(tag)::type>;
        bytes = threads * tile_scratch_of<A>(inputs, block_tiles) * static_cast<int64_t>(sizeof(A));
    });
    return bytes;
}

// G g for three elements at a distance.
template <class V>
DICO_INLINE void spread(V a, V b, V c, V* to, int distance) {
    to[0] = a;
    to[distance] = (a + b + c) / 2;
    to[2 * distance] = (a - b + c) / 2;
    to[3 * distance] = c;
}

// Rows [0, count) of a matrix of kLanes columns, to one after the other `width` apart, from its columns.
template <class V, class A>
DICO_INLINE void store_columns(V* columns, int64_t count, A* to, int64_t width) {
    constexpr int L = kLanes<A>;
#if !defined(__clang__)  // as in gemm.h
    if constexpr (sizeof(A) == sizeof(uint32_t)) {
        vuint rows[L];
        __builtin_memcpy(rows, columns, sizeof rows);
        transpose(rows);
        for (int64_t i = 0; i < count; ++i) __builtin_memcpy(to + i * width, &rows[i], sizeof rows[i]);
        return;
    }
#endif
    for (int64_t i = 0; i < count; ++i)
        for (int n = 0; n < L; ++n) to[i * width + n] = columns[n][i];
}

// U of W (outputs, inputs, 3, 3) as panels of kPanel outputs, the last one narrower; in a panel one element's
// matrix after the other, each as pack lays it out.
template <class T>
static void winograd_pack_typed(const WinogradPackArgs& a, int threads) {
    using A = acc_t<T>;
    using V = vec_t<T>;
    constexpr int L = kLanes<T>, kTaps = 9;
    threads = threads_for(a.outputs * a.inputs * kElements, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t panel = 0; panel < a.outputs; panel += kPanel<A>) {
        const int64_t left = a.outputs - panel, own = left < kPanel<A> ? left : kPanel<A>;
        const int64_t width = (own + L - 1) / L * L;
        A* const to = static_cast<A*>(a.packed) + panel * a.inputs * kElements;
        for (int64_t n = 0; n < width; n += L)
            for (int64_t c = 0; c < a.inputs; c += L) {
                const int64_t inputs = a.inputs - c < L ? a.inputs - c : L;
                V u[kElements][L] = {};  // by output, of kLanes inputs
                for (int64_t i = 0; i < L && n + i < own; ++i) {
                    const T* const from =
                        static_cast<const T*>(a.weight) + (panel + n + i) * a.output_stride + c * a.input_stride;
                    V w[kTaps] = {}, half[4][3], all[kElements];
                    for (int64_t l = 0; l < inputs; ++l)
                        for (int t = 0; t < kTaps; ++t)
                            w[t][l] = load(from + l * a.input_stride + t * a.tap_stride);
                    for (int j = 0; j < 3; ++j) spread(w[j], w[3 + j], w[6 + j], &half[0][j], 3);
                    for (int r = 0; r < 4; ++r) spread(half[r][0], half[r][1], half[r][2], all + 4 * r, 1);
                    for (int e = 0; e < kElements; ++e) u[e][i] = all[e];
                }
                for (int64_t e = 0; e < kElements; ++e)
                    store_columns(u[e], inputs, to + (e * a.inputs + c) * width + n, width);
            }
    }
}

// B^T x for four elements at a distance.
template <class V>
DICO_INLINE void combine(V a, V b, V c, V d, V* to, int distance) {
    to[0] = a - c;
    to[distance] = b + c;
    to[2 * distance] = c - b;
    to[3 * distance] = b - d;
}
// A^T m of the elements at a distance.
template <class V>
DICO_INLINE void reduce(const V* m, int distance, V& first, V& second) {
    first = m[0] + m[distance] + m[2 * distance];
    second = m[distance] - m[2 * distance] - m[3 * distance];
}

struct Tile {
    int64_t image, h, w;  // of its first output
};
DICO_INLINE Tile tile_of(const WinogradArgs& a, int64_t number) {
    const int64_t across = (a.width + 1) / 2, image = (a.height + 1) / 2 * across;
    return {number / image, number % image / across * 2, number % across * 2};
}

// B^T x B of the pixels under a tile: its row of each element's matrix.
template <class T>
DICO_INLINE void tile_inputs(const WinogradArgs& a, Tile tile, acc_t<T>* to, int64_t element_stride) {
    using V = vec_t<T>;
    const T* from[4][4];
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const int64_t h = tile.h + i - 1, w = tile.w + j - 1;
            const bool inside = h >= 0 && h < a.height && w >= 0 && w < a.width;
            from[i][j] = inside
                             ? static_cast<const T*>(a.x) + ((tile.image * a.height + h) * a.width + w) * a.channels
                             : nullptr;
        }
    each_vector<T>(a.channels, [&](int64_t c, auto lanes) {
        V half[4][4], all[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            V x[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) x[i] = from[i][j] ? vload(from[i][j] + c, lanes) : V{};
            combine(x[0], x[1], x[2], x[3], &half[0][j], 4);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            combine(half[i][0], half[i][1], half[i][2], half[i][3], all, 1);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) vstore(to + (4 * i + j) * element_stride + c, all[j], lanes);
        }
    });
}

// A^T m A + bias of a tile's sums m, a vector of outputs' at `sums`, the next element's at a distance: to those of
// its outputs that are in the image.
template <class T, class Lanes>
DICO_INLINE void tile_outputs(const WinogradArgs& a, Tile tile, const vec_t<T>* sums, int64_t distance,
                              int64_t channel, Lanes lanes) {
    using V = vec_t<T>;
    V half[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const V column[4] = {sums[j * distance], sums[(4 + j) * distance], sums[(8 + j) * distance],
                             sums[(12 + j) * distance]};
        reduce(column, 1, half[0][j], half[1][j]);
    }
    const V plus = a.bias ? vload(static_cast<const T*>(a.bias) + channel, lanes) : V{};
    for (int i = 0; i < 2 && tile.h + i < a.height; ++i) {
        V y[2];
        reduce(half[i], 1, y[0], y[1]);
        const int64_t pixel = (tile.image * a.height + tile.h + i) * a.width + tile.w;
        for (int j = 0; j < 2 && tile.w + j < a.width; ++j)
            vstore(static_cast<T*>(a.y) + (pixel + j) * a.outputs + channel, y[j] + plus, lanes);
    }
}

template <class T>
static void winograd_typed(const WinogradArgs& a, int threads) {
    using A = acc_t<T>;
    using V = vec_t<T>;
    constexpr int L = kLanes<T>;
    const int64_t stride = row_stride_of<A>(a.channels), panels = (a.outputs + kPanel<A> - 1) / kPanel<A>;
    const int64_t element_stride = element_stride_of<A>(a.channels, a.block_tiles);
    Image tiles{1, a.images * ((a.height + 1) / 2) * ((a.width + 1) / 2), a.channels, a.block_tiles};
    threads = threads_for(tiles.rows * kElements * a.channels * a.outputs / kProducts, threads);
    each_part(tiles, a.parts, threads, [&](int64_t, int64_t first, int64_t end, int64_t, int64_t part) {
        A* const inputs =
            static_cast<A*>(a.scratch) + thread_number() * tile_scratch_of<A>(a.channels, a.block_tiles);
        V* const sums = reinterpret_cast<V*>(inputs + kElements * element_stride);
        const int64_t count = end - first;
        for (int64_t t = 0; t < count; ++t)
            tile_inputs<T>(a, tile_of(a, first + t), inputs + t * stride, element_stride);
        for (int64_t p = panels * part / a.parts; p < panels * (part + 1) / a.parts; ++p) {
            const int64_t n = p * kPanel<A>, left = a.outputs - n, own = left < kPanel<A> ? left : kPanel<A>;
            const int64_t vectors = (own + L - 1) / L;
            const A* const packed = static_cast<const A*>(a.packed) + n * kElements * a.channels;
            for (int64_t e = 0; e < kElements; ++e)
                for (int64_t t = 0; t < count; t += kTileRows)
                    by_count<kTileRows>(count - t < kTileRows ? count - t : kTileRows, [&](auto r) {
                        by_count<kTileVectors>(vectors, [&](auto v) {
                            multiply_tile<decltype(r)::value, decltype(v)::value, false>(
                                inputs + e * element_stride + t * stride, stride,
                                packed + e * a.channels * vectors * L, a.channels,
                                sums + (e * count + t) * vectors);
                        });
                    });
            for (int64_t t = 0; t < count; ++t) {
                const Tile tile = tile_of(a, first + t);
                each_vector<T>(own, [&](int64_t c, auto lanes) {
                    tile_outputs<T>(a, tile, sums + t * vectors + c / L, count * vectors, n + c, lanes);
                });
            }
        }
    });
}

static void winograd_pack(Dtype dtype, const WinogradPackArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { winograd_pack_typed<typename decltype(tag)::type>(a, threads); });
}
static void winograd(Dtype dtype, const WinogradArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { winograd_typed<typename decltype(tag)::type>(a, threads); });
}
