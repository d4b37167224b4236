// Rows in 8-bit floats of 4 bits of exponent, and what is left to do with sums of their products. One block per row.
#include "gpu.cuh"

constexpr int THREADS = 128;
constexpr float LARGEST = 448.f;          // of the 8-bit floats
constexpr float SMALLEST = 1.17549435e-38f; // normal f32

struct QuantiseRows {
    Rows x;
    void* codes;   // [rows, width]
    float* scales; // [rows]
    int64_t inner; // rows per group of x
    int64_t width;
    int64_t wide; // whether all rows are made of whole loads
};

// The row is read twice, from memory only once: the second time meets the L1 cache.
template <typename T, int N> __device__ void quantise(const QuantiseRows& p) {
    const T* x = row<T>(p.x, blockIdx.x / p.inner, blockIdx.x % p.inner);
    e4m3* codes = static_cast<e4m3*>(p.codes) + int64_t(blockIdx.x) * p.width;
    float values[N];
    float largest = 0.f;
    for (int64_t i = int64_t(threadIdx.x) * N; i < p.width; i += THREADS * N) {
        load<N>(x + i, values);
        // The larger of a number and one that is none is the number.
        for (int j = 0; j < N; ++j) largest = fmaxf(largest, fabsf(values[j]));
    }
    largest = block_join<THREADS>(largest, [](float a, float b) { return fmaxf(a, b); });
    const float wanted = largest / LARGEST;
    const float scale = wanted >= SMALLEST ? wanted : 1.f;
    for (int64_t i = int64_t(threadIdx.x) * N; i < p.width; i += THREADS * N) {
        load<N>(x + i, values);
        for (int j = 0; j < N; ++j) values[j] = values[j] / scale;
        store<N>(codes + i, values);
    }
    if (threadIdx.x == 0) put(p.scales + blockIdx.x, scale);
}

template <typename T> __device__ void quantise_rows(const QuantiseRows& p) {
    p.wide ? quantise<T, WIDE<T>>(p) : quantise<T, 1>(p);
}

struct ScaledSums {
    const float* sums;          // [rows, width]
    const float* row_scales;    // [rows]
    const float* column_scales; // [width]
    const void* bias;           // [width], or null
    void* y;                    // [rows, width]
    int64_t width;
    int64_t wide; // whether rows are made of whole loads
    int64_t gelu;
};

template <typename T, int N> __device__ void scale(const ScaledSums& p) {
    const float* sums = p.sums + int64_t(blockIdx.x) * p.width;
    T* y = static_cast<T*>(p.y) + int64_t(blockIdx.x) * p.width;
    const float row_scale = fetch(p.row_scales + blockIdx.x);
    float values[N], scales[N], bias[N];
    // Of f32 no more than four with each load.
    constexpr int AT_ONCE = N < 4 ? N : 4;
    for (int64_t i = int64_t(threadIdx.x) * N; i < p.width; i += THREADS * N) {
        load<N, AT_ONCE>(sums + i, values);
        load<N, AT_ONCE>(p.column_scales + i, scales);
        for (int j = 0; j < N; ++j) values[j] = values[j] * row_scale * scales[j];
        if (p.bias) {
            load<N>(static_cast<const T*>(p.bias) + i, bias);
            for (int j = 0; j < N; ++j) values[j] += bias[j];
        }
        for (int j = 0; j < N; ++j) values[j] = p.gelu ? gelu(values[j]) : values[j];
        store<N>(y + i, values);
    }
}

template <typename T> __device__ void scaled_sums(const ScaledSums& p) {
    p.wide ? scale<T, WIDE<T>>(p) : scale<T, 1>(p);
}

KERNELS(quantise_rows, THREADS, QuantiseRows)
KERNELS(scaled_sums, THREADS, ScaledSums)
