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

// dy is read where it lies where that is how a factor is held, else as pairs of pixels.
template <class T>
constexpr bool kDirect = sizeof(operand_t<T>) == sizeof(T) && kPair<T> == 1;

// Pixels that one chain of multiply-adds runs over: digits get lost with its length. Whole pairs.
constexpr int64_t kSegment = 256;

// How the work of weight_gradient is divided, by shape alone, and where its scratch has what; in bytes.
template <class T>
struct GradientPlan {
    int64_t segments, depth;       // of a sample, and their pixels, with zeros that fill up the last pair
    int64_t stride;                // of one pair of dy's
    int64_t panels, blocks, rows;  // of inputs; of outputs, and the rows of such a block
    int64_t group;                 // segments whose packed pixels the second-level cache holds
    int64_t row_sums, column_sums, pairs, unfinished, packed, panel_bytes;

    GradientPlan(int64_t samples, int64_t pixels, int64_t outputs, int64_t inputs) {
        constexpr int64_t kUnits = 8, kMoreUnits = 32, kRows = 96, kGroupBytes = 1 << 18,
                          kElement = sizeof(operand_t<T>), kSum = sizeof(acc_t<T>);
        const auto up = [](int64_t n, int64_t of) { return (n + of - 1) / of * of; };
        segments = up(pixels, kSegment) / kSegment;
        depth = depth_of<T>(segments > 1 ? kSegment : pixels);
        stride = kDirect<T> ? outputs : up(outputs, kLanes<T>) * kPair<T>;
        panels = up(inputs, kPanel<T>) / kPanel<T>;
        // For a large machine, where a block's rows then are many enough for the packing of x beside them.
        int64_t wanted = up(kUnits, panels) / panels;
        const int64_t more = up(kMoreUnits, panels) / panels, most = outputs / kRows;
        if (most > wanted) wanted = most < more ? most : more;
        rows = up(up(outputs, wanted) / wanted, kTileRows);
        blocks = up(outputs, rows) / rows;
        row_sums = 0;
        column_sums = row_sums + up(panels * segments * samples * outputs * kSum, 64);
        pairs = column_sums + up(blocks * segments * samples * inputs * kSum, 64);
        unfinished = pairs + (kDirect<T> ? 0 : up(samples * segments * depth / kPair<T> * stride * kElement, 64));
        panel_bytes = depth * kPanel<T> * kElement;
        group = panel_bytes < kGroupBytes ? kGroupBytes / panel_bytes : 1;
        if (group > samples * segments) group = samples * segments;
        packed =
            unfinished + (group < samples * segments && sizeof(T) < kSum ? up(outputs * inputs * kSum, 64) : 0);
    }
};

static int64_t weight_gradient_scratch(Dtype dtype, int64_t samples, int64_t pixels, int64_t outputs,
                                       int64_t inputs, int threads) {
    int64_t bytes = 0;
    by_dtype(dtype, [&](auto tag) {
        const GradientPlan<typename decltype(tag)::type> plan(samples, pixels, outputs, inputs);
        bytes = plan.packed + threads * plan.group * plan.panel_bytes;
    });
    return bytes;
}

// Units are a panel of inputs by a block of outputs: x's pixels as a panel are packed once a unit and segment. All
// that is wanted is linear in G_n, so what a segment of a sample adds to it is added up like a sample's.
template <bool Gated, bool Scaled, class T>
static void weight_gradient_typed(const WeightGradientArgs& a, int threads) {
    using A = acc_t<T>;
    using V = vec_t<T>;
    using E = operand_t<T>;
    constexpr int L = kLanes<T>;
    const GradientPlan<T> plan(a.samples, a.pixels, a.outputs, a.inputs);
    const int64_t depth = plan.depth, stride = plan.stride;
    char* const scratch = static_cast<char*>(a.scratch);
    const T* const x = static_cast<const T*>(a.x);
    const T* const weight = static_cast<const T*>(a.weight);
    const T* const shift = static_cast<const T*>(a.shift);
    // Between one group of segments and the next, where that is not what is asked for.
    A* const dweight = reinterpret_cast<A*>(sizeof(T) < sizeof(A) ? scratch + plan.unfinished : a.dweight);
    T* const finished = static_cast<T*>(a.dweight);
    A* const row_sums = reinterpret_cast<A*>(scratch + plan.row_sums);
    A* const column_sums = reinterpret_cast<A*>(scratch + plan.column_sums);
    E* const pairs = reinterpret_cast<E*>(scratch + plan.pairs);
    const int64_t segments = a.samples * plan.segments;
    const auto first_pixel = [&](int64_t segment) { return segment % plan.segments * kSegment; };
    const auto pixels_of = [&](int64_t segment) {
        const int64_t left = a.pixels - first_pixel(segment);
        return left < kSegment ? left : kSegment;
    };
    const auto first_row = [&](int64_t segment) {
        return segment / plan.segments * a.pixels + first_pixel(segment);
    };
    if constexpr (!kDirect<T>) {
        const int64_t columns = (a.outputs + L - 1) / L;
        const int own = threads_for(a.samples * a.pixels * a.outputs, threads);
#pragma omp parallel for schedule(static) num_threads(own) if (own > 1)
        for (int64_t unit = 0; unit < segments * columns; ++unit) {
            const int64_t g = unit / columns, k = unit % columns * L;
            pack_columns<T>(static_cast<const T*>(a.dy) + first_row(g) * a.outputs + k, a.outputs - k, pixels_of(g),
                            1, a.outputs, pairs + g * depth / kPair<T> * stride + k * kPair<T>, stride / kPair<T>);
        }
    }
    threads = threads_for(a.samples * a.pixels * a.outputs * a.inputs / kProducts, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < plan.panels * plan.blocks; ++unit) {
        const int64_t panel = unit / plan.blocks, block = unit % plan.blocks;
        const int64_t c0 = panel * kPanel<T>, left = a.inputs - c0;
        const int64_t width = left < kPanel<T> ? left : kPanel<T>, vectors = (width + L - 1) / L;
        const int64_t first = block * plan.rows;
        const int64_t end = first + plan.rows < a.outputs ? first + plan.rows : a.outputs;
        E* const packed =
            reinterpret_cast<E*>(scratch + plan.packed + thread_number() * plan.group * plan.panel_bytes);
        const auto use = [&](int64_t g, int64_t k, int64_t count, const E* columns_of_x, V* gradient) {
            const E* dy;
            if constexpr (kDirect<T>)
                dy = static_cast<const E*>(a.dy) + first_row(g) * a.outputs;
            else
                dy = pairs + g * depth / kPair<T> * stride;
            const int64_t own_depth = depth_of<T>(pixels_of(g));
            V products[kTileRows * kTileVectors];
            by_count<kTileRows>(count, [&](auto r) {
                by_count<kTileVectors>(vectors, [&](auto v) {
                    multiply_tile<decltype(r)::value, decltype(v)::value, true>(dy + k * kPair<T>, stride,
                                                                                columns_of_x, own_depth, products);
                });
            });
            if constexpr (!Gated) {
                for (int64_t i = 0; i < count * vectors; ++i) gradient[i] += products[i];
            } else {
                const int64_t n = g / plan.segments, part = g % plan.segments;
                const T* gate = static_cast<const T*>(a.gate) + n * a.gate_stride + k;
                const A* s = Scaled ? static_cast<const A*>(a.s) + n * a.inputs + c0 : nullptr;
                A* columns = nullptr;
                if constexpr (Scaled)
                    columns = column_sums + ((block * plan.segments + part) * a.samples + n) * a.inputs + c0;
                V dots[kTileRows] = {};
                each_vector<T>(width, [&](int64_t c, auto lanes) {
                    V column = {}, scale = {};
                    if constexpr (Scaled) scale = vload(s + c, lanes);
                    for (int64_t r = 0; r < count; ++r) {
                        const int64_t i = r * vectors + c / L;
                        gradient[i] +=
                            use_products<Scaled>(only(products[i], lanes), load(gate + r), scale,
                                                 weight + (k + r) * a.inputs + c0 + c, dots[r], column, lanes);
                    }
                    if constexpr (Scaled)
                        vstore(columns + c, (k > first ? vload(columns + c, lanes) : V{}) + column, lanes);
                });
                for (int64_t r = 0; r < count; ++r)
                    row_sums[((panel * plan.segments + part) * a.samples + n) * a.outputs + k + r] =
                        sum_of(dots[r]);
            }
        };
        for (int64_t g0 = 0; g0 < segments; g0 += plan.group) {
            const int64_t group = segments - g0 < plan.group ? segments - g0 : plan.group;
            for (int64_t g = 0; g < group; ++g)
                for (int64_t c = 0; c < width; c += L)
                    pack_columns<T>(x + first_row(g0 + g) * a.inputs + c0 + c, width - c, pixels_of(g0 + g), 1,
                                    a.inputs, packed + g * depth * kPanel<T> + c * kPair<T>, vectors * L);
            for (int64_t k = first; k < end; k += kTileRows) {
                const int64_t count = end - k < kTileRows ? end - k : kTileRows;
                // Each row of W and dW may be a page of its own: while the tile is formed they are fetched.
                for (int64_t r = 0; r < count; ++r) {
                    constexpr int64_t kLine = 64 / sizeof(T);
                    const int64_t at = (k + r) * a.inputs + c0;
                    for (int64_t c = 0; c < width; c += kLine) {
                        if constexpr (Gated) __builtin_prefetch(weight + at + c);
                        __builtin_prefetch(finished + at + c, 1);
                    }
                }
                V gradient[kTileRows * kTileVectors] = {};
                for (int64_t g = 0; g < group; ++g) use(g0 + g, k, count, packed + g * depth * kPanel<T>, gradient);
                for (int64_t r = 0; r < count; ++r) {
                    const A by = shift ? static_cast<const A*>(a.gated)[k + r] : A{};
                    each_vector<T>(width, [&](int64_t c, auto lanes) {
                        const int64_t at = (k + r) * a.inputs + c0 + c;
                        V sum = gradient[r * vectors + c / L];
                        if (g0) sum += vload(dweight + at, lanes);
                        if (g0 + group < segments) {
                            vstore(dweight + at, sum, lanes);
                        } else {
                            if (shift) sum += vload(shift + c0 + c, lanes) * by;
                            vstore(finished + at, sum, lanes);
                        }
                    });
                }
            }
        }
    }
    if constexpr (Gated) {
        A* const dgate = static_cast<A*>(a.dgate);
        const A* const sums_of_dy = static_cast<const A*>(a.sums);
        const T* const bias = static_cast<const T*>(a.bias);
        sum_parts(row_sums, plan.panels * plan.segments, a.samples * a.outputs, dgate);
        if (bias)
            for (int64_t i = 0; i < a.samples * a.outputs; ++i)
                dgate[i] += sums_of_dy[i] * load(bias + i % a.outputs);
    }
    if constexpr (Scaled)
        sum_parts(column_sums, plan.blocks * plan.segments, a.samples * a.inputs, static_cast<A*>(a.dscale));
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
