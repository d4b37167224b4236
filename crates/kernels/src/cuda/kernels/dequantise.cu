// The values of a packed matrix in the dtype that is computed with, each written once and rounded once. A thread writes eight
// neighbouring values, so that a warp's stores are one piece of memory; what they are made of is next to each other as well.
//
// Products of a block's scales and codes have no more bits than an f32: whether they are fused with the sum that follows
// makes no difference.
#include "gpu.cuh"

constexpr int THREADS = 256;
constexpr int PIECE = 8; // values of a thread

struct Dequantise {
    const void* from; // blocks, 8-bit floats or numbers; blocks begin at a multiple of 16
    void* y;
    int64_t count; // values; of blocks all
    float scale;   // of 8-bit floats
    int32_t wide;  // whether both sides are made of whole loads
};

// A byte for each value of a piece.
struct Bytes {
    uint32_t words[2];
    __device__ int at(int i) const { return int(words[i / 4] >> i % 4 * 8 & 0xff); }
};

__device__ inline Bytes operator|(Bytes a, Bytes b) { return {{a.words[0] | b.words[0], a.words[1] | b.words[1]}}; }
__device__ inline Bytes operator<<(Bytes a, int bits) { return {{a.words[0] << bits, a.words[1] << bits}}; }

__device__ inline float number(uint16_t bits) {
    f16 x;
    memcpy(&x, &bits, sizeof x);
    return widen(x);
}
__device__ inline float number_at(const uint8_t* from) { return number(fetch(reinterpret_cast<const uint16_t*>(from))); }

// The widest load, up to a piece, that is possible anywhere in blocks of so many bytes, one after the other.
constexpr int step_of(int bytes) { return bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2; }

template <int STEP> __device__ Bytes bytes_at(const uint8_t* from) {
    Bytes bytes;
#pragma unroll
    for (int i = 0; i < PIECE; i += STEP) {
        const auto bits = fetch(reinterpret_cast<const typename Bits<STEP>::Type*>(from + i));
        memcpy(reinterpret_cast<char*>(&bytes) + i, &bits, STEP);
    }
    return bytes;
}

// Codes of BITS bits: SHARED bytes hold the first SHARED values in their lowest bits, the next in the bits above, and so on;
// then come other bytes.
template <int BITS, int SHARED, int STEP> __device__ Bytes codes_at(const uint8_t* from, int piece) {
    constexpr int PIECES = SHARED / PIECE, LAYERS = 8 / BITS;
    constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x01010101u;
    const Bytes bytes = bytes_at<STEP>(from + piece / (PIECES * LAYERS) * SHARED + piece % PIECES * PIECE);
    const int shift = piece / PIECES % LAYERS * BITS;
    return {{bytes.words[0] >> shift & MASK, bytes.words[1] >> shift & MASK}};
}

// Bits, the lowest first, as a byte each.
__device__ inline Bytes spread(uint32_t bits) {
    const auto four = [](uint32_t bits) { return (bits & 15) * 0x00204081u & 0x01010101u; };
    return {{four(bits), four(bits >> 4)}};
}

// What eight values are: (code - zero) * scale + least.
struct Piece {
    Bytes codes;
    int zero;
    float scale;
    float least;
};

constexpr float NOTHING = -0.f; // which added to any number, -0 included, leaves it

// The forms of blocks: layouts and arithmetic are those of candle_core::quantized::k_quants, which the CPU dequantises by.

struct Q4_0 {
    static constexpr int VALUES = 32, SIZE = 18, STEP = step_of(SIZE);
    static __device__ Piece piece(const uint8_t* block, int i) {
        return {codes_at<4, 16, STEP>(block + 2, i), 8, number_at(block), NOTHING};
    }
};

struct Q4_1 {
    static constexpr int VALUES = 32, SIZE = 20, STEP = step_of(SIZE);
    static __device__ Piece piece(const uint8_t* block, int i) {
        return {codes_at<4, 16, STEP>(block + 4, i), 0, number_at(block), number_at(block + 2)};
    }
};

struct Q5_0 {
    static constexpr int VALUES = 32, SIZE = 22, STEP = step_of(SIZE);
    static __device__ Piece piece(const uint8_t* block, int i) {
        const Bytes codes = codes_at<4, 16, STEP>(block + 6, i) | spread(fetch(block + 2 + i)) << 4;
        return {codes, 16, number_at(block), NOTHING};
    }
};

struct Q5_1 {
    static constexpr int VALUES = 32, SIZE = 24, STEP = step_of(SIZE);
    static __device__ Piece piece(const uint8_t* block, int i) {
        const Bytes codes = codes_at<4, 16, STEP>(block + 8, i) | spread(fetch(block + 4 + i)) << 4;
        return {codes, 0, number_at(block), number_at(block + 2)};
    }
};

struct Q8_0 {
    static constexpr int VALUES = 32, SIZE = 34, STEP = step_of(SIZE);
    static __device__ Piece piece(const uint8_t* block, int i) {
        Bytes codes = bytes_at<STEP>(block + 2 + i * PIECE);
        // Signed ones, counted from the least.
        for (uint32_t& word : codes.words) word ^= 0x80808080u;
        return {codes, 128, number_at(block), NOTHING};
    }
};

struct Q2K {
    static constexpr int VALUES = 256, SIZE = 84, STEP = step_of(SIZE);
    static __device__ Piece piece(const uint8_t* block, int i) {
        const int scales = fetch(block + i / 2);
        const float scale = number_at(block + 80) * float(scales & 15), least = number_at(block + 82) * float(scales >> 4);
        return {codes_at<2, 32, STEP>(block + 16, i), 0, scale, -least};
    }
};

struct Q3K {
    static constexpr int VALUES = 256, SIZE = 110, STEP = step_of(SIZE);
    static __device__ Piece piece(const uint8_t* block, int i) {
        const Bytes codes = codes_at<2, 32, STEP>(block + 32, i) | codes_at<1, 32, STEP>(block, i) << 2;
        // Sixteen scales of six bits: the low four in eight bytes, the high two in four.
        const int at = i / 2;
        const int low = fetch(block + 96 + at % 8) >> at / 8 * 4 & 15, high = fetch(block + 104 + at % 4) >> at / 4 * 2 & 3;
        return {codes, 4, number_at(block + 108) * float((low | high << 4) - 32), NOTHING};
    }
};

// The 16 bytes with which Q4K and Q5K begin: two numbers, and for every 32 values six bits for each to be multiplied by.
struct Scales {
    float scale, least;
    __device__ Scales(const uint8_t* block, int at) {
        const uint4 header = fetch(reinterpret_cast<const uint4*>(block));
        const int shift = at % 4 * 8;
        const uint32_t first = header.y >> shift, second = header.z >> shift, both = header.w >> shift;
        const uint32_t of_scale = at < 4 ? first & 63 : (both & 15) | (first >> 6 & 3) << 4;
        const uint32_t of_least = at < 4 ? second & 63 : (both >> 4 & 15) | (second >> 6 & 3) << 4;
        scale = number(uint16_t(header.x)) * float(of_scale);
        least = -(number(uint16_t(header.x >> 16)) * float(of_least));
    }
};

struct Q4K {
    static constexpr int VALUES = 256, SIZE = 144, STEP = step_of(SIZE);
    static __device__ Piece piece(const uint8_t* block, int i) {
        const Scales scales(block, i / 4);
        return {codes_at<4, 32, STEP>(block + 16, i), 0, scales.scale, scales.least};
    }
};

struct Q5K {
    static constexpr int VALUES = 256, SIZE = 176, STEP = step_of(SIZE);
    static __device__ Piece piece(const uint8_t* block, int i) {
        const Scales scales(block, i / 4);
        const Bytes codes = codes_at<4, 32, STEP>(block + 48, i) | codes_at<1, 32, STEP>(block + 16, i) << 4;
        return {codes, 0, scales.scale, scales.least};
    }
};

struct Q6K {
    static constexpr int VALUES = 256, SIZE = 210, STEP = step_of(SIZE);
    static __device__ Piece piece(const uint8_t* block, int i) {
        const Bytes codes = codes_at<4, 64, STEP>(block, i) | codes_at<2, 32, STEP>(block + 128, i) << 4;
        const int scale = int8_t(fetch(block + 192 + i / 2));
        return {codes, 32, number_at(block + 208) * float(scale), NOTHING};
    }
};

template <typename T, typename Form> __device__ void blocks(const Dequantise& p) {
    constexpr int PIECES = Form::VALUES / PIECE;
    static_assert(THREADS % PIECES == 0, "a block of values has all of its threads in one block of threads");
    const int64_t block = int64_t(blockIdx.x) * (THREADS / PIECES) + threadIdx.x / PIECES;
    const int i = threadIdx.x % PIECES;
    if (block * Form::VALUES >= p.count) return;
    const Piece piece = Form::piece(static_cast<const uint8_t*>(p.from) + block * Form::SIZE, i);
    float values[PIECE];
    for (int j = 0; j < PIECE; ++j) values[j] = float(piece.codes.at(j) - piece.zero) * piece.scale + piece.least;
    store<PIECE, WIDE<T> < PIECE ? WIDE<T> : PIECE>(static_cast<T*>(p.y) + block * Form::VALUES + i * PIECE, values);
}

// 8 bits, 5 of them exponent: the upper half of an f16.
struct e5m2 {
    uint8_t bits;
};

__device__ inline float widen(e5m2 x) { return number(uint16_t(x.bits << 8)); }

// Placed in an f16, whose exponents begin 8 lower. All bits but the sign say that it is no number.
__device__ inline float widen(e4m3 x) {
    const float value = number(uint16_t((x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7)) * 256.f;
    return (x.bits & 0x7f) == 0x7f ? NAN : value;
}

template <typename T, typename From, int N> __device__ void widen_run(const Dequantise& p) {
    const From* from = static_cast<const From*>(p.from);
    T* y = static_cast<T*>(p.y);
    const int64_t start = int64_t(blockIdx.x) * (THREADS * PIECE);
    const int64_t end = start + THREADS * PIECE < p.count ? start + THREADS * PIECE : p.count;
    float values[N];
    for (int64_t i = start + threadIdx.x * N; i < end; i += THREADS * N) {
        load<N, WIDE<From> < N ? WIDE<From> : N>(from + i, values);
        if (sizeof(From) == 1)
            for (int j = 0; j < N; ++j) values[j] *= p.scale;
        store<N, WIDE<T> < N ? WIDE<T> : N>(y + i, values);
    }
}

template <typename T, typename From> __device__ void numbers(const Dequantise& p) {
    p.wide ? widen_run<T, From, PIECE>(p) : widen_run<T, From, 1>(p);
}

#define DEQUANTISE(NAME, KIND, FROM) \
    template <typename T> __device__ void NAME(const Dequantise& p) { KIND<T, FROM>(p); } \
    KERNELS(NAME, THREADS, Dequantise)

DEQUANTISE(dequantise_q4_0, blocks, Q4_0)
DEQUANTISE(dequantise_q4_1, blocks, Q4_1)
DEQUANTISE(dequantise_q5_0, blocks, Q5_0)
DEQUANTISE(dequantise_q5_1, blocks, Q5_1)
DEQUANTISE(dequantise_q8_0, blocks, Q8_0)
DEQUANTISE(dequantise_q2k, blocks, Q2K)
DEQUANTISE(dequantise_q3k, blocks, Q3K)
DEQUANTISE(dequantise_q4k, blocks, Q4K)
DEQUANTISE(dequantise_q5k, blocks, Q5K)
DEQUANTISE(dequantise_q6k, blocks, Q6K)
DEQUANTISE(dequantise_e4m3, numbers, e4m3)
DEQUANTISE(dequantise_e5m2, numbers, e5m2)
DEQUANTISE(dequantise_f32, numbers, float)
DEQUANTISE(dequantise_bf16, numbers, bf16)
DEQUANTISE(dequantise_f16, numbers, f16)
