// 1x1 convolutions as this package's own matrix products, with what stands before and behind them inside: y =
// epilogue(prologue(x) W^T + b). Before: adaLN, a scale per sample and channel, or nothing; behind: GELU with the
// sums of its squares, or the gated residual. A block of rows goes through the prologue into a buffer that the
// second-level cache holds, tiles of its product through the epilogue while they are in the first. Included inside
// the namespace of one instruction set.
//
// Every output of theirs is one chain of multiply-adds over the inputs in their order, whatever its tile: results
// depend neither on the division of the rows nor on the number of threads; sums of squares on the division, which
// is the shape's.

// A tile of outputs: its sums, a row of W's panel and one input fill the registers.
constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

template <class T>
constexpr int64_t kPanel = kTileVectors * kLanes<T>;

// Inputs, with the zeros that fill up the last pair.
template <class T>
DICO_INLINE int64_t depth_of(int64_t inputs) {
    return (inputs + kPair<T> - 1) / kPair<T> * kPair<T>;
}
// Of a row of the buffer: a line more than the inputs, or rows of a power of two share too few sets of the cache.
template <class T>
DICO_INLINE int64_t row_stride_of(int64_t inputs) {
    constexpr int64_t kLine = 64 / sizeof(operand_t<T>);
    return (inputs + kLine - 1) / kLine * kLine + kLine;
}

static int64_t packed_size(Dtype dtype, int64_t outputs, int64_t inputs) {
    int64_t bytes = 0;
    by_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const int64_t whole = (outputs + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
        bytes = whole * depth_of<T>(inputs) * static_cast<int64_t>(sizeof(operand_t<T>));
    });
    return bytes;
}
static int64_t pointwise_scratch(Dtype dtype, int64_t inputs, int64_t hidden, int64_t block_rows, int threads) {
    int64_t bytes = 0;
    by_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const int64_t row = row_stride_of<T>(inputs) + (hidden ? row_stride_of<T>(hidden) : 0);
        bytes = threads * block_rows * row * static_cast<int64_t>(sizeof(operand_t<T>));
    });
    return bytes;
}

template <class T>
DICO_INLINE vec_t<T> rounded(vec_t<T> v) {
    T stored[kLanes<T>];
    vstore(stored, v);
    return vload(stored);
}

template <class T>
DICO_INLINE void copy_operand(operand_t<T>* to, const T* from) {
    if constexpr (sizeof(operand_t<T>) == sizeof(T)) {
        __builtin_memcpy(to, from, sizeof(T));
    } else {
        *to = load(from);
    }
}

// The halves of the words of a vector.
using vhalves = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

// Rows become columns: by halves, that of each row's elements which belong to another row changes places with it.
#if !defined(__clang__)
template <int step = 1>
DICO_INLINE void transpose(vuint* rows) {
    constexpr int L = kLanes<float>;
    if constexpr (step < L) {
        vuint low, high;
        for (int i = 0; i < L; ++i) {
            low[i] = static_cast<uint32_t>(i & step ? i - step + L : i);
            high[i] = static_cast<uint32_t>(i & step ? i + L : i + step);
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
            if (!(i & step)) {
                const vuint a = rows[i], b = rows[i + step];
                rows[i] = __builtin_shuffle(a, b, low);
                rows[i + step] = __builtin_shuffle(a, b, high);
            }
        transpose<step * 2>(rows);
    }
}
#endif

// Of kLanes columns of W^T, or what is left of them, W's elements (output, input) lying in any strides: for each
// pair of inputs (or each one) from the k-th on the columns' elements next to one another, zero past the last,
// `width` columns from the next.
template <class T>
DICO_INLINE void pack_elements(const T* from, int64_t outputs, int64_t inputs, int64_t output_stride,
                               int64_t input_stride, operand_t<T>* to, int64_t width, int64_t k) {
    for (; k < depth_of<T>(inputs); ++k)
        for (int64_t n = 0; n < kLanes<T>; ++n) {
            operand_t<T>* const at = to + (k / kPair<T> * width + n) * kPair<T> + k % kPair<T>;
            if (n < outputs && k < inputs)
                copy_operand<T>(at, from + n * output_stride + k * input_stride);
            else
                *at = operand_t<T>{};
        }
}

// As many columns as there are outputs, along the rows of W: a column of lines of memory is what no processor
// foresees.
template <class T>
DICO_INLINE void pack_columns(const T* from, int64_t outputs, int64_t inputs, int64_t output_stride,
                              int64_t input_stride, operand_t<T>* to, int64_t width) {
    using E = operand_t<T>;
    for (int64_t n = 0; n < outputs; n += kLanes<T>) {
        const T* const own = from + n * output_stride;
        E* const at = to + n * kPair<T>;
        int64_t k = 0;
#if !defined(__clang__)  // which has another name for the shuffle
        constexpr int L = kLanes<float>, kInputs = L * kPair<T>;
        if constexpr (sizeof(E) == sizeof(T) && sizeof(T) * kPair<T> == sizeof(uint32_t))
            if (input_stride == 1 && L <= outputs - n)
                for (; k + kInputs <= inputs; k += kInputs) {
                    vuint rows[L];
                    for (int i = 0; i < L; ++i)
                        __builtin_memcpy(&rows[i], own + i * output_stride + k, sizeof rows[i]);
                    transpose(rows);
                    for (int i = 0; i < L; ++i)
                        __builtin_memcpy(at + (k + i * kPair<T>)*width, &rows[i], sizeof rows[i]);
                }
#endif
        pack_elements<T>(own, outputs - n, inputs, output_stride, input_stride, at, width, k);
    }
}

// As pack_columns, of columns that lie densely, as those of a transpose do: along the rows of W^T.
template <class T>
DICO_INLINE void pack_rows(const T* from, int64_t outputs, int64_t inputs, int64_t input_stride, operand_t<T>* to,
                           int64_t width) {
    constexpr int64_t kAhead = 8 * kPair<T>, kLine = 64 / sizeof(T);
    const int64_t whole = outputs / kLanes<T> * kLanes<T>;
    int64_t k = 0;
    for (; k + kPair<T> <= inputs; k += kPair<T>) {
        const T* const row = from + k * input_stride;
        operand_t<T>* const at = to + k * width;
        for (int i = 0; i < kPair<T>; ++i)
            for (int64_t n = 0; n < whole; n += kLine) __builtin_prefetch(row + (kAhead + i) * input_stride + n);
        for (int64_t n = 0; n < whole; n += kLanes<T>) {
            if constexpr (kPair<T> == 2) {
                vhalves low, high;
                __builtin_memcpy(&low, row + n, sizeof low);
                __builtin_memcpy(&high, row + input_stride + n, sizeof high);
                const vuint pairs = __builtin_convertvector(low, vuint) | __builtin_convertvector(high, vuint)
                                                                              << 16;
                __builtin_memcpy(at + n * 2, &pairs, sizeof pairs);
            } else {
                vstore(at + n, vload(row + n));
            }
        }
    }
    for (int64_t n = 0; n < outputs; n += kLanes<T>)
        pack_elements<T>(from + n, outputs - n, inputs, 1, input_stride, to + n * kPair<T>, width,
                         n < whole ? k : 0);
}

// W (outputs, inputs), in any strides, as panels of kPanel outputs, the last one narrower.
template <class T>
static void pack_typed(const PackArgs& a, int threads) {
    const int64_t depth = depth_of<T>(a.inputs);
    threads = threads_for(a.outputs * depth, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < a.outputs; n += kPanel<T>) {
        const int64_t left = a.outputs - n, own = left < kPanel<T> ? left : kPanel<T>;
        const int64_t width = (own + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
        const T* const from = static_cast<const T*>(a.weight) + n * a.output_stride;
        operand_t<T>* const to = static_cast<operand_t<T>*>(a.packed) + n * depth;
        if (a.output_stride == 1)
            pack_rows<T>(from, own, a.inputs, a.input_stride, to, width);
        else
            pack_columns<T>(from, own, a.inputs, a.output_stride, a.input_stride, to, width);
    }
}

// sums[i * V + j] = the product of row i of a and vector j of the panel's outputs. With Across a is held as packed
// columns are, one pair of all rows `stride` from the next, and the product is added to what is there.
template <int R, int V, bool Across, class E>
static __attribute__((noinline)) void multiply_tile(const E* a, int64_t stride, const E* panel, int64_t depth,
                                                    vec_t<E>* sums) {
    constexpr int kLine = kLanes<E> * kPair<E>;
    const auto at = [=](int i, int64_t k) {
        return a + (Across ? k / kPair<E> * stride + i * kPair<E> : i * stride + k);
    };
    vec_t<E> sum[R][V] = {};
    for (int64_t k = 0; k < depth; k += kPair<E>, panel += V * kLine) {
#if defined(__AVX512BF16__)
        if constexpr (kPair<E> == 2) {
            __m512bh column[V];
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) __builtin_memcpy(&column[j], panel + j * kLine, sizeof column[j]);
#pragma GCC unroll 6
            for (int i = 0; i < R; ++i) {
                int pair;
                __builtin_memcpy(&pair, at(i, k), sizeof pair);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int j = 0; j < V; ++j)
                    sum[i][j] = (vfloat)_mm512_dpbf16_ps((__m512)sum[i][j], both, column[j]);
            }
        } else
#endif
        {
            vec_t<E> column[V];
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) column[j] = vload(panel + j * kLine);
#pragma GCC unroll 6
            for (int i = 0; i < R; ++i) {
                const vec_t<E> all = *at(i, k) - vec_t<E>{};
#pragma GCC unroll 4
                for (int j = 0; j < V; ++j) sum[i][j] += all * column[j];
            }
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sums[i * V + j] = Across ? sums[i * V + j] + sum[i][j] : sum[i][j];
}

// emit(first row, rows, channel, sums, distance of one row's sums from the next's, lanes), a vector of channels at
// a time, for the columns of a W^T from `begin`, where a panel does, to `end`.
template <class T, class Emit>
DICO_INLINE void product(const operand_t<T>* a, int64_t stride, int64_t rows, const operand_t<T>* packed,
                         int64_t inputs, int64_t begin, int64_t end, Emit emit) {
    constexpr int L = kLanes<T>;
    const int64_t depth = depth_of<T>(inputs);
    vec_t<T> sums[kTileRows * kTileVectors];
    for (int64_t n = begin; n < end; n += kPanel<T>) {
        const int64_t left = end - n;
        const int64_t vectors = left < kPanel<T> ? (left + L - 1) / L : kTileVectors;
        for (int64_t m = 0; m < rows; m += kTileRows) {
            const int64_t count = rows - m < kTileRows ? rows - m : kTileRows;
            by_count<kTileRows>(count, [&](auto r) {
                by_count<kTileVectors>(vectors, [&](auto v) {
                    multiply_tile<decltype(r)::value, decltype(v)::value, false>(a + m * stride, stride,
                                                                                 packed + n * depth, depth, sums);
                });
            });
            each_vector<T>(left < kPanel<T> ? left : kPanel<T>,
                           [&](int64_t c, auto lanes) { emit(m, count, n + c, sums + c / L, vectors, lanes); });
        }
    }
}

// Rows of cat[PixelShuffle2(up), skip], for the two rows of pixels that one of up becomes: pixels [first, end).
// Pixel 2w + j of row i has the elements 4c + 2i + j of up's pixel w, so two neighbours are read at a time.
template <class T>
DICO_INLINE void shuffled_rows(const T* up, const T* skip, int64_t width, int64_t channels, int64_t skip_channels,
                               int64_t first, int64_t end, operand_t<T>* to, int64_t stride) {
    for (int64_t pixel = first; pixel < end;) {
        const int64_t i = pixel / (2 * width), j = pixel % 2;
        const T* from = up + pixel % (2 * width) / 2 * 4 * channels + 2 * i + j;
        operand_t<T>* left = to + (pixel - first) * stride;
        if (j == 0 && pixel + 1 < end) {
            operand_t<T>* right = left + stride;
            for (int64_t c = 0; c < channels; ++c) {
                copy_operand<T>(left + c, from + 4 * c);
                copy_operand<T>(right + c, from + 4 * c + 1);
            }
            pixel += 2;
        } else {
            for (int64_t c = 0; c < channels; ++c) copy_operand<T>(left + c, from + 4 * c);
            ++pixel;
        }
    }
    for (int64_t pixel = first; pixel < end; ++pixel) {
        operand_t<T>* row = to + (pixel - first) * stride + channels;
        for (int64_t c = 0; c < skip_channels; ++c) copy_operand<T>(row + c, skip + pixel * skip_channels + c);
    }
}

// The rows of a block as the product takes them.
template <class S, class T>
DICO_INLINE void prepare(const PointwiseArgs& a, int64_t image, int64_t row, int64_t rows, operand_t<T>* to,
                         int64_t stride, bool keep) {
    using A = acc_t<T>;
    const int64_t at = row * a.channels;
    if (a.skip) {
        const int64_t width = a.rows / 4, channels = a.channels - a.skip_channels, first = row - image * a.rows;
        shuffled_rows<T>(static_cast<const T*>(a.x) + image * width * 4 * channels,
                         static_cast<const T*>(a.skip) + image * a.rows * a.skip_channels, width, channels,
                         a.skip_channels, first, first + rows, to, stride);
    } else if (a.shift) {
        const S* x = static_cast<const S*>(a.x) + at;
        const T* shift = static_cast<const T*>(a.shift) + image * a.shift_stride;
        const T* scale = static_cast<const T*>(a.scale) + image * a.scale_stride;
        A* means = static_cast<A*>(a.mean);
        A* rstds = static_cast<A*>(a.rstd);
        each_group(0, rows, [&](int64_t r0, auto group) {
            constexpr int R = decltype(group)::value;
            const auto found = row_statistics<R, S>(x + r0 * a.channels, a.channels, a.eps);
            modulate_rows<R>(x + r0 * a.channels, shift, scale, to + r0 * stride, stride, a.channels, found);
            if (means && keep)
                for (int r = 0; r < R; ++r)
                    means[row + r0 + r] = found.mean[r], rstds[row + r0 + r] = found.rstd[r];
        });
    } else {
        const T* x = static_cast<const T*>(a.x) + at;
        const A* s = a.s ? static_cast<const A*>(a.s) + image * a.channels : nullptr;
        const T* plus = static_cast<const T*>(a.plus);
        each_row(0, rows, [&](int64_t r) {
            each_vector<T>(a.channels, [&](int64_t c, auto lanes) {
                vec_t<T> v = vload(x + r * a.channels + c, lanes);
                if (s) v *= vload(s + c, lanes);
                if (plus) v += vload(plus + c, lanes);
                vstore(to + r * stride + c, v, lanes);
            });
        });
    }
    for (int64_t c = a.channels; c < depth_of<T>(a.channels); ++c)
        for (int64_t r = 0; r < rows; ++r) to[r * stride + c] = {};
}

template <class S, class T>
static void pointwise_typed(const PointwiseArgs& a, int threads) {
    using A = acc_t<T>;
    using V = vec_t<T>;
    using E = operand_t<T>;
    const int64_t own_stride = row_stride_of<T>(a.channels), hidden_stride = row_stride_of<T>(a.outputs);
    const int64_t scratch = a.block_rows * (own_stride + (a.then ? hidden_stride : 0));
    // With nothing before it the product reads x where it lies, if rows end with a pair and have a factor's type.
    const bool direct =
        !a.skip && !a.shift && !a.s && sizeof(E) == sizeof(T) && depth_of<T>(a.channels) == a.channels;
    const int64_t stride = direct ? a.channels : own_stride;
    const S* residual = static_cast<const S*>(a.residual);
    T* before = static_cast<T*>(a.before);
    A* partial = static_cast<A*>(a.partial);
    const int64_t panels = (a.outputs + kPanel<T> - 1) / kPanel<T>;
    threads = threads_for(a.images * a.rows * a.outputs * (a.channels + a.then_outputs) / kProducts, threads);
    each_part(a, a.parts, threads, [&](int64_t image, int64_t first, int64_t end, int64_t block, int64_t part) {
        const int64_t row0 = image * a.rows + first, count = end - first;
        const int64_t begin = panels * part / a.parts * kPanel<T>;
        const int64_t after = part + 1 < a.parts ? panels * (part + 1) / a.parts * kPanel<T> : a.outputs;
        E* const buffer = static_cast<E*>(a.scratch) + thread_number() * scratch;
        const E* const rows = direct ? static_cast<const E*>(a.x) + row0 * a.channels : buffer;
        A* sums = partial ? partial + block * a.outputs : nullptr;
        if (sums)
            for (int64_t c = begin; c < after; ++c) sums[c] = 0;
        if (!direct) prepare<S, T>(a, image, row0, count, buffer, stride, part == 0);
        const auto plain = [&](auto* y, int64_t y_stride) {
            const T* bias = static_cast<const T*>(a.bias);
            product<T>(rows, stride, count, static_cast<const E*>(a.packed), a.channels, begin, after,
                       [&](int64_t m, int64_t n, int64_t c, const V* from, int64_t next, auto lanes) {
                           const V plus = bias ? vload(bias + c, lanes) : V{};
                           V squares = {};
                           for (int64_t i = 0; i < n; ++i) {
                               V value = from[i * next] + plus;
                               if (before) vstore(before + (row0 + m + i) * a.outputs + c, value, lanes);
                               if (a.gelu) value = gelu<T>(value);
                               auto* to = y + (m + i) * y_stride + c;
                               // As if it had been written: the second product may be a call of its own.
                               if constexpr (sizeof(*to) != sizeof(T)) value = rounded<T>(value);
                               vstore(to, value, lanes);
                               if (sums)
                                   value = vload(to, lanes), squares += value * value;  // of the rounded values
                           }
                           if (sums) vstore(sums + c, vload(sums + c, lanes) + squares, lanes);
                       });
        };
        const auto gated = [&](const E* x, int64_t x_stride, const void* packed, const void* b, int64_t inputs,
                               int64_t from_channel, int64_t to_channel, int64_t outputs) {
            const T* bias = static_cast<const T*>(b);
            const T* gate = static_cast<const T*>(a.gate) + image * a.gate_stride;
            product<T>(x, x_stride, count, static_cast<const E*>(packed), inputs, from_channel, to_channel,
                       [&](int64_t m, int64_t n, int64_t c, const V* from, int64_t next, auto lanes) {
                           const V plus = bias ? vload(bias + c, lanes) : V{}, by = vload(gate + c, lanes);
                           for (int64_t i = 0; i < n; ++i) {
                               const int64_t at = (row0 + m + i) * outputs + c;
                               vstore(static_cast<S*>(a.y) + at,
                                      vload(residual + at, lanes) + by * (from[i * next] + plus), lanes);
                           }
                       });
        };
        if (a.then) {
            E* hidden = buffer + a.block_rows * own_stride;
            plain(hidden, hidden_stride);
            for (int64_t c = a.outputs; c < depth_of<T>(a.outputs); ++c)
                for (int64_t r = 0; r < count; ++r) hidden[r * hidden_stride + c] = E{};
            gated(hidden, hidden_stride, a.then, a.then_bias, a.outputs, 0, a.then_outputs, a.then_outputs);
        } else if (a.gate) {
            gated(rows, stride, a.packed, a.bias, a.channels, begin, after, a.outputs);
        } else {
            plain(static_cast<T*>(a.y) + row0 * a.outputs, a.outputs);
        }
    });
    if (partial) {
        Image images = a;
        images.channels = a.outputs;
        sum_blocks(partial, a.outputs, static_cast<A*>(a.squares), images, threads);
    }
}

static void pack(Dtype dtype, const PackArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { pack_typed<typename decltype(tag)::type>(a, threads); });
}
static void pointwise(Dtype dtype, const PointwiseArgs& a, int threads) {
    by_dtypes(dtype, a.wide_stream, [&](auto stream, auto tag) {
        pointwise_typed<typename decltype(stream)::type, typename decltype(tag)::type>(a, threads);
    });
}
