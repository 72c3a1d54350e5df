// Channel attention's gate of a few images, sigmoid(W mean + b): little but reading W once, for which a matrix
// product is not made. Included inside the namespace of one instruction set.

// 1 / (1 + exp(-x)), from exp(-|x|), which does not overflow.
DICO_INLINE vfloat sigmoid(vfloat x) {
    const vfloat size = (vfloat)((vint)x & 0x7fffffff);
    const vfloat small = power_of_two((size > 87.0f ? vfloat{} + 87.0f : size) * -1.44269504f);
    const vfloat value = (x < 0 ? small : vfloat{} + 1.0f) / (small + 1.0f);
    return x == x ? value : x;
}
DICO_INLINE vdouble sigmoid(vdouble x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = 1 / (1 + exp(-x[i]));
    return x;
}

// S images by R outputs: what is loaded of the weight serves S images, of the means R outputs.
template <int S, int R, class T, class A>
DICO_INLINE void attention_tile(const T* weight, const A* mean, const T* bias, A* out, int64_t channels) {
    vec_t<T> sums[S][R] = {};
    each_vector<T>(channels, [&](int64_t c, auto lanes) {
        vec_t<T> w[R];
        for (int r = 0; r < R; ++r) w[r] = vload(weight + r * channels + c, lanes);
        for (int s = 0; s < S; ++s) {
            const vec_t<T> v = vload(mean + s * channels + c, lanes);
            for (int r = 0; r < R; ++r) sums[s][r] += w[r] * v;
        }
    });
    for (int s = 0; s < S; ++s) {
        A logits[kLanes<T>] = {};
        for (int r = 0; r < R; ++r) logits[r] = sum_of(sums[s][r]) + (bias ? load(bias + r) : A{});
        vstore(out + s * channels, sigmoid(vload(logits)), R);
    }
}

template <class T>
static void channel_attention_typed(const AttentionArgs& a, int threads) {
    using A = acc_t<T>;
    constexpr int kBlock = 32;
    constexpr int kOutputs = kGroup < kLanes<T> ? kGroup : kLanes<T>;
    const T* weight = static_cast<const T*>(a.weight);
    const T* bias = static_cast<const T*>(a.bias);
    const A* sums = static_cast<const A*>(a.sums);
    A* mean = static_cast<A*>(a.mean);
    A* out = static_cast<A*>(a.attention);
    for (int64_t i = 0; i < a.images * a.channels; ++i) mean[i] = sums[i] / static_cast<A>(a.pixels);
    const int64_t blocks = (a.channels + kBlock - 1) / kBlock;
    [[maybe_unused]] const bool large = a.images * a.channels * a.channels >= 1 << 16;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && large)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * kBlock;
        const int64_t end = first + kBlock < a.channels ? first + kBlock : a.channels;
        const auto outputs = [&](int64_t k, auto count) {
            constexpr int R = decltype(count)::value;
            const auto images = [&](int64_t n, auto group) {
                attention_tile<decltype(group)::value, R>(weight + k * a.channels, mean + n * a.channels,
                                                          bias ? bias + k : nullptr, out + n * a.channels + k,
                                                          a.channels);
            };
            each_group(0, a.images, images);
        };
        int64_t k = first;
        for (; k + kOutputs <= end; k += kOutputs) outputs(k, Count<kOutputs>{});
        for (; k < end; ++k) outputs(k, Count<1>{});
    }
}

static void channel_attention(Dtype dtype, const AttentionArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { channel_attention_typed<typename decltype(tag)::type>(a, threads); });
}
