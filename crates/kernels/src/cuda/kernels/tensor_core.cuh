// The instructions around matrix products of 16-bit numbers in tensor cores, on compute capability 8.0 and newer.
//
// A warp multiplies a 16x16 by a 16x8 matrix. Lane l = 4g + t holds of
//   A  rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9:  a[0] = (g, 2t..), a[1] = (g + 8, 2t..), a[2], a[3] the same
//      rows at 2t + 8;
//   B  rows 2t, 2t + 1 (b[0]) and 2t + 8, 2t + 9 (b[1]) of column g;
//   C  rows g (c[0], c[1]) and g + 8 (c[2], c[3]) at columns 2t, 2t + 1.
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16".
#pragma once

#include "gpu.cuh"

#ifdef __CUDACC__
__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit numbers from shared memory: lane 8m + r gives the address of row r of matrix m; lane 4g + t
// receives elements 2t, 2t + 1 of row g of each.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed: lane 4g + t receives elements g of rows 2t, 2t + 1.
__device__ inline void load_transposed(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b.
template <typename T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define MULTIPLY_ADD(T, NAME) \
    template <> \
    __device__ inline void multiply_add<T>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 " \
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); \
    }
MULTIPLY_ADD(bf16, "bf16")
MULTIPLY_ADD(f16, "f16")

// Starts to copy 16 bytes to shared memory, of which the last 16 - `bytes` become 0 and are not read.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

// Waits for all copies that this thread has started.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 2^x, and 0 for minus infinity.
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The block's shared memory, as large as its launch says.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}
#endif

// Two numbers rounded and packed, `low` in the lower half.
template <typename T> __device__ uint32_t packed(float low, float high) {
    const Pack<T, 2> pair = {{narrow<T>(low), narrow<T>(high)}};
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}
