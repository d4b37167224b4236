// What the kernels use of CUDA, for a host compiler: emulator.cpp runs a block's threads as coroutines.
//
// Each access to global memory must be aligned and within a tensor of the launch (`Range`); shared memory is filled with
// NaN before each block. A warp runs as far as it can before the next one moves; blocks of odd numbers begin with the last
// warp and finish asynchronous copies at once, those of even numbers begin with the first and finish copies as late as is
// allowed: a missing barrier or wait changes the result.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __device__
#define __shared__ static thread_local

struct Index {
    unsigned x, y, z;
};
extern thread_local Index threadIdx, blockIdx;

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

// Of 16 bits each; arithmetic is done in f32.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float widen(f16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    if (exponent == 31) return as_float(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) return (sign ? -1.f : 1.f) * std::ldexp(float(fraction), -24);
    return as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

template <typename T> T narrow(float x);
template <> inline float narrow(float x) { return x; }
template <> inline bf16 narrow(float x) {
    const uint32_t bits = as_bits(x);
    if (std::isnan(x)) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline f16 narrow(float x) {
    const uint16_t sign = as_bits(x) >> 16 & 0x8000;
    const float size = std::fabs(x);
    if (std::isnan(x)) return {0x7fff};
    if (size >= 65520.f) return {uint16_t(sign | 0x7c00)}; // half way to the number after the largest
    int exponent = -24;
    if (size > 0.f) std::frexp(size, &exponent);
    // The distance of neighbouring numbers of this size: 11 bits, or that of the smallest ones. nearbyint rounds to even.
    const int unit = exponent - 11 > -24 ? exponent - 11 : -24;
    const uint32_t units = uint32_t(std::nearbyint(std::ldexp(size, -unit)));
    return {uint16_t(sign | ((uint32_t(unit + 24) << 10) + units))};
}

// 8 bits, 4 of them exponent, no infinity: what is beyond the largest becomes that.
struct e4m3 {
    uint8_t bits;
};
template <> inline e4m3 narrow(float x) {
    const uint8_t sign = as_bits(x) >> 24 & 0x80;
    const float size = std::fabs(x);
    if (std::isnan(x)) return {0x7f};
    if (size >= 448.f) return {uint8_t(sign | 0x7e)};
    int exponent = -9;
    if (size > 0.f) std::frexp(size, &exponent);
    const int unit = exponent - 4 > -9 ? exponent - 4 : -9; // as for f16, with 4 bits
    const uint32_t units = uint32_t(std::nearbyint(std::ldexp(size, -unit)));
    return {uint8_t(sign | ((uint32_t(unit + 9) << 3) + units))};
}

void check_access(const void* p, size_t bytes, bool write);

template <typename P> P fetch(const P* from) {
    check_access(from, sizeof(P), false);
    return *from;
}
template <typename P> void put(P* to, P value) {
    check_access(to, sizeof(P), true);
    *to = value;
}

void __syncthreads();
float __shfl_xor_sync(uint32_t lanes, float x, int distance);
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

// tensor_core.cuh's instructions.
void load_matrices(uint32_t (&to)[4], const void* row);
void load_transposed(uint32_t (&to)[4], const void* row);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen_bits)(uint16_t));
template <typename T> void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add(c, a, b0, b1, [](uint16_t bits) { return widen(T{bits}); });
}
void copy_async(void* to, const void* from, int bytes);
void wait_for_copies();
inline float power_of_two(float x) { return std::exp2(x); }
unsigned char* shared_memory();

void check_launch(size_t threads, size_t params);

#define KERNEL(NAME, THREADS, PARAMS, ...) \
    extern "C" void NAME(const void* params) { \
        check_launch(THREADS, sizeof(PARAMS)); \
        __VA_ARGS__(*static_cast<const PARAMS*>(params)); \
    }
