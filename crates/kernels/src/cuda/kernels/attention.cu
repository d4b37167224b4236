// softmax(scale q k^T + bias) v without the scores in memory: FlashAttention-2's forward pass (Dao, 2023).
//
// A block takes 128 queries of one head, each of its four warps 32 of them, and walks over the keys in tiles. Scores live
// in registers; running maximum and sum make the softmax exact; products are f32. While scores are computed the tile's
// values are on their way, while values are summed the next tile's keys are.
//
// In shared memory a row of a tile is `HEAD` numbers in chunks of 16 bytes. The chunks' order is exchanged from row to row,
// so that eight rows' chunks of one column, which ldmatrix reads at once, lie in different banks.
#include "tensor_core.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int QUERIES = 32 * WARPS; // of a block
constexpr int CHUNK = 8;            // 16-bit numbers
constexpr float LOG2_E = 1.4426950409f;

struct Attention {
    const void* q; // [batch, queries, heads, HEAD], any strides but the last
    const void* k; // [batch, keys, heads, HEAD], likewise
    const void* v;
    const void* bias; // [heads, queries, keys], likewise; of the kernels with a bias
    void* y;          // [batch, queries, heads, HEAD], likewise
    int64_t q_strides[3];
    int64_t k_strides[3];
    int64_t v_strides[3];
    int64_t bias_strides[2];
    int64_t y_strides[3];
    int64_t bias_pairs; // whether a row of the bias is made of whole loads of two
    int64_t queries;
    int64_t keys;
    double scale; // above 0
};

// Where a chunk lies in a tile, in numbers.
template <int HEAD> __device__ int place(int row, int chunk) {
    // Eight rows fill the 128 bytes of all banks with different chunks only if rows of 64 bytes change places in pairs.
    const int exchanged = HEAD >= 64 ? chunk ^ (row % 8) : chunk ^ (row / 2 % 4);
    return row * HEAD + exchanged * CHUNK;
}

// Starts to copy ROWS rows from `rows` on, of which `count` exist, and zeros for those that do not.
template <typename T, int HEAD, int ROWS> __device__ void fill(T* tile, const T* rows, int64_t stride, int count) {
    constexpr int CHUNKS = HEAD / CHUNK, STEP = THREADS / CHUNKS;
    const int first = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    const T* from = rows + first * stride + chunk * CHUNK;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP, from += STEP * stride) {
        const bool exists = first + i < count;
        copy_async(tile + place<HEAD>(first + i, chunk), exists ? from : rows, exists ? 16 : 0);
    }
}

// Two halves of a warp's rows: 16 rows each are one product's.
constexpr int HALVES = 2;

// Makes powers of two of what a lane has of a warp's products: times scale, plus bias. From this lane's first element of the
// bias on there are `queries` rows and `keys` columns.
template <typename T, int KEYS>
__device__ void add_bias(const Attention& p, float (&scores)[HALVES][KEYS / 8][4], const T* bias, int queries, int keys) {
    const float scale = float(p.scale) * LOG2_E;
#pragma unroll
    for (int h = 0; h < HALVES; ++h)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int query = h * 16 + r * 8;
            if (query >= queries) continue;
            const T* row = bias + query * p.bias_strides[1];
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i) {
                if (i * 8 >= keys) continue;
                float pair[2] = {};
                if (p.bias_pairs) {
                    load<2>(row + i * 8, pair);
                } else {
                    pair[0] = widen(fetch(row + i * 8));
                    if (i * 8 + 1 < keys) pair[1] = widen(fetch(row + i * 8 + 1));
                }
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& score = scores[h][i][2 * r + j];
                    score = score * scale + pair[j] * LOG2_E;
                }
            }
        }
}

template <typename T, int HEAD, int KEYS, bool BIAS> __device__ void attention(const Attention& p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t batch = blockIdx.z, head = blockIdx.y, first_query = int64_t(blockIdx.x) * QUERIES;
    const int queries = int(p.queries - first_query); // from this block's first on
    const T* q = static_cast<const T*>(p.q) + batch * p.q_strides[0] + first_query * p.q_strides[1] + head * p.q_strides[2];
    const T* k = static_cast<const T*>(p.k) + batch * p.k_strides[0] + head * p.k_strides[2];
    const T* v = static_cast<const T*>(p.v) + batch * p.v_strides[0] + head * p.v_strides[2];
    T* q_tile = reinterpret_cast<T*>(shared_memory());
    T* k_tile = q_tile + QUERIES * HEAD;
    T* v_tile = k_tile + KEYS * HEAD;

    float sums[HALVES][HEAD / 8][4] = {};
    // Of rows g and g + 8 (tensor_core.cuh) of each half: the largest score so far, and this lane's part of the sum of exponentials.
    float largest[HALVES][2], totals[HALVES][2] = {};
    for (int h = 0; h < HALVES; ++h) largest[h][0] = largest[h][1] = -INFINITY;
    // Exponentials are powers of two of scores times this.
    const float scale = BIAS ? 1.f : float(p.scale) * LOG2_E;
    // Of this lane's first score.
    const int row = warp * 32 + lane / 4, column = lane % 4 * 2;
    const T* bias = nullptr;
    if (BIAS) bias = static_cast<const T*>(p.bias) + head * p.bias_strides[0] + (first_query + row) * p.bias_strides[1] + column;

    fill<T, HEAD, QUERIES>(q_tile, q, p.q_strides[1], queries);
    fill<T, HEAD, KEYS>(k_tile, k, p.k_strides[1], int(p.keys));
    for (int keys = int(p.keys); keys > 0; keys -= KEYS) { // those not done yet
        wait_for_copies();
        __syncthreads(); // keys are here, and all warps have done with the last tile's values
        fill<T, HEAD, KEYS>(v_tile, v, p.v_strides[1], keys);
        v += KEYS * p.v_strides[1];

        float scores[HALVES][KEYS / 8][4] = {};
#pragma unroll
        for (int depth = 0; depth < HEAD / 16; ++depth) {
            uint32_t a[HALVES][4];
#pragma unroll
            for (int h = 0; h < HALVES; ++h)
                load_matrices(a[h], q_tile + place<HEAD>(warp * 32 + h * 16 + lane % 16, 2 * depth + lane / 16));
#pragma unroll
            for (int key = 0; key < KEYS; key += 16) {
                // Keys are columns of the second factor: their rows in memory are what its fragments hold.
                uint32_t b[4];
                load_matrices(b, k_tile + place<HEAD>(key + lane / 16 * 8 + lane % 8, 2 * depth + lane / 8 % 2));
#pragma unroll
                for (int h = 0; h < HALVES; ++h) {
                    multiply_add<T>(scores[h][key / 8], a[h], b[0], b[1]);
                    multiply_add<T>(scores[h][key / 8 + 1], a[h], b[2], b[3]);
                }
            }
        }
        if (BIAS) {
            add_bias<T, KEYS>(p, scores, bias, queries - row, keys - column);
            bias += KEYS;
        }
        wait_for_copies();
        __syncthreads(); // values are here, and all warps have done with this tile's keys
        if (keys > KEYS) {
            k += KEYS * p.k_strides[1];
            fill<T, HEAD, KEYS>(k_tile, k, p.k_strides[1], keys - KEYS);
        } else {
#pragma unroll
            for (int h = 0; h < HALVES; ++h)
#pragma unroll
                for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        if (i * 8 + column + j % 2 >= keys) scores[h][i][j] = -INFINITY;
        }

#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float top = largest[h][r];
#pragma unroll
                for (int i = 0; i < KEYS / 8; ++i)
                    top = fmaxf(top, fmaxf(scores[h][i][2 * r], scores[h][i][2 * r + 1]));
                // A row's scores are spread over four lanes.
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                // All of the row's keys so far may have a bias of minus infinity. If that stays so the result is 0 / 0.
                const float base = BIAS && top == -INFINITY ? 0.f : top;
                const float fade = power_of_two((largest[h][r] - base) * scale);
                largest[h][r] = top;
                totals[h][r] *= fade;
#pragma unroll
                for (int i = 0; i < HEAD / 8; ++i) {
                    sums[h][i][2 * r] *= fade;
                    sums[h][i][2 * r + 1] *= fade;
                }
#pragma unroll
                for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
                    for (int j = 2 * r; j < 2 * r + 2; ++j) {
                        scores[h][i][j] = power_of_two(scores[h][i][j] * scale - base * scale);
                        totals[h][r] += scores[h][i][j];
                    }
            }
        }

#pragma unroll
        for (int key = 0; key < KEYS; key += 16) {
            // What a lane holds of two products' results is what it must hold of the next one's first factor.
            uint32_t a[HALVES][4];
#pragma unroll
            for (int h = 0; h < HALVES; ++h)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* pair = &scores[h][key / 8 + i / 2][i % 2 * 2];
                    a[h][i] = packed<T>(pair[0], pair[1]);
                }
#pragma unroll
            for (int column = 0; column < HEAD; column += 16) {
                uint32_t b[4];
                load_transposed(b, v_tile + place<HEAD>(key + lane % 16, column / 8 + lane / 16));
#pragma unroll
                for (int h = 0; h < HALVES; ++h) {
                    multiply_add<T>(sums[h][column / 8], a[h], b[0], b[1]);
                    multiply_add<T>(sums[h][column / 8 + 1], a[h], b[2], b[3]);
                }
            }
        }
    }

    T* y = static_cast<T*>(p.y) + batch * p.y_strides[0] + first_query * p.y_strides[1] + head * p.y_strides[2];
#pragma unroll
    for (int h = 0; h < HALVES; ++h)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float inverse = 1.f / lanes_sum(totals[h][r], 4);
            const int query = row + h * 16 + r * 8;
            if (query >= queries) continue;
#pragma unroll
            for (int i = 0; i < HEAD / 8; ++i) {
                const float pair[2] = {sums[h][i][2 * r] * inverse, sums[h][i][2 * r + 1] * inverse};
                store<2>(y + query * p.y_strides[1] + i * 8 + column, pair);
            }
        }
}

#define ATTENTION(NAME, HEAD, KEYS, BIAS) \
    KERNEL(NAME##_bf16, THREADS, Attention, attention<bf16, HEAD, KEYS, BIAS>) \
    KERNEL(NAME##_f16, THREADS, Attention, attention<f16, HEAD, KEYS, BIAS>)

ATTENTION(attention_32_64, 32, 64, false)
ATTENTION(attention_64_64, 64, 64, false)
ATTENTION(attention_64_64_bias, 64, 64, true) // the text encoders' heads
ATTENTION(attention_128_32, 128, 32, false)
ATTENTION(attention_128_64, 128, 64, false)
