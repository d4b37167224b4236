// Group normalisation of images in two kernels: the first takes mean and sum of squared differences of each chunk of a
// group, the second puts a group's chunks together and writes the result. One block per chunk.
#include "gpu.cuh"

constexpr int THREADS = 256;

struct GroupNorm {
    const void* x;      // [groups of all images, group], contiguous
    const void* weight; // [channels]
    const void* bias;   // [channels]
    float* means;       // [groups of all images, chunks]
    float* squares;     // likewise
    void* y;
    int64_t group;    // elements, fewer than 2^31
    int64_t chunk;    // elements, the last chunk of a group may have fewer
    int64_t chunks;   // per group
    int64_t plane;    // elements of a channel
    int64_t channels; // of an image
    int64_t wide;     // whether chunks and channels are made of whole loads
    int64_t silu;
    double epsilon;
};

// Where a block's chunk lies in its group, which has fewer than 2^31 elements.
struct Chunk {
    int64_t group;
    uint32_t first, end;

    __device__ Chunk(const GroupNorm& p) {
        group = blockIdx.x / p.chunks;
        first = uint32_t(blockIdx.x % p.chunks * p.chunk);
        end = uint32_t(first + p.chunk < p.group ? first + p.chunk : p.group);
    }
};

// The sum of f of every element of the chunk.
template <typename T, int N, typename F> __device__ float chunk_sum(const T* x, const Chunk& chunk, F f) {
    float values[N], sum = 0.f;
    for (uint32_t i = chunk.first + threadIdx.x * N; i < chunk.end; i += THREADS * N) {
        load<N>(x + i, values);
        for (int j = 0; j < N; ++j) sum += f(values[j]);
    }
    return block_sum<THREADS>(sum);
}

template <typename T, int N> __device__ void measure(const GroupNorm& p) {
    const Chunk chunk(p);
    const T* x = static_cast<const T*>(p.x) + chunk.group * p.group;
    const float mean = chunk_sum<T, N>(x, chunk, [](float x) { return x; }) / float(chunk.end - chunk.first);
    const float squares = chunk_sum<T, N>(x, chunk, [=](float x) { return (x - mean) * (x - mean); });
    if (threadIdx.x == 0) {
        put(p.means + blockIdx.x, mean);
        put(p.squares + blockIdx.x, squares);
    }
}

template <typename T, int N> __device__ void apply(const GroupNorm& p) {
    const Chunk chunk(p);
    // The group's mean and squared differences from its chunks' (Chan, Golub, LeVeque 1979).
    const float* means = p.means + chunk.group * p.chunks;
    const float* chunk_squares = p.squares + chunk.group * p.chunks;
    const auto size = [&](int64_t i) { return float(i + 1 < p.chunks ? p.chunk : p.group - i * p.chunk); };
    float sum = 0.f, squares = 0.f;
    // From the first chunk's mean, so that what is added up is small beside a mean far from 0.
    const float origin = fetch(means);
    for (int64_t i = threadIdx.x; i < p.chunks; i += THREADS) sum += size(i) * (fetch(means + i) - origin);
    const float mean = origin + block_sum<THREADS>(sum) / float(p.group);
    for (int64_t i = threadIdx.x; i < p.chunks; i += THREADS) {
        const float difference = fetch(means + i) - mean;
        squares += fetch(chunk_squares + i) + size(i) * difference * difference;
    }
    const float inverse = 1.f / sqrtf(block_sum<THREADS>(squares) / float(p.group) + float(p.epsilon));

    const uint32_t plane = uint32_t(p.plane), first_channel = uint32_t(chunk.group * p.group / p.plane % p.channels);
    const T* x = static_cast<const T*>(p.x) + chunk.group * p.group;
    T* y = static_cast<T*>(p.y) + chunk.group * p.group;
    float values[N], weight[1], bias[1];
    for (uint32_t i = chunk.first + threadIdx.x * N; i < chunk.end; i += THREADS * N) {
        load<N>(x + i, values);
        const uint32_t channel = first_channel + i / plane;
        load<1>(static_cast<const T*>(p.weight) + channel, weight);
        load<1>(static_cast<const T*>(p.bias) + channel, bias);
        for (int j = 0; j < N; ++j) {
            const float normal = (values[j] - mean) * (inverse * weight[0]) + bias[0];
            values[j] = p.silu ? silu(normal) : normal;
        }
        store<N>(y + i, values);
    }
}

template <typename T> __device__ void group_norm_measure(const GroupNorm& p) {
    p.wide ? measure<T, WIDE<T>>(p) : measure<T, 1>(p);
}

template <typename T> __device__ void group_norm_apply(const GroupNorm& p) {
    p.wide ? apply<T, WIDE<T>>(p) : apply<T, 1>(p);
}

KERNELS(group_norm_measure, THREADS, GroupNorm)
KERNELS(group_norm_apply, THREADS, GroupNorm)
