// Vectors of float32 values: loads, stores, activation functions, and the product of the recurrences.
#pragma once
#include <cstddef>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Vector registers used as accumulators in a block of a product; the rest of the 16 or 32 registers holds its operands.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 24;
#else
constexpr int LANES = 8, REGISTERS = 12;
#endif

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int ivec __attribute__((vector_size(LANES * sizeof(int))));

#define INLINE static inline __attribute__((always_inline))

INLINE vec splat(float x) { return vec{} + x; }

INLINE vec load(const float* p, ptrdiff_t n = LANES) {
    vec v = {};
    if (n >= LANES) std::memcpy(&v, p, sizeof v);
    else if (n > 0) std::memcpy(&v, p, n * sizeof(float));
    return v;
}

INLINE void store(float* p, vec v, ptrdiff_t n = LANES) {
    if (n >= LANES) std::memcpy(p, &v, sizeof v);
    else std::memcpy(p, &v, n * sizeof(float));
}

#if defined(__AVX512BF16__)
struct bfloat16 {
    unsigned short bits;
};

INLINE __mmask16 first(ptrdiff_t n) { return n >= LANES ? 0xFFFF : n > 0 ? (1u << n) - 1 : 0; }

INLINE vec load(const bfloat16* p, ptrdiff_t n = LANES) {
    return vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16));
}

INLINE void store(bfloat16* p, vec v, ptrdiff_t n = LANES) {
    _mm256_mask_storeu_epi16(p, first(n), __m256i(_mm512_cvtneps_pbh(__m512(v))));
}
#endif

// 1 / x: for float to about one unit in the last place, for bfloat16 to 14 bits.
template <typename T>
INLINE vec reciprocal(vec x) {
#if defined(__AVX512F__)
    const vec r = vec(_mm512_rcp14_ps(__m512(x)));
    return std::is_same<T, float>::value ? r + r * (1.0f - x * r) : r;
#else
    return 1.0f / x;
#endif
}

// Returns power, a power of two, and rest with exp(x) = power * (1 + rest), where x is clamped to [-limit, limit] and
// limit is at most 87: reduction to [-ln 2 / 2, ln 2 / 2] and a polynomial with the coefficients of Cephes' expf, of
// degree 4 for bfloat16. NaN gives NaN.
template <typename T>
INLINE vec exponential(vec x, float limit, vec& rest) {
#if defined(__AVX512F__)
    // minimum and maximum return their second operand where it is NaN
    x = vec(_mm512_max_ps(_mm512_set1_ps(-limit), _mm512_min_ps(_mm512_set1_ps(limit), __m512(x))));
    const vec n = vec(_mm512_roundscale_ps(__m512(x * 1.44269504f), 0));
    const vec power = vec(_mm512_scalef_ps(_mm512_set1_ps(1.0f), __m512(n)));
#else
    const float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    x = x > limit ? splat(limit) : x;
    x = x < -limit ? splat(-limit) : x;
    const vec shifted = x * 1.44269504f + ROUND, n = shifted - ROUND;
    ivec bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000 + 127) << 23;  // subtract the bits of ROUND, add the exponent's bias
    vec power;
    std::memcpy(&power, &bits, sizeof power);
#endif
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
    vec p = splat(4.1665795894e-2f);
    if (std::is_same<T, float>::value) {
        p = splat(1.9875691500e-4f);
        p = p * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
    }
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    rest = p * r * r + r;
    return power;
}

template <typename T>
INLINE vec sigmoid(vec x) {
    vec rest;
    const vec power = exponential<T>(-x, 87.0f, rest);
    return reciprocal<T>(power * rest + power + 1.0f);
}

// tanh(x) as e / (e + 2) with e = exp(2x) - 1, which is computed without cancellation near zero.
template <typename T>
INLINE vec hyperbolic_tangent(vec x) {
    vec rest;
    const vec power = exponential<T>(2.0f * x, 40.0f, rest);
    const vec e = power * rest + (power - 1.0f);
    return e * reciprocal<T>(e + 2.0f);
}

// The operands of a product: DEPTH consecutive elements of a row are multiplied by one instruction.
template <typename T>
struct Operand;

template <>
struct Operand<float> {
    static constexpr int DEPTH = 1;
    typedef vec type;
    static inline type weights(const float* p) { return load(p); }
    static inline type broadcast(const float* p) { return splat(*p); }
    static inline vec multiply_add(vec sum, type a, type b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Operand<bfloat16> {
    static constexpr int DEPTH = 2;
    typedef __m512i type;
    static inline type weights(const bfloat16* p) { return _mm512_loadu_si512(p); }
    static inline type broadcast(const bfloat16* p) {
        int pair;
        std::memcpy(&pair, p, sizeof pair);
        return _mm512_set1_epi32(pair);
    }
    static inline vec multiply_add(vec sum, type a, type b) {
        return vec(_mm512_dpbf16_ps(__m512(sum), (__m512bh)a, (__m512bh)b));
    }
};
#endif

// acc[v][r] += sum over k of w[k / DEPTH][v][lane][k % DEPTH] * x[r][k], in float32. Only the operand of the shorter
// side of the block is kept in registers, since AVX2 has too few for both.
template <typename T, int V, int R>
INLINE void product(vec (&acc)[V][R], const T* w, const T* x, ptrdiff_t row, ptrdiff_t depth) {
    typedef Operand<T> O;
    for (ptrdiff_t k = 0; k < depth; k += O::DEPTH, w += V * LANES * O::DEPTH) {
        if constexpr (V < R) {
            typename O::type a[V];
            for (int v = 0; v < V; ++v) a[v] = O::weights(w + v * LANES * O::DEPTH);
            for (int r = 0; r < R; ++r) {
                const typename O::type b = O::broadcast(x + r * row + k);
                for (int v = 0; v < V; ++v) acc[v][r] = O::multiply_add(acc[v][r], a[v], b);
            }
        } else {
            typename O::type b[R];
            for (int r = 0; r < R; ++r) b[r] = O::broadcast(x + r * row + k);
            for (int v = 0; v < V; ++v) {
                const typename O::type a = O::weights(w + v * LANES * O::DEPTH);
                for (int r = 0; r < R; ++r) acc[v][r] = O::multiply_add(acc[v][r], a, b[r]);
            }
        }
    }
}

#if defined(__AMX_BF16__)
constexpr bool HAVE_TILES = true;

// What was written is in memory: the intrinsics that read it do not say so to the compiler.
#define MEMORY_BARRIER __asm__ volatile("" ::: "memory")

// Configures the eight tile registers of a thread, each of 16 rows of 64 bytes.
INLINE void configure_tiles() {
    struct alignas(64) {
        unsigned char palette = 1, start_row = 0, reserved[14] = {};
        unsigned short bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    MEMORY_BARRIER;
    _tile_loadconfig(&configuration);
}

INLINE void release_tiles() { _tile_release(); }

// The same product by tiles, for R = 16 rows, at most 4 vectors and a depth that is a multiple of 32: tiles 0 to 3 hold
// the sums, 4 holds x, and 5 to 7 the weights.
template <int V>
INLINE void product_by_tiles(vec (&acc)[V][16], const bfloat16* w, const bfloat16* x, ptrdiff_t row, ptrdiff_t depth) {
#define FOR_EACH_TILE(action) \
    action(0, 5); \
    if constexpr (V > 1) action(1, 6); \
    if constexpr (V > 2) action(2, 7); \
    if constexpr (V > 3) action(3, 5)
#define LOAD_SUM(v, b) _tile_loadd(v, acc[v], sizeof(vec))
#define ADD_PRODUCT(v, b) \
    { \
        _tile_loadd(b, w + (k * V + v * 2) * LANES, V * 2 * LANES * sizeof(bfloat16)); \
        _tile_dpbf16ps(v, 4, b); \
    }
#define STORE_SUM(v, b) _tile_stored(v, acc[v], sizeof(vec))
    MEMORY_BARRIER;
    FOR_EACH_TILE(LOAD_SUM);
    for (ptrdiff_t k = 0; k < depth; k += 32) {
        _tile_loadd(4, x + k, row * sizeof(bfloat16));
        FOR_EACH_TILE(ADD_PRODUCT);
    }
    FOR_EACH_TILE(STORE_SUM);
#undef FOR_EACH_TILE
#undef LOAD_SUM
#undef ADD_PRODUCT
#undef STORE_SUM
}
#else
constexpr bool HAVE_TILES = false;

INLINE void configure_tiles() {}

INLINE void release_tiles() {}
#endif
