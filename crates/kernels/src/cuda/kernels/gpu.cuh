// What every kernel is written with: element types, wide loads and stores, sums over threads.
//
// The kernels touch global memory through `fetch` and `put` alone, so that tests/emulator, which stands in for CUDA when
// a host compiler reads these files, can check each access.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

using bf16 = __nv_bfloat16;
using f16 = __half;

// 8 bits, 4 of them exponent.
struct e4m3 {
    __nv_fp8_storage_t bits;
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(f16 x) { return __half2float(x); }

template <typename T> __device__ T narrow(float x);
template <> __device__ inline float narrow(float x) { return x; }
template <> __device__ inline bf16 narrow(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline f16 narrow(float x) { return __float2half_rn(x); }
template <> __device__ inline e4m3 narrow(float x) { return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)}; }

template <typename P> __device__ P fetch(const P* from) { return *from; }
template <typename P> __device__ void put(P* to, P value) { __stwb(to, value); } // one store, which `=` of a uint4 need not be

// A kernel that is launched with THREADS threads per block and one argument, a struct of type PARAMS.
#define KERNEL(NAME, THREADS, PARAMS, ...) \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const PARAMS params) { __VA_ARGS__(params); }
#else
#include "emulator.h"
#endif

// The same kernel for each element type.
#define KERNELS(NAME, THREADS, PARAMS) \
    KERNEL(NAME##_f32, THREADS, PARAMS, NAME<float>) \
    KERNEL(NAME##_bf16, THREADS, PARAMS, NAME<bf16>) \
    KERNEL(NAME##_f16, THREADS, PARAMS, NAME<f16>)

// Bytes of the widest load.
constexpr int WIDEST = 16;

// N neighbouring elements, read and written at once; their address is a multiple of their size.
template <typename T, int N> struct alignas(N * sizeof(T)) Pack {
    T at[N];
};

// A pack's bits.
template <int BYTES> struct Bits;
template <> struct Bits<1> {
    using Type = uint8_t;
};
template <> struct Bits<2> {
    using Type = uint16_t;
};
template <> struct Bits<4> {
    using Type = uint32_t;
};
template <> struct Bits<8> {
    using Type = uint2;
};
template <> struct Bits<16> {
    using Type = uint4;
};

// N elements in f32, AT_ONCE of them with each load.
template <int N, int AT_ONCE = N, typename T> __device__ void load(const T* from, float (&to)[N]) {
    Pack<T, AT_ONCE> pack;
#pragma unroll
    for (int i = 0; i < N; i += AT_ONCE) {
        const auto bits = fetch(reinterpret_cast<const typename Bits<sizeof pack>::Type*>(from + i));
        memcpy(&pack, &bits, sizeof pack);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) to[i + j] = widen(pack.at[j]);
    }
}

// Rounds N elements to nearest even, AT_ONCE of them with each store.
template <int N, int AT_ONCE = N, typename T> __device__ void store(T* to, const float (&from)[N]) {
    Pack<T, AT_ONCE> pack;
#pragma unroll
    for (int i = 0; i < N; i += AT_ONCE) {
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) pack.at[j] = narrow<T>(from[i + j]);
        typename Bits<sizeof pack>::Type bits;
        memcpy(&bits, &pack, sizeof pack);
        put(reinterpret_cast<decltype(bits)*>(to + i), bits);
    }
}

// Elements of the widest load.
template <typename T> constexpr int WIDE = WIDEST / int(sizeof(T));

// Rows along a tensor's last axis, in groups: row `inner` of group `outer`, strides in elements.
struct Rows {
    void* data;
    int64_t outer_stride;
    int64_t inner_stride;
};

template <typename T> __device__ T* row(const Rows& rows, int64_t outer, int64_t inner) {
    return static_cast<T*>(rows.data) + outer * rows.outer_stride + inner * rows.inner_stride;
}

// The sum over `lanes` neighbouring threads, a power of two up to 32, in each of them.
__device__ inline float lanes_sum(float x, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// What `join` makes of the x of all of the block's threads, in each of them.
template <int THREADS, typename F> __device__ float block_join(float x, F join) {
    __shared__ float joined[THREADS / 32];
    for (int distance = 16; distance > 0; distance /= 2) x = join(x, __shfl_xor_sync(0xffffffffu, x, distance));
    __syncthreads(); // all have read what a call before this one left in `joined`
    if (threadIdx.x % 32 == 0) joined[threadIdx.x / 32] = x;
    __syncthreads();
    x = joined[0];
    for (int i = 1; i < THREADS / 32; ++i) x = join(x, joined[i]);
    return x;
}

// The sum over the block, in each of its threads.
template <int THREADS> __device__ float block_sum(float x) {
    return block_join<THREADS>(x, [](float a, float b) { return a + b; });
}

// x/2 (1 + tanh(z)) with z = sqrt(2/pi) (x + 0.044715 x^3), which is x / (1 + e^(-2z)).
__device__ inline float gelu(float x) {
    constexpr float TWICE_ROOT = 1.5957691216f; // 2 sqrt(2/pi)
    return __fdividef(x, 1.f + __expf(-TWICE_ROOT * (x + 0.044715f * x * x * x)));
}

__device__ inline float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }
