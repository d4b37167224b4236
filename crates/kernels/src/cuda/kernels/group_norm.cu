// Group normalisation of images in two kernels: the first takes mean and sum of squared differences of each chunk of a
// group, the second puts what was measured of a group together and writes the result. One block per chunk.
//
// An image may be the rows of a larger one: then its channels do not follow each other, and the second kernel is given what
// was measured of the whole.
#include "gpu.cuh"

constexpr int THREADS = 256;

struct GroupNorm {
    const void* x;      // [images, channels, plane], a channel's elements are neighbours
    const void* weight; // [channels]
    const void* bias;   // [channels]
    float* means;       // [groups of all images, parts]
    float* squares;     // likewise
    void* y;            // [images, channels, plane], contiguous
    int64_t image_stride;   // of x
    int64_t channel_stride; // likewise
    int64_t channels;       // of an image
    int64_t plane;          // elements of a channel
    int64_t group;          // elements of a group of x, fewer than 2^31
    int64_t chunk;          // elements, the last chunk of a group may have fewer
    int64_t chunks;         // per group
    int64_t measured;       // elements of a group that means and squares are of
    int64_t part;           // of those elements, the last part of a group may have fewer
    int64_t parts;          // per group
    int64_t wide;           // whether chunks and channels are made of whole loads
    int64_t silu;
    double epsilon;
};

// What a block works on.
struct Chunk {
    int64_t group;         // of all images
    int64_t image;
    int64_t first_channel; // of the group in its image
    uint32_t first, end;   // elements of the group

    __device__ Chunk(const GroupNorm& p) {
        group = blockIdx.x / p.chunks;
        const int64_t channel = group * (p.group / p.plane);
        image = channel / p.channels;
        first_channel = channel % p.channels;
        first = uint32_t(blockIdx.x % p.chunks * p.chunk);
        end = uint32_t(first + p.chunk < p.group ? first + p.chunk : p.group);
    }
};

// Calls f with each N elements of the chunk, where they lie in the group, and their channel of the group.
template <typename T, int N, typename F> __device__ void each(const GroupNorm& p, const Chunk& chunk, F f) {
    const T* x = static_cast<const T*>(p.x) + chunk.image * p.image_stride + chunk.first_channel * p.channel_stride;
    const uint32_t plane = uint32_t(p.plane), first = chunk.first + threadIdx.x * N;
    uint32_t channel = first / plane, place = first % plane;
    float values[N];
    for (uint32_t i = first; i < chunk.end; i += THREADS * N, place += THREADS * N) {
        for (; place >= plane; place -= plane) ++channel;
        load<N>(x + channel * p.channel_stride + place, values);
        f(values, i, channel);
    }
}

template <typename T, int N> __device__ void measure(const GroupNorm& p) {
    const Chunk chunk(p);
    float sum = 0.f, squares = 0.f;
    each<T, N>(p, chunk, [&](const float(&values)[N], uint32_t, uint32_t) {
        for (int j = 0; j < N; ++j) sum += values[j];
    });
    const float mean = block_sum<THREADS>(sum) / float(chunk.end - chunk.first);
    each<T, N>(p, chunk, [&](const float(&values)[N], uint32_t, uint32_t) {
        for (int j = 0; j < N; ++j) squares += (values[j] - mean) * (values[j] - mean);
    });
    squares = block_sum<THREADS>(squares);
    if (threadIdx.x == 0) {
        put(p.means + blockIdx.x, mean);
        put(p.squares + blockIdx.x, squares);
    }
}

template <typename T, int N> __device__ void apply(const GroupNorm& p) {
    const Chunk chunk(p);
    // The group's mean and squared differences from its parts' (Chan, Golub, LeVeque 1979).
    const float* means = p.means + chunk.group * p.parts;
    const float* part_squares = p.squares + chunk.group * p.parts;
    const auto size = [&](int64_t i) { return float(i + 1 < p.parts ? p.part : p.measured - i * p.part); };
    float sum = 0.f, squares = 0.f;
    // From the first part's mean, so that what is added up is small beside a mean far from 0.
    const float origin = fetch(means);
    for (int64_t i = threadIdx.x; i < p.parts; i += THREADS) sum += size(i) * (fetch(means + i) - origin);
    const float mean = origin + block_sum<THREADS>(sum) / float(p.measured);
    for (int64_t i = threadIdx.x; i < p.parts; i += THREADS) {
        const float difference = fetch(means + i) - mean;
        squares += fetch(part_squares + i) + size(i) * difference * difference;
    }
    const float inverse = 1.f / sqrtf(block_sum<THREADS>(squares) / float(p.measured) + float(p.epsilon));

    const T* weights = static_cast<const T*>(p.weight) + chunk.first_channel;
    const T* biases = static_cast<const T*>(p.bias) + chunk.first_channel;
    T* y = static_cast<T*>(p.y) + chunk.group * p.group;
    each<T, N>(p, chunk, [&](float(&values)[N], uint32_t i, uint32_t channel) {
        const float weight = inverse * widen(fetch(weights + channel)), bias = widen(fetch(biases + channel));
        for (int j = 0; j < N; ++j) {
            const float normal = (values[j] - mean) * weight + bias;
            values[j] = p.silu ? silu(normal) : normal;
        }
        store<N>(y + i, values);
    });
}

template <typename T> __device__ void group_norm_measure(const GroupNorm& p) {
    p.wide ? measure<T, WIDE<T>>(p) : measure<T, 1>(p);
}

template <typename T> __device__ void group_norm_apply(const GroupNorm& p) {
    p.wide ? apply<T, WIDE<T>>(p) : apply<T, 1>(p);
}

KERNELS(group_norm_measure, THREADS, GroupNorm)
KERNELS(group_norm_apply, THREADS, GroupNorm)
