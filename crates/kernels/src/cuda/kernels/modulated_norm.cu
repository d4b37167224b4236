// Layer norm over each row without learned parameters, then * (1 + scale) + shift. One block per row.
//
// The row is read three times, for mean, variance and result, but from memory only once: the later reads meet the L1
// cache. The variance is that of the differences from the mean, which stays exact where the mean is far from 0.
#include "gpu.cuh"

constexpr int THREADS = 128;

struct ModulatedNorm {
    Rows x;
    const void* shift; // [width]
    const void* scale; // [width]
    void* y;           // [rows, width]
    int64_t inner;     // rows per group of x
    int64_t width;
    int64_t wide; // whether all rows are made of whole loads
    double epsilon;
};

template <typename T, int N> __device__ void normalise(const ModulatedNorm& p) {
    const T* x = row<T>(p.x, blockIdx.x / p.inner, blockIdx.x % p.inner);
    T* y = static_cast<T*>(p.y) + int64_t(blockIdx.x) * p.width;
    float values[N];

    float sum = 0.f;
    for (int64_t i = int64_t(threadIdx.x) * N; i < p.width; i += THREADS * N) {
        load<N>(x + i, values);
        for (int j = 0; j < N; ++j) sum += values[j];
    }
    const float mean = block_sum<THREADS>(sum) / float(p.width);

    float squares = 0.f;
    for (int64_t i = int64_t(threadIdx.x) * N; i < p.width; i += THREADS * N) {
        load<N>(x + i, values);
        for (int j = 0; j < N; ++j) squares += (values[j] - mean) * (values[j] - mean);
    }
    const float inverse = 1.f / sqrtf(block_sum<THREADS>(squares) / float(p.width) + float(p.epsilon));

    float shift[N], scale[N];
    for (int64_t i = int64_t(threadIdx.x) * N; i < p.width; i += THREADS * N) {
        load<N>(x + i, values);
        load<N>(static_cast<const T*>(p.shift) + i, shift);
        load<N>(static_cast<const T*>(p.scale) + i, scale);
        for (int j = 0; j < N; ++j) values[j] = (values[j] - mean) * inverse * (1.f + scale[j]) + shift[j];
        store<N>(y + i, values);
    }
}

template <typename T> __device__ void modulated_norm(const ModulatedNorm& p) {
    p.wide ? normalise<T, WIDE<T>>(p) : normalise<T, 1>(p);
}

KERNELS(modulated_norm, THREADS, ModulatedNorm)
