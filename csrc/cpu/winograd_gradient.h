// The gradient of a 3x3 convolution's weight by the same algorithm as winograd.h: of y = A^T [sum U * V] A, with
// U = G w G^T and V = B^T x B, it is
//
//     dw = G^T [ sum over tiles of (A dy A^T) * V ] G,    * elementwise:
//
// for each of the 16 elements a matrix product over a quarter of the pixels, where the definition has 9 over all.
// Included inside the namespace of one instruction set.

// Where scratch has what: in elements of the accumulation's dtype, but for the products' own at the end.
template <class A>
struct WinogradGradientPlan {
    int64_t matrix, inputs, outputs;  // from one element's matrix to the next's: of sums, of x's tiles and of dy's
    int64_t inputs_at, outputs_at, products_at;

    WinogradGradientPlan(int64_t channels, int64_t out_channels, int64_t tiles) {
        constexpr int64_t kLine = 64 / sizeof(A);
        // A line more, or the elements' would share too few sets of the cache.
        const auto lines = [](int64_t n) { return (n + kLine - 1) / kLine * kLine + kLine; };
        matrix = lines(out_channels * channels);
        inputs = lines(tiles * channels);
        outputs = lines(tiles * out_channels);
        inputs_at = kElements * matrix;
        outputs_at = inputs_at + kElements * inputs;
        products_at = outputs_at + kElements * outputs;
    }
};

static int64_t winograd_gradient_scratch(Dtype dtype, int64_t channels, int64_t outputs, int64_t block_tiles) {
    int64_t bytes = 0;
    by_dtype(dtype, [&](auto tag) {
        using A = acc_t<typename decltype(tag)::type>;
        bytes = WinogradGradientPlan<A>(channels, outputs, block_tiles).products_at * sizeof(A) +
                GradientPlan<A>(1, block_tiles, outputs, channels).bytes;
    });
    return bytes;
}

// A d for two elements, to four at a distance.
template <class V>
DICO_INLINE void expand(V a, V b, V* to, int distance) {
    to[0] = a;
    to[distance] = a + b;
    to[2 * distance] = a - b;
    to[3 * distance] = -b;
}
// G^T u of four elements at a distance.
template <class V>
DICO_INLINE void gather(const V* u, int distance, V* to, int to_distance) {
    const V sum = (u[distance] + u[2 * distance]) / 2, difference = (u[distance] - u[2 * distance]) / 2;
    to[0] = u[0] + sum;
    to[to_distance] = difference;
    to[2 * to_distance] = sum + u[3 * distance];
}

// A dy A^T of a tile: its row of each element's matrix. What lies outside of the image is zero.
template <class T>
DICO_INLINE void tile_gradients(const WinogradGradientArgs& a, Tile tile, acc_t<T>* to, int64_t element_stride) {
    using V = vec_t<T>;
    const T* from[2][2];
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) {
            const int64_t h = tile.h + i, w = tile.w + j;
            from[i][j] = h < a.height && w < a.width
                             ? static_cast<const T*>(a.dy) + ((tile.image * a.height + h) * a.width + w) * a.outputs
                             : nullptr;
        }
    each_vector<T>(a.outputs, [&](int64_t k, auto lanes) {
        V half[4][2], all[4];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j)
            expand(from[0][j] ? vload(from[0][j] + k, lanes) : V{}, from[1][j] ? vload(from[1][j] + k, lanes) : V{},
                   &half[0][j], 2);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            expand(half[i][0], half[i][1], all, 1);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) vstore(to + (4 * i + j) * element_stride + k, all[j], lanes);
        }
    });
}

// G^T u G of the sums of one output: its row of dW, (channels, 9).
template <class T>
DICO_INLINE void weight_row(const acc_t<T>* sums, int64_t element_stride, int64_t channels, T* dweight) {
    using V = vec_t<T>;
    constexpr int L = kLanes<T>, kTaps = 9;
    each_vector<T>(channels, [&](int64_t c, auto lanes) {
        V u[kElements], half[3][4], taps[kTaps];
#pragma GCC unroll 16
        for (int e = 0; e < kElements; ++e) u[e] = vload(sums + e * element_stride + c, lanes);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) gather(u + j, 4, &half[0][j], 4);
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) gather(half[i], 1, taps + 3 * i, 1);
        acc_t<T> rows[kTaps * L];
        for (int t = 0; t < kTaps; ++t)
            for (int l = 0; l < L; ++l) rows[l * kTaps + t] = taps[t][l];
        each_vector<T>((channels - c < L ? channels - c : L) * kTaps,
                       [&](int64_t i, auto part) { vstore(dweight + c * kTaps + i, vload(rows + i, part), part); });
    });
}

template <class T>
static void winograd_gradient_typed(const WinogradGradientArgs& a, int threads) {
    using A = acc_t<T>;
    const WinogradGradientPlan<A> plan(a.channels, a.outputs, a.block_tiles);
    A* const sums = static_cast<A*>(a.scratch);
    A* const inputs = sums + plan.inputs_at;
    A* const outputs = sums + plan.outputs_at;
    WinogradArgs image{};
    image.x = a.x;
    image.height = a.height, image.width = a.width, image.channels = a.channels;
    const int64_t tiles = a.images * ((a.height + 1) / 2) * ((a.width + 1) / 2);
    for (int64_t first = 0; first < tiles; first += a.block_tiles) {
        const int64_t count = tiles - first < a.block_tiles ? tiles - first : a.block_tiles;
        const int for_tiles = threads_for(count * kElements * (a.channels + a.outputs), threads);
#pragma omp parallel for schedule(static) num_threads(for_tiles) if (for_tiles > 1)
        for (int64_t t = 0; t < count; ++t) {
            const Tile tile = tile_of(image, first + t);
            tile_inputs<T>(image, tile, inputs + t * a.channels, plan.inputs);
            tile_gradients<T>(a, tile, outputs + t * a.outputs, plan.outputs);
        }
        for (int64_t e = 0; e < kElements; ++e) {
            WeightGradientArgs product{};
            product.dy = outputs + e * plan.outputs;
            product.x = inputs + e * plan.inputs;
            product.dweight = sums + e * plan.matrix;
            product.scratch = sums + plan.products_at;
            product.samples = 1, product.pixels = count;
            product.outputs = a.outputs, product.inputs = a.channels;
            product.wide = 1, product.add = first > 0;
            weight_gradient_typed<false, false, A>(product, threads);
        }
    }
    const int for_rows = threads_for(a.outputs * a.channels * kElements, threads);
#pragma omp parallel for schedule(static) num_threads(for_rows) if (for_rows > 1)
    for (int64_t k = 0; k < a.outputs; ++k)
        weight_row<T>(sums + k * a.channels, plan.matrix, a.channels,
                      static_cast<T*>(a.dweight) + k * a.channels * 9);
}

static void winograd_gradient(Dtype dtype, const WinogradGradientArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { winograd_gradient_typed<typename decltype(tag)::type>(a, threads); });
}
