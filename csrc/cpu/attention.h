// Products of a few vectors, one an image: channel attention's gate, sigmoid(W mean + b), and the conditioning of
// blocks, W silu(c) + b. Little but reading W once, for which a matrix product is not made. Included inside the
// namespace of one instruction set.

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

// emit(image, logits of R outputs) for S images: what is loaded of the weight serves S images, of the vectors R
// outputs.
template <int S, int R, class T, class V, class Emit>
DICO_INLINE void vectors_tile(const T* weight, const V* vectors, const T* bias, int64_t inputs, Emit emit) {
    using A = acc_t<T>;
    vec_t<T> sums[S][R] = {};
    each_vector<T>(inputs, [&](int64_t c, auto lanes) {
        vec_t<T> w[R];
        for (int r = 0; r < R; ++r) w[r] = vload(weight + r * inputs + c, lanes);
        for (int s = 0; s < S; ++s) {
            const vec_t<T> v = vload(vectors + s * inputs + c, lanes);
            for (int r = 0; r < R; ++r) sums[s][r] += w[r] * v;
        }
    });
    for (int s = 0; s < S; ++s) {
        A logits[kLanes<T>] = {};
        for (int r = 0; r < R; ++r) logits[r] = sum_of(sums[s][r]) + (bias ? load(bias + r) : A{});
        emit(s, vload(logits));
    }
}

// Outputs of a weight that are one unit of work.
constexpr int kVectorBlock = 32;
// Products of a weight and some vectors, which wait for the weight, that take about as long as an element.
constexpr int64_t kVectorProducts = 2;

// emit(image, output, R, logits of R outputs) for the outputs of a block.
template <class T, class V, class Emit>
DICO_INLINE void vectors_block(const T* weight, const V* vectors, const T* bias, int64_t images, int64_t inputs,
                               int64_t outputs, int64_t block, Emit emit) {
    constexpr int kOutputs = kGroup < kLanes<T> ? kGroup : kLanes<T>;
    const int64_t first = block * kVectorBlock;
    const int64_t end = first + kVectorBlock < outputs ? first + kVectorBlock : outputs;
    const auto some = [&](int64_t k, auto count) {
        constexpr int R = decltype(count)::value;
        each_group(0, images, [&](int64_t n, auto group) {
            vectors_tile<decltype(group)::value, R>(weight + k * inputs, vectors + n * inputs,
                                                    bias ? bias + k : nullptr, inputs,
                                                    [&](int s, vec_t<T> logits) { emit(n + s, k, R, logits); });
        });
    };
    int64_t k = first;
    for (; k + kOutputs <= end; k += kOutputs) some(k, Count<kOutputs>{});
    for (; k < end; ++k) some(k, Count<1>{});
}

template <class T>
static void channel_attention_typed(const AttentionArgs& a, int threads) {
    using A = acc_t<T>;
    const A* sums = static_cast<const A*>(a.sums);
    A* mean = static_cast<A*>(a.mean);
    A* out = static_cast<A*>(a.attention);
    for (int64_t i = 0; i < a.images * a.channels; ++i) mean[i] = sums[i] / static_cast<A>(a.pixels);
    const int64_t blocks = (a.channels + kVectorBlock - 1) / kVectorBlock;
    threads = threads_for(a.images * a.channels * a.channels / kVectorProducts, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block)
        vectors_block(static_cast<const T*>(a.weight), mean, static_cast<const T*>(a.bias), a.images, a.channels,
                      a.channels, block, [&](int64_t n, int64_t k, int count, vec_t<T> logits) {
                          vstore(out + n * a.channels + k, sigmoid(logits), count);
                      });
}

// V vectors of columns of W and of its gradient, for S images.
template <int S, int V, class T, class Lanes>
DICO_INLINE void attention_columns(const AttentionBackwardArgs& a, int64_t c, Lanes lanes) {
    using A = acc_t<T>;
    constexpr int L = kLanes<T>;
    const A* const dlogits = static_cast<const A*>(a.dbias);
    const T* const weight = static_cast<const T*>(a.weight) + c;
    T* const dweight = static_cast<T*>(a.dweight) + c;
    vec_t<T> mean[S][V], sums[S][V] = {};
    for (int s = 0; s < S; ++s)
        for (int v = 0; v < V; ++v)
            mean[s][v] = vload(static_cast<const A*>(a.mean) + s * a.channels + c + v * L, lanes);
    for (int64_t k = 0; k < a.channels; ++k) {
        constexpr int kAhead = 16, kLine = 64 / sizeof(T);
        const int64_t at = k * a.channels;
        for (int i = 0; i < V * L; i += kLine) {
            __builtin_prefetch(weight + at + kAhead * a.channels + i);
            __builtin_prefetch(dweight + at + kAhead * a.channels + i, 1);
        }
        for (int v = 0; v < V; ++v) {
            const vec_t<T> w = vload(weight + at + v * L, lanes);
            vec_t<T> gradient = {};
            for (int s = 0; s < S; ++s) {
                const A d = dlogits[s * a.channels + k];
                sums[s][v] += w * d;
                gradient += mean[s][v] * d;
            }
            vstore(dweight + at + v * L, gradient, lanes);
        }
    }
    for (int s = 0; s < S; ++s)
        for (int v = 0; v < V; ++v)
            vstore(static_cast<A*>(a.dsums) + s * a.channels + c + v * L, sums[s][v] / static_cast<A>(a.pixels),
                   lanes);
}

template <class T>
static void channel_attention_backward_typed(const AttentionBackwardArgs& a, int threads) {
    using A = acc_t<T>;
    const A* const dattention = static_cast<const A*>(a.dattention);
    const A* const attention = static_cast<const A*>(a.attention);
    A* const dlogits = static_cast<A*>(a.dbias);
    for (int64_t i = 0; i < a.images * a.channels; ++i) {
        const A s = attention[i];
        dlogits[i] = dattention[i] * s * (1 - s);
    }
    // Each row of so few columns is a page of its own, so as many of them as the registers hold for these images.
    by_count<8>(a.images, [&](auto images) {
        constexpr int S = decltype(images)::value, V = S < 3 ? 4 : S < 5 ? 2 : 1;
        constexpr int64_t L = kLanes<T>, kColumns = V * L;
        const int64_t units = (a.channels + kColumns - 1) / kColumns;
        const int team = threads_for(a.images * a.channels * a.channels / kVectorProducts, threads);
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
        for (int64_t unit = 0; unit < units; ++unit) {
            const int64_t first = unit * kColumns;
            if (first + kColumns <= a.channels) {
                attention_columns<S, V, T>(a, first, Whole{});
            } else {
                each_vector<T>(a.channels - first,
                               [&](int64_t c, auto lanes) { attention_columns<S, 1, T>(a, first + c, lanes); });
            }
        }
    });
}

template <class T>
static void conditioning_typed(const ConditioningArgs& a, int threads) {
    const T* c = static_cast<const T*>(a.c);
    const int64_t* weights = static_cast<const int64_t*>(a.weights);
    const int64_t* biases = static_cast<const int64_t*>(a.biases);
    T* activated = static_cast<T*>(a.activated);
    T* y = static_cast<T*>(a.y);
    each_vector<T>(a.images * a.inputs, [&](int64_t i, auto lanes) {
        const vec_t<T> v = vload(c + i, lanes);
        vstore(activated + i, v * sigmoid(v), lanes);
    });
    const int64_t blocks = (a.outputs + kVectorBlock - 1) / kVectorBlock;
    threads = threads_for(a.heads * a.images * a.inputs * a.outputs / kVectorProducts, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < a.heads * blocks; ++unit) {
        const int64_t head = unit / blocks;
        T* const out = y + head * a.images * a.outputs;
        vectors_block(reinterpret_cast<const T*>(weights[head]), activated,
                      reinterpret_cast<const T*>(biases[head]), a.images, a.inputs, a.outputs, unit % blocks,
                      [&](int64_t n, int64_t k, int count, vec_t<T> logits) {
                          vstore(out + n * a.outputs + k, logits, count);
                      });
    }
}

static void channel_attention(Dtype dtype, const AttentionArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { channel_attention_typed<typename decltype(tag)::type>(a, threads); });
}
static void channel_attention_backward(Dtype dtype, const AttentionBackwardArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { channel_attention_backward_typed<typename decltype(tag)::type>(a, threads); });
}
static void conditioning(Dtype dtype, const ConditioningArgs& a, int threads) {
    by_dtype(dtype, [&](auto tag) { conditioning_typed<typename decltype(tag)::type>(a, threads); });
}
