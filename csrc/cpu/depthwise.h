// Depthwise convolution, alone or through GELU, forward and backward.
// A unit of work is a block of rows and of channels of one image. Its pixels, with the halo its taps reach, are
// first copied into a zero-bordered scratch of the accumulation type, which fits the second-level cache: after that
// there are no borders, no conversions and no missing channels, only multiply-adds on whole vectors.

constexpr int kVectors = 2;  // vectors of channels in a block: a cache line of bfloat16, two of float
constexpr int kPixels = 4;   // output pixels that share one load of a tap's weight
constexpr int64_t kScratchElements = 48 * 1024;

template <class A>
constexpr int block_channels = kVectors * lanes<A>;

template <class A>
struct Block {
    vec<A> v[kVectors];
};

// An image patch in scratch: rows of `pitch` pixels of block_channels each.
template <class A>
struct Patch {
    A* data;
    int64_t pitch;
    A* at(int64_t row, int64_t column) const { return data + (row * pitch + column) * block_channels<A>; }
};

static inline int64_t up_to(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Output rows of a unit: as many as keep its scratch within the cache, by shape alone.
static inline int64_t depthwise_rows(int64_t height, int64_t width, int k, int64_t channels) {
    const int64_t row = (up_to(width, kPixels) + 2 * (k / 2)) * channels;
    const int64_t rows = kScratchElements / row;
    const int64_t least = 2 * k < height ? 2 * k : height;
    return rows < least ? least : (rows < height ? rows : height);
}

template <class T>
struct DepthwiseUnit {
    using A = acc_t<T>;
    const DepthwiseArgs& a;
    int64_t image, channel, first, last;  // first channel; output rows [first, last)
    int count;                            // channels there are

    DepthwiseUnit(const DepthwiseArgs& args, int64_t unit) : a(args) {
        const int64_t rows = depthwise_rows(a.height, a.width, a.k, block_channels<A>);
        const int64_t row_units = (a.height + rows - 1) / rows;
        const int64_t channel_units = (a.channels + block_channels<A> - 1) / block_channels<A>;
        image = unit / (row_units * channel_units);
        channel = unit / row_units % channel_units * block_channels<A>;
        first = unit % row_units * rows;
        last = first + rows < a.height ? first + rows : a.height;
        const int64_t left = a.channels - channel;
        count = static_cast<int>(left < block_channels<A> ? left : block_channels<A>);
    }

    static int64_t units(const DepthwiseArgs& a) {
        const int64_t rows = depthwise_rows(a.height, a.width, a.k, block_channels<A>);
        return a.images * ((a.channels + block_channels<A> - 1) / block_channels<A>)*((a.height + rows - 1) / rows);
    }

    // body(vector, All or First) for the vectors of the block that hold channels.
    template <class Body>
    inline __attribute__((always_inline)) void vectors(Body body) const {
        for (int i = 0; i < kVectors; ++i) {
            const int left = count - i * lanes<A>;
            if (left >= lanes<A>)
                body(i, All{});
            else if (left > 0)
                body(i, First{left});
        }
    }

    const T* pixel(const void* base, int64_t row, int64_t column) const {
        return static_cast<const T*>(base) + ((image * a.height + row) * a.width + column) * a.channels + channel;
    }
    T* pixel(void* base, int64_t row, int64_t column) const {
        return const_cast<T*>(pixel(static_cast<const void*>(base), row, column));
    }

    // Rows [first - halo, last + halo) into a patch whose column 0 is image column -border; zero outside the image.
    void stage(const void* base, int64_t halo, int64_t border, Patch<A> patch) const {
        const int64_t total = last - first + 2 * halo;
        for (int64_t r = 0; r < total; ++r) {
            const int64_t row = first - halo + r;
            if (row < 0 || row >= a.height) {
                __builtin_memset(patch.at(r, 0), 0, patch.pitch * block_channels<A> * sizeof(A));
                continue;
            }
            __builtin_memset(patch.at(r, 0), 0, border * block_channels<A> * sizeof(A));
            for (int64_t w = 0; w < a.width; ++w) {
                const T* from = pixel(base, row, w);
                A* to = patch.at(r, w + border);
                for (int i = 0; i < kVectors; ++i) store(to + i * lanes<A>, vec<A>{}, All{});
                vectors([&](int i, auto n) { store(to + i * lanes<A>, load(from + i * lanes<A>, n), All{}); });
            }
            const int64_t used = border + a.width;
            __builtin_memset(patch.at(r, used), 0, (patch.pitch - used) * block_channels<A> * sizeof(A));
        }
    }

    // Taps of the block's channels, (k * k, block_channels), missing channels zero; then the bias.
    void stage_weights(A* taps, A* bias, bool flipped) const {
        const int size = a.k * a.k;
        for (int tap = 0; tap < size; ++tap)
            for (int c = 0; c < block_channels<A>; ++c) {
                const int from = flipped ? size - 1 - tap : tap;
                taps[tap * block_channels<A> + c] =
                    c < count ? scalar(a.weight, (channel + c) * size + from) : A(0);
            }
        for (int c = 0; c < block_channels<A>; ++c)
            bias[c] = a.bias && c < count ? scalar(a.bias, channel + c) : A(0);
    }
    static A scalar(const void* base, int64_t index) {
        return load(static_cast<const T*>(base) + index, First{1})[0];
    }
};

// acc[pixel] += sum of taps * patch around (row, column + pixel), kPixels neighbours at once. K: the size when the
// compiler is to know it, else 0.
template <class A, int K>
static inline __attribute__((always_inline)) void correlate(Block<A> (&acc)[kPixels], Patch<A> patch, int64_t row,
                                                            int64_t column, const A* taps, int k) {
    const int size = K ? K : k;
    for (int i = 0; i < size; ++i) {
        const A* line = patch.at(row + i, column);
        const A* tap = taps + i * size * block_channels<A>;
#pragma GCC unroll 9
        for (int j = 0; j < size; ++j) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                const vec<A> w = load(tap + j * block_channels<A> + v * lanes<A>, All{});
#pragma GCC unroll 4
                for (int p = 0; p < kPixels; ++p)
                    acc[p].v[v] += w * load(line + (j + p) * block_channels<A> + v * lanes<A>, All{});
            }
        }
    }
}

template <class A>
static inline void start(Block<A> (&acc)[kPixels], const A* bias) {
    for (int p = 0; p < kPixels; ++p)
        for (int v = 0; v < kVectors; ++v) acc[p].v[v] = load(bias + v * lanes<A>, All{});
}

template <class T, int K>
static void depthwise_forward(const DepthwiseArgs& a, int threads) {
    using A = acc_t<T>;
    using Unit = DepthwiseUnit<T>;
    const int r = a.k / 2;
    const int64_t pitch = up_to(a.width, kPixels) + 2 * r;
    parallel(Unit::units(a), threads, [&](int64_t index) {
        const Unit unit(a, index);
        const int64_t rows = unit.last - unit.first;
        A* scratch = allocate<A>(((rows + 2 * r) * pitch + a.k * a.k + 1) * block_channels<A>);
        const Patch<A> patch{scratch, pitch};
        A* taps = patch.at(rows + 2 * r, 0);
        A* bias = taps + a.k * a.k * block_channels<A>;
        unit.stage(a.x, r, r, patch);
        unit.stage_weights(taps, bias, false);
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t w = 0; w < a.width; w += kPixels) {
                Block<A> acc[kPixels];
                start(acc, bias);
                correlate<A, K>(acc, patch, row, w, taps, a.k);
                for (int p = 0; p < kPixels && w + p < a.width; ++p) {
                    T* out = unit.pixel(a.y, unit.first + row, w + p);
                    unit.vectors([&](int i, auto n) {
                        store(out + i * lanes<A>, a.gelu ? gelu(acc[p].v[i]) : acc[p].v[i], n);
                    });
                }
            }
        release(scratch);
    });
}

// dtaps[i, j] += sum over the unit's pixels of dz * x shifted by (i, j).
template <class A, int K>
static inline void correlate_weights(Patch<A> dz, int64_t border, Patch<A> x, int64_t rows, int64_t width,
                                     int64_t skip, A* dtaps, int k) {
    const int size = K ? K : k;
    for (int i = 0; i < size; ++i)
        for (int v = 0; v < kVectors; ++v) {
            vec<A> acc[K ? K : 9];
            for (int j = 0; j < size; ++j) acc[j] = vec<A>{};
            for (int64_t row = 0; row < rows; ++row) {
                const A* d = dz.at(row + skip, border) + v * lanes<A>;
                const A* line = x.at(row + skip + i, 0) + v * lanes<A>;
                for (int64_t w = 0; w < width; ++w, d += block_channels<A>, line += block_channels<A>) {
                    const vec<A> g = load(d, All{});
#pragma GCC unroll 9
                    for (int j = 0; j < size; ++j) acc[j] += g * load(line + j * block_channels<A>, All{});
                }
            }
            for (int j = 0; j < size; ++j)
                store(dtaps + (i * size + j) * block_channels<A> + v * lanes<A>, acc[j], All{});
        }
}

// dx and, in the workspace, each unit's sums for the taps and the bias: k * k + 1 rows of block_channels.
template <class T, int K>
static void depthwise_backward(const DepthwiseArgs& a, int threads) {
    using A = acc_t<T>;
    using Unit = DepthwiseUnit<T>;
    const int r = a.k / 2, taps_size = a.k * a.k;
    const int64_t width = up_to(a.width, kPixels), pitch = width + 2 * r;
    const int64_t sums_size = (taps_size + 1) * block_channels<A>;
    parallel(Unit::units(a), threads, [&](int64_t index) {
        const Unit unit(a, index);
        const int64_t rows = unit.last - unit.first;
        // dz is needed r rows beyond the unit's own, and x r rows beyond those when z is recomputed. x's patch has
        // the same number of border columns, so that a column means the same in both.
        const int64_t dz_rows = rows + 2 * r, x_rows = rows + 4 * r;
        A* scratch = allocate<A>((dz_rows * pitch + x_rows * pitch + 2 * (taps_size + 1)) * block_channels<A>);
        const Patch<A> dz{scratch, pitch}, x{dz.at(dz_rows, 0), pitch};
        A* taps = x.at(x_rows, 0);
        A* bias = taps + taps_size * block_channels<A>;
        A* flipped = bias + block_channels<A>;
        A* no_bias = flipped + taps_size * block_channels<A>;
        unit.stage(a.dy, r, r, dz);
        unit.stage(a.x, 2 * r, r, x);
        unit.stage_weights(taps, bias, false);
        unit.stage_weights(flipped, no_bias, true);
        if (a.gelu)
            for (int64_t row = 0; row < dz_rows; ++row) {
                const int64_t image_row = unit.first - r + row;
                if (image_row < 0 || image_row >= a.height) continue;
                for (int64_t w = 0; w < a.width; w += kPixels) {
                    Block<A> z[kPixels];
                    start(z, bias);
                    correlate<A, K>(z, x, row, w, taps, a.k);
                    for (int p = 0; p < kPixels && w + p < a.width; ++p) {
                        A* d = dz.at(row, w + p + r);
                        for (int v = 0; v < kVectors; ++v)
                            store(d + v * lanes<A>, load(d + v * lanes<A>, All{}) * gelu_derivative(z[p].v[v]),
                                  All{});
                    }
                }
            }
        A* sums = static_cast<A*>(a.workspace) + index * sums_size;
        correlate_weights<A, K>(dz, r, x, rows, a.width, r, sums, a.k);
        for (int v = 0; v < kVectors; ++v) {
            vec<A> total{};
            for (int64_t row = r; row < r + rows; ++row)
                for (int64_t w = 0; w < a.width; ++w) total += load(dz.at(row, w + r) + v * lanes<A>, All{});
            store(sums + taps_size * block_channels<A> + v * lanes<A>, total, All{});
        }
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t w = 0; w < a.width; w += kPixels) {
                Block<A> acc[kPixels] = {};
                correlate<A, K>(acc, dz, row, w, flipped, a.k);
                for (int p = 0; p < kPixels && w + p < a.width; ++p) {
                    T* out = unit.pixel(a.y, unit.first + row, w + p);
                    unit.vectors([&](int i, auto n) { store(out + i * lanes<A>, acc[p].v[i], n); });
                }
            }
        release(scratch);
    });
    // Units of the same channels, in order.
    const int64_t channel_units = (a.channels + block_channels<A> - 1) / block_channels<A>;
    const int64_t row_units = Unit::units(a) / a.images / channel_units;
    parallel(channel_units, threads, [&](int64_t block) {
        for (int64_t c = block * block_channels<A>; c < (block + 1) * block_channels<A> && c < a.channels; ++c)
            for (int tap = 0; tap <= taps_size; ++tap) {
                A total = 0;
                for (int64_t image = 0; image < a.images; ++image)
                    for (int64_t row = 0; row < row_units; ++row) {
                        const int64_t unit = (image * channel_units + block) * row_units + row;
                        total += static_cast<const A*>(
                            a.workspace)[unit * sums_size + tap * block_channels<A> + c % block_channels<A>];
                    }
                if (tap < taps_size)
                    static_cast<A*>(a.dweight)[c * taps_size + tap] = total;
                else
                    static_cast<A*>(a.dbias)[c] = total;
            }
    });
}

template <class T>
static int64_t depthwise_workspace(const DepthwiseArgs& a) {
    return DepthwiseUnit<T>::units(a) * (a.k * a.k + 1) * block_channels<acc_t<T>> * sizeof(acc_t<T>);
}
