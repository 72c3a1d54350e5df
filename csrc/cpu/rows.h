// What kernels over (images, rows, channels) share: how the rows are divided among threads, and how the sums over
// rows of one image are put together. The division depends on the shape alone, never on the number of threads, so
// neither the order of any sum nor the compiled code that a row meets depends on it.

// Rows handled together, so that what is loaded once for a channel serves them all and their sums overlap.
#if defined(__AVX512F__)
constexpr int kGroup = 4;
#else
constexpr int kGroup = 2;
#endif

// Threads for work counted in elements of a pass over an image. Waking threads and waiting for the last of them
// costs some microseconds, and a thousand times as much where other processes use the cores. All threads or one:
// libgomp ends those that a smaller number leaves over and starts them anew for the next larger one.
static inline int threads_for(int64_t work, int threads) { return work > grain ? threads : 1; }
// Products of a matrix that take about as long as an element.
constexpr int64_t kProducts = 16;

DICO_INLINE int64_t blocks_of(const Image& i) { return (i.rows + i.block_rows - 1) / i.block_rows; }

// body(image, first row, one past the last row, number of the block among all images' blocks, part), for each part
// of each block.
template <class Body>
static inline void each_part(const Image& i, int64_t parts, int threads, Body body) {
    const int64_t blocks = blocks_of(i);
    const int64_t total = i.images * blocks * parts;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < total; ++unit) {
        const int64_t block = unit / parts;
        const int64_t first = (block % blocks) * i.block_rows;
        const int64_t end = first + i.block_rows;
        body(block / blocks, first, end < i.rows ? end : i.rows, block, unit % parts);
    }
}
template <class Body>
static inline void each_block(const Image& i, int threads, Body body) {
    threads = threads_for(i.images * i.rows * i.channels, threads);
    each_part(i, 1, threads, [=](int64_t image, int64_t first, int64_t end, int64_t block, int64_t) {
        body(image, first, end, block);
    });
}

template <int n>
struct Count {
    static constexpr int value = n;
};

// body(Count of n), for n of 1 to most: not for none.
template <int most, class Body>
DICO_INLINE void by_count(int64_t n, Body body) {
    if constexpr (most == 1) {
        body(Count<1>{});
    } else {
        n == most ? body(Count<most>{}) : by_count<most - 1>(n, body);
    }
}

// body(row, Count of rows): groups of kGroup rows, then single ones.
template <class Body>
DICO_INLINE void each_group(int64_t first, int64_t end, Body body) {
    int64_t row = first;
    for (; row + kGroup <= end; row += kGroup) body(row, Count<kGroup>{});
    for (; row < end; ++row) body(row, Count<1>{});
}

// body(row), one at a time, for what writes images: a group of rows of each is more streams of memory than a
// processor foresees, and rows of a power of two lie where the stores of one hold up the loads of another.
template <class Body>
DICO_INLINE void each_row(int64_t first, int64_t end, Body body) {
    for (int64_t row = first; row < end; ++row) body(row);
}

// out[image][c] = the sum over an image's blocks of partial[block][c], in the order of the blocks. One partial is
// `stride` elements after the other.
template <class A>
static void sum_blocks(const A* partial, int64_t stride, A* out, const Image& i, int threads) {
    constexpr int64_t kChunk = 256;
    const int64_t blocks = blocks_of(i);
    const int64_t chunks = (i.channels + kChunk - 1) / kChunk;
    const int64_t total = i.images * chunks;
    threads = threads_for(total * kChunk * blocks, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < total; ++unit) {
        const int64_t image = unit / chunks, begin = (unit % chunks) * kChunk;
        const int64_t left = i.channels - begin;
        const A* from = partial + image * blocks * stride + begin;
        A* to = out + image * i.channels + begin;
        each_vector<A>(left < kChunk ? left : kChunk, [&](int64_t c, auto lanes) {
            vec_t<A> sum = {};
            for (int64_t b = 0; b < blocks; ++b) sum += vload(from + b * stride + c, lanes);
            vstore(to + c, sum, lanes);
        });
    }
}

// out[i] = the sum over parts of partial[part][i], in their order.
template <class A>
static void sum_parts(const A* partial, int64_t parts, int64_t size, A* out) {
    each_vector<A>(size, [&](int64_t i, auto lanes) {
        vec_t<A> sum = {};
        for (int64_t p = 0; p < parts; ++p) sum += vload(partial + p * size + i, lanes);
        vstore(out + i, sum, lanes);
    });
}
