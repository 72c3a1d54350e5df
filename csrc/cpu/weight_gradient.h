// What G_n = dy_n^T x_n holds of the gradients of gate * (W (s x) + b): dW = sum_n gate_n G_n s_n, dgate_n = b
// sum(dy_n) + the sums of the rows of W * G_n s_n, ds_n = those of the columns of gate_n W * G_n. In one pass over
// products that the library formed, or formed here, a tile at a time and never stored; the latter without a gate
// too. Included inside the namespace of one instruction set.

// Of a vector of a row of G_n: what it adds to dW; what to the row's sum and to the columns' is added there. `by`
// is the row's gate.
template <bool Scaled, class T, class Lanes>
DICO_INLINE vec_t<T> use_products(vec_t<T> product, acc_t<T> by, vec_t<T> scale, const T* weight, vec_t<T>& dots,
                                  vec_t<T>& column, Lanes lanes) {
    const vec_t<T> weighted = product * vload(weight, lanes);
    if constexpr (Scaled) {
        column += weighted * by;
        dots += weighted * scale;
        return product * by * scale;
    } else {
        dots += weighted;
        return product * by;
    }
}

// A few rows of W at a time, which stay in the cache from sample to sample; the sums over all rows are put together
// in the order of the blocks.
template <bool Scaled, class T>
static void gated_products_typed(const GatedProductsArgs& a, int threads) {
    using A = acc_t<T>;
    using V = vec_t<T>;
    constexpr int kRows = 4;
    const T* products = static_cast<const T*>(a.products);
    const T* weight = static_cast<const T*>(a.weight);
    A* dweight = static_cast<A*>(a.dweight);
    A* dgate = static_cast<A*>(a.dgate);
    A* partial = static_cast<A*>(a.partial);
    const A* sums_of_dy = static_cast<const A*>(a.sums);
    const T* bias = static_cast<const T*>(a.bias);
    const int64_t blocks = (a.outputs + a.block_rows - 1) / a.block_rows;
    threads = threads_for(a.samples * a.outputs * a.inputs, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * a.block_rows;
        const int64_t end = first + a.block_rows < a.outputs ? first + a.block_rows : a.outputs;
        for (int64_t n = 0; n < a.samples; ++n) {
            const T* gate = static_cast<const T*>(a.gate) + n * a.gate_stride;
            const A* s = Scaled ? static_cast<const A*>(a.s) + n * a.inputs : nullptr;
            A* sums = Scaled ? partial + (block * a.samples + n) * a.inputs : nullptr;
            if constexpr (Scaled)
                for (int64_t c = 0; c < a.inputs; ++c) sums[c] = 0;
            const auto rows = [&](int64_t k, auto count) {
                constexpr int R = decltype(count)::value;
                V dots[R] = {};
                A by[R];
                for (int r = 0; r < R; ++r) by[r] = load(gate + k + r);
                each_vector<T>(a.inputs, [&](int64_t c, auto lanes) {
                    V column = {}, scale = {};
                    if constexpr (Scaled) scale = vload(s + c, lanes);
                    for (int r = 0; r < R; ++r) {
                        const int64_t at = (k + r) * a.inputs + c;
                        V gated = use_products<Scaled>(vload(products + n * a.outputs * a.inputs + at, lanes),
                                                       by[r], scale, weight + at, dots[r], column, lanes);
                        if (n || a.add) gated += vload(dweight + at, lanes);
                        vstore(dweight + at, gated, lanes);
                    }
                    if constexpr (Scaled) vstore(sums + c, vload(sums + c, lanes) + column, lanes);
                });
                for (int r = 0; r < R; ++r) {
                    const int64_t at = n * a.outputs + k + r;
                    dgate[at] = sum_of(dots[r]) + (bias ? sums_of_dy[at] * load(bias + k + r) : A{});
                }
            };
            int64_t k = first;
            for (; k + kRows <= end; k += kRows) rows(k, Count<kRows>{});
            for (; k < end; ++k) rows(k, Count<1>{});
        }
    }
    if constexpr (Scaled) sum_parts(partial, blocks, a.samples * a.inputs, static_cast<A*>(a.dscale));
}

// Outputs of dy that are packed side by side: whole tiles, whole vectors. Read where they lie, a tile's would be as
// far apart as rows of dy are: by a power of two, and then they share too few sets of the cache.
constexpr int64_t kStrip = 48;
template <class T>
constexpr bool kStripFits = kStrip % kTileRows == 0 && kStrip % kLanes<T> == 0;
static_assert(kStripFits<double> && kStripFits<float>);

// Pixels that one chain of additions runs over, a pair of them at a time: digits get lost with its length. And
// tiles of a strip that are formed by turns, a segment each: where few vectors a pixel are multiplied, the
// first-level cache has to hold a segment's panel and what is read of a strip, or the second-level cache is the
// bound.
#if defined(__AVX512F__)
constexpr int64_t kChain = 256, kTurns = 1;
#else
constexpr int64_t kChain = 128, kTurns = kStrip / kTileRows;
#endif
template <class T>
constexpr int64_t kSegment = kChain * kPair<T>;

// How the work of weight_gradient is divided, by shape alone, and where its scratch has what; in bytes.
template <class T>
struct GradientPlan {
    int64_t strips, panels, segments;  // of outputs, of inputs, and of a sample's pixels
    int64_t depth;                     // of a segment, with zeros that fill up the last pair
    int64_t parts, run, together;      // of a sample, packed one after another; segments of one; samples of one
    int64_t tiles, blocks;             // of outputs: blocks of whole tiles, some of them a tile longer
    int64_t strip_size, panel_size;    // elements of a segment's
    int64_t row_sums, column_sums, unfinished, strips_at, panels_at, bytes;

    GradientPlan(int64_t samples, int64_t pixels, int64_t outputs, int64_t inputs) {
        constexpr int64_t kUnits = 8, kMoreUnits = 32, kRows = 96, kElement = sizeof(operand_t<T>),
                          kSum = sizeof(acc_t<T>);
        // Of a panel: what the second-level cache holds beside a strip. Of all: not much beside the activations.
        constexpr int64_t kTogetherBytes = 1 << 18, kAllBytes = 3 << 21;
        const auto up = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
        const auto lines = [&](int64_t n) { return up(n, 64) * 64; };
        strips = up(outputs, kStrip);
        panels = up(inputs, kPanel<T>);
        segments = up(pixels, kSegment<T>);
        depth = depth_of<T>(segments > 1 ? kSegment<T> : pixels);
        strip_size = depth * kStrip;
        panel_size = depth * kPanel<T>;
        const int64_t all = kAllBytes / ((strips * strip_size + panels * panel_size) * kElement);
        int64_t most = kTogetherBytes / (panel_size * kElement);
        if (most > all) most = all;
        if (most < 1) most = 1;
        parts = up(segments, most);
        run = up(segments, parts);
        together = parts > 1 ? 1 : most / segments;
        if (together > samples) together = samples;
        tiles = up(outputs, kTileRows);
        // As much work for each of 2, 4 or 8 threads; more units for a large machine, where a panel stays in use.
        int64_t step = kUnits;
        for (int64_t n = panels; step > 1 && n % 2 == 0; n /= 2) step /= 2;
        blocks = up(up(kMoreUnits, panels), step) * step;
        while (blocks > step && outputs / blocks < kRows) blocks -= step;
        if (blocks > tiles) blocks = tiles;
        row_sums = 0;
        column_sums = row_sums + lines(panels * parts * samples * outputs * kSum);
        unfinished = column_sums + lines(blocks * parts * samples * inputs * kSum);
        const bool at_once = parts == 1 && together == samples;
        strips_at = unfinished + (!at_once && sizeof(T) < kSum ? lines(outputs * inputs * kSum) : 0);
        panels_at = strips_at + lines(together * run * strips * strip_size * kElement);
        bytes = panels_at + together * run * panels * panel_size * kElement;
    }
};

static int64_t weight_gradient_scratch(Dtype dtype, int64_t samples, int64_t pixels, int64_t outputs,
                                       int64_t inputs) {
    int64_t bytes = 0;
    by_dtype(dtype, [&](auto tag) {
        bytes = GradientPlan<typename decltype(tag)::type>(samples, pixels, outputs, inputs).bytes;
    });
    return bytes;
}

// The pixels of a part of a sample, or of some whole samples, are packed by all threads, for all of them; then
// units are a panel of inputs by a block of outputs. All that is wanted is linear in G_n, so what a part of a
// sample adds to it is added up like a sample's.
template <bool Gated, bool Scaled, class T>
static void weight_gradient_typed(const WeightGradientArgs& a, int threads) {
    using A = acc_t<T>;
    using V = vec_t<T>;
    using E = operand_t<T>;
    constexpr int L = kLanes<T>;
    const GradientPlan<T> plan(a.samples, a.pixels, a.outputs, a.inputs);
    char* const scratch = static_cast<char*>(a.scratch);
    const T* const weight = static_cast<const T*>(a.weight);
    const T* const shift = static_cast<const T*>(a.shift);
    // Between one time and the next, where that is not what is asked for.
    const bool narrow = sizeof(T) < sizeof(A) && !a.wide;
    A* const dweight = reinterpret_cast<A*>(narrow ? scratch + plan.unfinished : a.dweight);
    T* const finished = static_cast<T*>(a.dweight);
    A* const row_sums = reinterpret_cast<A*>(scratch + plan.row_sums);
    A* const column_sums = reinterpret_cast<A*>(scratch + plan.column_sums);
    E* const strips = reinterpret_cast<E*>(scratch + plan.strips_at);
    E* const panels = reinterpret_cast<E*>(scratch + plan.panels_at);
    const auto pixels_of = [&](int64_t segment) {
        const int64_t left = a.pixels - segment * kSegment<T>;
        return left < kSegment<T> ? left : kSegment<T>;
    };
    const auto panel_width = [&](int64_t panel) {
        const int64_t left = a.inputs - panel * kPanel<T>;
        return left < kPanel<T> ? left : kPanel<T>;
    };
    // What has been packed of a strip or a panel, of the i-th sample and segment of those that were.
    const auto strip_at = [&](int64_t i, int64_t strip) {
        return strips + (i * plan.strips + strip) * plan.strip_size;
    };
    const auto panel_at = [&](int64_t i, int64_t panel) {
        return panels + (i * plan.panels + panel) * plan.panel_size;
    };
    const auto pack_pixels = [&](const void* from, int64_t channels, int64_t n, int64_t segment, int64_t first,
                                 int64_t width, E* to, int64_t to_width) {
        const int64_t row = n * a.pixels + segment * kSegment<T>;
        pack_rows<T>(static_cast<const T*>(from) + row * channels + first, width, pixels_of(segment), channels, to,
                     to_width);
    };
    // What a tile of a part of G_n adds to one of dW and to the sums.
    const auto use = [&](const V* products, int64_t n, int64_t part, int64_t panel, int64_t block, int64_t k,
                         int64_t count, bool first, V* gradient) {
        const int64_t c0 = panel * kPanel<T>, width = panel_width(panel), vectors = (width + L - 1) / L;
        const T* const gate = static_cast<const T*>(a.gate) + n * a.gate_stride + k;
        const A* const s = Scaled ? static_cast<const A*>(a.s) + n * a.inputs + c0 : nullptr;
        A* const columns =
            Scaled ? column_sums + ((block * plan.parts + part) * a.samples + n) * a.inputs + c0 : nullptr;
        V dots[kTileRows] = {};
        each_vector<T>(width, [&](int64_t c, auto lanes) {
            V column = {}, scale = {};
            if constexpr (Scaled) scale = vload(s + c, lanes);
            for (int64_t r = 0; r < count; ++r) {
                const int64_t j = r * vectors + c / L;
                gradient[j] += use_products<Scaled>(only(products[j], lanes), load(gate + r), scale,
                                                    weight + (k + r) * a.inputs + c0 + c, dots[r], column, lanes);
            }
            if constexpr (Scaled) vstore(columns + c, (first ? V{} : vload(columns + c, lanes)) + column, lanes);
        });
        for (int64_t r = 0; r < count; ++r)
            row_sums[((panel * plan.parts + part) * a.samples + n) * a.outputs + k + r] = sum_of(dots[r]);
    };
    const auto step = [&](int64_t n0, int64_t part) {
        const int64_t samples = a.samples - n0 < plan.together ? a.samples - n0 : plan.together;
        const int64_t s0 = part * plan.run, left = plan.segments - s0, run = left < plan.run ? left : plan.run;
        const int64_t both = plan.strips + plan.panels;
        const bool begun = a.add || n0 || part, ends = n0 + samples == a.samples && s0 + run == plan.segments;
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < samples * run * both; ++unit) {
            const int64_t i = unit / both, n = n0 + i / run, segment = s0 + i % run, strip = unit % both;
            if (strip < plan.strips) {
                const int64_t k = strip * kStrip, width = a.outputs - k < kStrip ? a.outputs - k : kStrip;
                pack_pixels(a.dy, a.outputs, n, segment, k, width, strip_at(i, strip), kStrip);
            } else {
                const int64_t panel = strip - plan.strips, width = panel_width(panel);
                pack_pixels(a.x, a.inputs, n, segment, panel * kPanel<T>, width, panel_at(i, panel),
                            (width + L - 1) / L * L);
            }
        }
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < plan.panels * plan.blocks; ++unit) {
            const int64_t panel = unit / plan.blocks, block = unit % plan.blocks;
            const int64_t c0 = panel * kPanel<T>, width = panel_width(panel), vectors = (width + L - 1) / L;
            const int64_t first = plan.tiles * block / plan.blocks * kTileRows;
            const int64_t last = plan.tiles * (block + 1) / plan.blocks * kTileRows;
            const int64_t end = last < a.outputs ? last : a.outputs;
            for (int64_t k = first, rows; k < end; k += rows) {
                rows = kTurns * kTileRows;
                if (rows > kStrip - k % kStrip) rows = kStrip - k % kStrip;
                if (rows > end - k) rows = end - k;
                const auto each_tile = [&](auto body) {
                    for (int64_t t = 0; t * kTileRows < rows; ++t)
                        body(t, k + t * kTileRows,
                             rows - t * kTileRows < kTileRows ? rows - t * kTileRows : kTileRows);
                };
                // Each row of W and dW may be a page of its own: while the tiles are formed they are fetched.
                const auto fetch = [&](auto* of, auto to_write) {
                    constexpr int64_t kLine = 64 / sizeof(*of);
                    for (int64_t r = 0; r < rows; ++r)
                        for (int64_t c = 0; c < width; c += kLine)
                            __builtin_prefetch(of + (k + r) * a.inputs + c0 + c, decltype(to_write)::value);
                };
                if constexpr (Gated) fetch(weight, Count<0>{});
                if (begun || !ends || !narrow) fetch(dweight, Count<1>{});
                if (ends && narrow) fetch(finished, Count<1>{});
                V gradient[kTurns][kTileRows * kTileVectors] = {};
                for (int64_t n = 0; n < samples; ++n) {
                    V own[kTurns][kTileRows * kTileVectors] = {};
                    for (int64_t i = 0; i < run; ++i) {
                        const E* const dy = strip_at(n * run + i, k / kStrip);
                        const E* const x = panel_at(n * run + i, panel);
                        each_tile([&](int64_t t, int64_t row, int64_t count) {
                            by_count<kTileRows>(count, [&](auto r) {
                                by_count<kTileVectors>(vectors, [&](auto v) {
                                    multiply_tile<decltype(r)::value, decltype(v)::value, true>(
                                        dy + row % kStrip * kPair<T>, kStrip * kPair<T>, x,
                                        depth_of<T>(pixels_of(s0 + i)), Gated ? own[t] : gradient[t]);
                                });
                            });
                        });
                    }
                    if constexpr (Gated)
                        each_tile([&](int64_t t, int64_t row, int64_t count) {
                            use(own[t], n0 + n, part, panel, block, row, count, row == first, gradient[t]);
                        });
                }
                for (int64_t r = 0; r < rows; ++r) {
                    const A by = shift ? static_cast<const A*>(a.gated)[k + r] : A{};
                    each_vector<T>(width, [&](int64_t c, auto lanes) {
                        const int64_t at = (k + r) * a.inputs + c0 + c;
                        V sum = gradient[r / kTileRows][r % kTileRows * vectors + c / L];
                        if (begun) sum += vload(dweight + at, lanes);
                        if (ends && shift) sum += vload(shift + c0 + c, lanes) * by;
                        if (ends && narrow)
                            vstore(finished + at, sum, lanes);
                        else
                            vstore(dweight + at, sum, lanes);
                    });
                }
            }
        }
    };
    threads = threads_for(a.samples * a.pixels * a.outputs * a.inputs / kProducts, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t n0 = 0; n0 < a.samples; n0 += plan.together)
        for (int64_t part = 0; part < plan.parts; ++part) step(n0, part);
    if constexpr (Gated) {
        A* const dgate = static_cast<A*>(a.dgate);
        const A* const sums_of_dy = static_cast<const A*>(a.sums);
        const T* const bias = static_cast<const T*>(a.bias);
        sum_parts(row_sums, plan.panels * plan.parts, a.samples * a.outputs, dgate);
        if (bias)
            for (int64_t i = 0; i < a.samples * a.outputs; ++i)
                dgate[i] += sums_of_dy[i] * load(bias + i % a.outputs);
    }
    if constexpr (Scaled)
        sum_parts(column_sums, plan.blocks * plan.parts, a.samples * a.inputs, static_cast<A*>(a.dscale));
}

static void gated_products(Dtype dtype, const GatedProductsArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        a.s ? gated_products_typed<true, T>(a, threads) : gated_products_typed<false, T>(a, threads);
    });
}
static void weight_gradient(Dtype dtype, const WeightGradientArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (a.s)
            weight_gradient_typed<true, true, T>(a, threads);
        else
            a.gate ? weight_gradient_typed<true, false, T>(a, threads)
                   : weight_gradient_typed<false, false, T>(a, threads);
    });
}
