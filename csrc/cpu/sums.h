// Adding up what other kernels leave of their sums, rounded on the way: the gradients of biases and vectors.
// Included inside the namespace of one instruction set.

template <class T>
static void add_up_typed(const AddUpArgs& a, int threads) {
    using A = acc_t<T>;
    constexpr int64_t kChunk = 1024;
    const int64_t chunks = (a.channels + kChunk - 1) / kChunk, total = a.groups * chunks;
    threads = threads_for(a.groups * a.parts * a.channels, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < total; ++unit) {
        const int64_t group = unit / chunks, begin = (unit % chunks) * kChunk, left = a.channels - begin;
        const A* const from = static_cast<const A*>(a.sums) + group * a.parts * a.channels + begin;
        T* const to = static_cast<T*>(a.out) + group * a.channels + begin;
        each_vector<T>(left < kChunk ? left : kChunk, [&](int64_t c, auto lanes) {
            vec_t<T> sum = {};
            for (int64_t p = 0; p < a.parts; ++p) sum += vload(from + p * a.channels + c, lanes);
            vstore(to + c, sum, lanes);
        });
    }
}
static void add_up(Dtype dtype, const AddUpArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { add_up_typed<typename decltype(tag)::type>(a, threads); });
}
