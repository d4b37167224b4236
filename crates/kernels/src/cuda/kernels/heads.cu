// One stream's queries and keys normalised per head, scaled and turned, its values copied, into the joined streams'
// buffer. One block per token.
//
// A head is done by `lanes` neighbouring threads, N channels each: half a warp for 128 channels of 16 bits.
#include "gpu.cuh"

constexpr int THREADS = 128;

struct Heads {
    Rows x;                  // rows of [3, heads, head_dim]
    const void* query_scale; // [head_dim]
    const void* key_scale;   // [head_dim]
    const float* cos;        // [joined tokens, head_dim / 2]
    const float* sin;        // likewise
    void* y;                 // [batch, joined tokens, 3, heads, head_dim]
    int64_t tokens;          // of this stream
    int64_t first;           // its first token's place among the joined
    int64_t joined;
    int64_t heads;
    int64_t head_dim;
    int64_t wide; // whether a head is a power of two, up to 32, of whole loads
    double epsilon;
};

// N channels from `i` on, each pair of neighbours turned by its angle.
template <int N> __device__ void turn(float (&x)[N], const float* cos, const float* sin, int64_t i) {
    float c[N / 2], s[N / 2];
    load<N / 2>(cos + i / 2, c);
    load<N / 2>(sin + i / 2, s);
    for (int j = 0; j < N / 2; ++j) {
        const float a = x[2 * j], b = x[2 * j + 1];
        x[2 * j] = a * c[j] - b * s[j];
        x[2 * j + 1] = a * s[j] + b * c[j];
    }
}

// `lanes` threads do a head, N channels at a time, AT_ONCE with each load.
template <typename T, int N, int AT_ONCE> __device__ void token(const Heads& p, int lanes) {
    const int64_t batch = blockIdx.x / p.tokens, inner = blockIdx.x % p.tokens;
    const int64_t place = p.first + inner;
    const T* x = row<T>(p.x, batch, inner);
    T* y = static_cast<T*>(p.y) + (batch * p.joined + place) * 3 * p.heads * p.head_dim;
    const float* cos = p.cos + place * (p.head_dim / 2);
    const float* sin = p.sin + place * (p.head_dim / 2);
    const int64_t lane = threadIdx.x % lanes, at_once = THREADS / lanes;
    // All threads take part in the sums of the last round, those without a head with 0.
    for (int64_t round = 0; round < 3 * p.heads; round += at_once) {
        const int64_t head = round + threadIdx.x / lanes; // counted through queries, keys and values
        const bool here = head < 3 * p.heads, value = head >= 2 * p.heads;
        const T* from = x + head * p.head_dim;
        float channels[N];
        float squares = 0.f;
        for (int64_t i = lane * N; here && i < p.head_dim; i += lanes * N) {
            load<N, AT_ONCE>(from + i, channels);
            for (int j = 0; j < N; ++j) squares += channels[j] * channels[j];
        }
        const float inverse = 1.f / sqrtf(lanes_sum(squares, lanes) / float(p.head_dim) + float(p.epsilon));
        const T* scales = static_cast<const T*>(head < p.heads ? p.query_scale : p.key_scale);
        for (int64_t i = lane * N; here && i < p.head_dim; i += lanes * N) {
            if (AT_ONCE == 1) load<N, AT_ONCE>(from + i, channels); // else these are still all that there are
            if (!value) {
                float scale[N];
                load<N, AT_ONCE>(scales + i, scale);
                for (int j = 0; j < N; ++j) channels[j] *= inverse * scale[j];
                turn<N>(channels, cos, sin, i);
            }
            store<N, AT_ONCE>(y + head * p.head_dim + i, channels);
        }
    }
}

template <typename T> __device__ void heads(const Heads& p) {
    p.wide ? token<T, WIDE<T>, WIDE<T>>(p, int(p.head_dim) / WIDE<T>) : token<T, 2, 1>(p, 32);
}

KERNELS(heads, THREADS, Heads)
