// One result per element of a row, each input read once: gated residual, GELU, gated GELU. One block per row.
#include "gpu.cuh"

constexpr int THREADS = 128;

struct Pointwise {
    Rows x;
    Rows other;       // what the operation takes beside x
    const void* gate; // [width], of the gated residual
    Rows y;
    int64_t inner; // rows per group
    int64_t width;
    int64_t wide; // whether all rows are made of whole loads
};

// x + gate * other.
struct GatedResidual {
    template <typename T, int N> static __device__ void at(const Pointwise& p, const T* other, int64_t i, float (&x)[N]) {
        float y[N], gate[N];
        load<N>(other + i, y);
        load<N>(static_cast<const T*>(p.gate) + i, gate);
        for (int j = 0; j < N; ++j) x[j] += gate[j] * y[j];
    }
};

// GELU(x).
struct Gelu {
    template <typename T, int N> static __device__ void at(const Pointwise&, const T*, int64_t, float (&x)[N]) {
        for (int j = 0; j < N; ++j) x[j] = gelu(x[j]);
    }
};

// GELU(x) * other.
struct GatedGelu {
    template <typename T, int N> static __device__ void at(const Pointwise&, const T* other, int64_t i, float (&x)[N]) {
        float value[N];
        load<N>(other + i, value);
        for (int j = 0; j < N; ++j) x[j] = gelu(x[j]) * value[j];
    }
};

template <typename T, int N, typename Operation> __device__ void rows(const Pointwise& p) {
    const int64_t outer = blockIdx.x / p.inner, inner = blockIdx.x % p.inner;
    const T* x = row<T>(p.x, outer, inner);
    const T* other = row<T>(p.other, outer, inner);
    T* y = row<T>(p.y, outer, inner);
    float values[N];
    for (int64_t i = int64_t(threadIdx.x) * N; i < p.width; i += THREADS * N) {
        load<N>(x + i, values);
        Operation::template at<T, N>(p, other, i, values);
        store<N>(y + i, values);
    }
}

template <typename T, typename Operation> __device__ void pointwise(const Pointwise& p) {
    p.wide ? rows<T, WIDE<T>, Operation>(p) : rows<T, 1, Operation>(p);
}

template <typename T> __device__ void gated_residual(const Pointwise& p) { pointwise<T, GatedResidual>(p); }
template <typename T> __device__ void gelu_rows(const Pointwise& p) { pointwise<T, Gelu>(p); }
template <typename T> __device__ void gated_gelu(const Pointwise& p) { pointwise<T, GatedGelu>(p); }

KERNELS(gated_residual, THREADS, Pointwise)
KERNELS(gelu_rows, THREADS, Pointwise)
KERNELS(gated_gelu, THREADS, Pointwise)
