// LSTM and IndyLSTM along the columns and rows of a token map, forward and backward through time, in float32.
//
// The input projection and the gradients of the weights are plain matrix products, which the caller computes with
// torch. This file contains the scans over time. A thread processes all steps of a tile of sequences, with its state in
// cache. The product with the recurrent weights and the activations are fused in registers. The token map is indexed in
// place, so that no direction needs a transposed or flipped copy.
//
// Layouts, for S directions of D units:
//   gates [tokens, S, 4, D], the gates in the order i, f, g, o      cells, out [tokens, S, D]
// Directions: 0 scans the columns from top to bottom, 1 from bottom to top, 2 scans the rows from left to right, 3 from
// right to left.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

// Vector registers used as accumulators in a block of a product; the rest of the 16 or 32 registers holds its operands.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 24;
#else
constexpr int LANES = 8, REGISTERS = 12;
#endif
constexpr int MAX_TILE = 24;

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int ivec __attribute__((vector_size(LANES * sizeof(int))));

static inline vec splat(float x) { return vec{} + x; }

static inline vec load(const float* p, ptrdiff_t n = LANES) {
    vec v = {};
    if (n >= LANES) std::memcpy(&v, p, sizeof v);
    else std::memcpy(&v, p, n * sizeof(float));
    return v;
}

static inline void store(float* p, vec v, ptrdiff_t n = LANES) {
    if (n >= LANES) std::memcpy(p, &v, sizeof v);
    else std::memcpy(p, &v, n * sizeof(float));
}

// exp(x), with x clamped to [-87, 88]: reduction to [-ln 2 / 2, ln 2 / 2] and a polynomial with the coefficients of
// Cephes' expf. NaN gives NaN.
static inline vec exponential(vec x) {
    const float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    x = x > 88.0f ? splat(88.0f) : x;
    x = x < -87.0f ? splat(-87.0f) : x;
    const vec shifted = x * 1.44269504f + ROUND;
    const vec n = shifted - ROUND;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000 + 127) << 23;  // subtract the bits of ROUND, add the exponent's bias
    vec power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

// tanh(x) as 1 - 2 / (1 + exp(2x)), which suffers from cancellation near zero; there, a polynomial with the
// coefficients of Cephes' tanhf.
static inline vec hyperbolic_tangent(vec x) {
    const vec far = 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
    const vec z = x * x;
    vec p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const vec near = p * z * x + x;
    return z < 0.390625f ? near : far;
}

// acc[v][r] += sum over k of w[k][v] * x[r][k]. Only the operand of the shorter side of the block is kept in registers,
// since AVX2 has too few for both.
template <int V, int R>
static inline __attribute__((always_inline)) void product(
    vec (&acc)[V][R], const float* w, const float* x, ptrdiff_t row, ptrdiff_t depth) {
    for (ptrdiff_t k = 0; k < depth; ++k) {
        if constexpr (V < R) {
            vec a[V];
            for (int v = 0; v < V; ++v) a[v] = load(w + (k * V + v) * LANES);
            for (int r = 0; r < R; ++r) {
                const vec b = splat(x[r * row + k]);
                for (int v = 0; v < V; ++v) acc[v][r] += a[v] * b;
            }
        } else {
            vec b[R];
            for (int r = 0; r < R; ++r) b[r] = splat(x[r * row + k]);
            for (int v = 0; v < V; ++v) {
                const vec a = load(w + (k * V + v) * LANES);
                for (int r = 0; r < R; ++r) acc[v][r] += a * b[r];
            }
        }
    }
}

// The members of the following structures and their order must equal those of the ctypes structures in cpu.py.
struct Map {
    ptrdiff_t B, H, W, D, S, tile, threads;
    const ptrdiff_t* directions;

    ptrdiff_t padded() const { return (D + LANES - 1) / LANES * LANES; }
    bool vertical(ptrdiff_t s) const { return directions[s] < 2; }
    bool reverse(ptrdiff_t s) const { return directions[s] % 2; }
    ptrdiff_t steps(ptrdiff_t s) const { return vertical(s) ? H : W; }
    ptrdiff_t sequences(ptrdiff_t s) const { return B * (vertical(s) ? W : H); }
    ptrdiff_t tiles(ptrdiff_t s) const { return (sequences(s) + tile - 1) / tile; }
    ptrdiff_t stride(ptrdiff_t s) const { return (vertical(s) ? W : 1) * (reverse(s) ? -1 : 1); }
    // index of the token that is the first step of sequence n
    ptrdiff_t start(ptrdiff_t s, ptrdiff_t n) const {
        const ptrdiff_t first = vertical(s) ? n / W * H * W + n % W : n * W;
        return first - (reverse(s) ? (steps(s) - 1) * stride(s) : 0);
    }
};

struct Forward {
    Map map;
    const float* bias;    // [S, 4, D]
    const float* weight;  // layout [S, P / LANES, D, 4, LANES] with P = padded(); or diagonals [S, 4, D]
    float *gates, *out;   // gates: in, the projected inputs; out, the activated gates where cells is not null
    float* cells;         // null in inference
    bool diagonal;
};

struct Backward {
    Map map;
    const float* weight;  // layout [S, P / (V * LANES), 4 P, V, LANES] with V = vectors(D); or diagonals [S, 4, D]
    const float *gates, *cells, *out, *grad_out;
    float *grad_gates, *previous;      // previous: out, the outputs of each token's previous step, [tokens, S, D]
    float *grad_bias, *grad_diagonal;  // [tiles of all directions, 4, D], partial sums, one a tile
    bool diagonal;
};

// Calls body(task, s, first, count) for every tile of every direction: index among all tiles, direction's position,
// first sequence of the tile, number of its sequences.
template <typename Body>
static void for_each_tile(const Map& m, Body body) {
    ptrdiff_t total = 0;
    for (ptrdiff_t s = 0; s < m.S; ++s) total += m.tiles(s);
#pragma omp parallel for schedule(dynamic) num_threads(m.threads)
    for (ptrdiff_t task = 0; task < total; ++task) {
        ptrdiff_t s = 0, tile = task;
        while (tile >= m.tiles(s)) tile -= m.tiles(s++);
        const ptrdiff_t first = tile * m.tile;
        body(task, s, first, std::min(m.tile, m.sequences(s) - first));
    }
}

// Advances LANES units of R sequences by one step.
template <int R>
static inline __attribute__((always_inline)) void forward_block(
    const Forward& f, ptrdiff_t s, ptrdiff_t unit, const ptrdiff_t* token, const float* h, float* h_next, float* c) {
    const ptrdiff_t D = f.map.D, S = f.map.S, P = f.map.padded(), n = D - unit;
    vec acc[4][R];
    for (int q = 0; q < 4; ++q) {
        const vec bias = load(f.bias + (s * 4 + q) * D + unit, n);
        for (int r = 0; r < R; ++r) acc[q][r] = bias + load(f.gates + ((token[r] * S + s) * 4 + q) * D + unit, n);
    }
    if (f.diagonal) {
        for (int q = 0; q < 4; ++q) {
            const vec w = load(f.weight + (s * 4 + q) * D + unit, n);
            for (int r = 0; r < R; ++r) acc[q][r] += w * load(h + r * P + unit);
        }
    } else {
        product<4, R>(acc, f.weight + (s * P + unit) * 4 * D, h, P, D);
    }
    for (int r = 0; r < R; ++r) {
        const vec i = sigmoid(acc[0][r]), forget = sigmoid(acc[1][r]);
        const vec g = hyperbolic_tangent(acc[2][r]), o = sigmoid(acc[3][r]);
        const vec cell = forget * load(c + r * P + unit) + i * g;
        const vec y = o * hyperbolic_tangent(cell);
        store(c + r * P + unit, cell);
        store(h_next + r * P + unit, y);
        store(f.out + (token[r] * S + s) * D + unit, y, n);
        if (f.cells) {
            float* gate = f.gates + (token[r] * S + s) * 4 * D + unit;
            store(gate, i, n);
            store(gate + D, forget, n);
            store(gate + 2 * D, g, n);
            store(gate + 3 * D, o, n);
            store(f.cells + (token[r] * S + s) * D + unit, cell, n);
        }
    }
}

static void forward_tile(const Forward& f, ptrdiff_t s, ptrdiff_t first, ptrdiff_t count) {
    constexpr int R = REGISTERS / 4;
    const ptrdiff_t P = f.map.padded(), T = f.map.steps(s), stride = f.map.stride(s);
    std::vector<float> state(3 * count * P);
    float *h = state.data(), *h_next = h + count * P, *c = h_next + count * P;
    ptrdiff_t token[MAX_TILE];
    for (ptrdiff_t r = 0; r < count; ++r) token[r] = f.map.start(s, first + r);
    for (ptrdiff_t t = 0; t < T; ++t) {
        for (ptrdiff_t unit = 0; unit < f.map.D; unit += LANES) {
            ptrdiff_t r = 0;
            for (; r + R <= count; r += R)
                forward_block<R>(f, s, unit, token + r, h + r * P, h_next + r * P, c + r * P);
            for (; r < count; ++r) forward_block<1>(f, s, unit, token + r, h + r * P, h_next + r * P, c + r * P);
        }
        for (ptrdiff_t r = 0; r < count; ++r) token[r] += stride;
        std::swap(h, h_next);
    }
}

// The values that the backward pass of a tile carries from a step to the previous one.
struct Carry {
    ptrdiff_t direction, before;     // before: token index of the previous step minus this one's; 0 at the first step
    ptrdiff_t token[MAX_TILE];       // token of the current step of each sequence
    float *grad, *grad_next, *cell;  // gradients of the gates of the next step and of this step, [count, 4, P]; of c
    float *bias, *diagonal;          // partial sums of grad_bias and grad_diagonal, [4, P]
};

// Propagates gradients through one step, for V * LANES units of R sequences starting at sequence `row` of the tile.
template <int V, int R>
static inline __attribute__((always_inline)) void backward_block(
    const Backward& b, const Carry& carry, ptrdiff_t unit, ptrdiff_t row) {
    const ptrdiff_t D = b.map.D, S = b.map.S, P = b.map.padded(), s = carry.direction;
    vec dh[V][R];
    for (int v = 0; v < V; ++v)
        for (int r = 0; r < R; ++r)
            dh[v][r] = load(b.grad_out + (carry.token[row + r] * S + s) * D + unit + v * LANES, D - unit - v * LANES);
    if (!b.diagonal) product<V, R>(dh, b.weight + (s * P + unit) * 4 * P, carry.grad + row * 4 * P, 4 * P, 4 * P);
    for (int v = 0; v < V; ++v) {
        const ptrdiff_t u = unit + v * LANES, n = D - u;
        vec w[4] = {}, bias[4] = {}, diagonal[4] = {};
        if (b.diagonal)
            for (int q = 0; q < 4; ++q) w[q] = load(b.weight + (s * 4 + q) * D + u, n);
        for (int r = 0; r < R; ++r) {
            const ptrdiff_t at = carry.token[row + r] * S + s, before = at + carry.before * S;
            const float* gate = b.gates + at * 4 * D + u;
            const vec i = load(gate, n), f = load(gate + D, n), g = load(gate + 2 * D, n), o = load(gate + 3 * D, n);
            const vec c_before = carry.before ? load(b.cells + before * D + u, n) : vec{};
            const vec h_before = carry.before ? load(b.out + before * D + u, n) : vec{};
            vec d = dh[v][r];
            if (b.diagonal)
                for (int q = 0; q < 4; ++q) d += w[q] * load(carry.grad + ((row + r) * 4 + q) * P + u);
            const vec tanh_c = hyperbolic_tangent(load(b.cells + at * D + u, n));
            const vec dc = load(carry.cell + (row + r) * P + u) + d * o * (1.0f - tanh_c * tanh_c);
            const vec grad[4] = {
                dc * g * i * (1.0f - i),
                dc * c_before * f * (1.0f - f),
                dc * i * (1.0f - g * g),
                d * tanh_c * o * (1.0f - o),
            };
            store(carry.cell + (row + r) * P + u, dc * f);
            for (int q = 0; q < 4; ++q) {
                store(b.grad_gates + (at * 4 + q) * D + u, grad[q], n);
                store(carry.grad_next + ((row + r) * 4 + q) * P + u, grad[q]);
                bias[q] += grad[q];
                if (b.diagonal) diagonal[q] += grad[q] * h_before;
            }
            if (!b.diagonal) store(b.previous + at * D + u, h_before, n);
        }
        for (int q = 0; q < 4; ++q) {
            float *sum = carry.bias + q * P + u, *product = carry.diagonal + q * P + u;
            store(sum, load(sum) + bias[q]);
            if (b.diagonal) store(product, load(product) + diagonal[q]);
        }
    }
}

template <int V>
static void backward_tile(const Backward& b, ptrdiff_t task, ptrdiff_t s, ptrdiff_t first, ptrdiff_t count) {
    constexpr int R = REGISTERS / V;
    const ptrdiff_t D = b.map.D, P = b.map.padded(), T = b.map.steps(s), stride = b.map.stride(s);
    std::vector<float> memory((9 * count + 8) * P);
    Carry carry = {};
    carry.direction = s;
    carry.grad = memory.data();
    carry.grad_next = carry.grad + 4 * count * P;
    carry.cell = carry.grad_next + 4 * count * P;
    carry.bias = carry.cell + count * P;
    carry.diagonal = carry.bias + 4 * P;
    for (ptrdiff_t r = 0; r < count; ++r) carry.token[r] = b.map.start(s, first + r) + (T - 1) * stride;
    for (ptrdiff_t t = T - 1; t >= 0; --t) {
        carry.before = t ? -stride : 0;
        for (ptrdiff_t unit = 0; unit < D; unit += V * LANES) {
            ptrdiff_t r = 0;
            for (; r + R <= count; r += R) backward_block<V, R>(b, carry, unit, r);
            for (; r < count; ++r) backward_block<V, 1>(b, carry, unit, r);
        }
        for (ptrdiff_t r = 0; r < count; ++r) carry.token[r] -= stride;
        std::swap(carry.grad, carry.grad_next);
    }
    for (int q = 0; q < 4; ++q) {
        std::memcpy(b.grad_bias + (task * 4 + q) * D, carry.bias + q * P, D * sizeof(float));
        if (b.diagonal)
            std::memcpy(b.grad_diagonal + (task * 4 + q) * D, carry.diagonal + q * P, D * sizeof(float));
    }
}

extern "C" {

int lanes() { return LANES; }

int max_tile() { return MAX_TILE; }

// Checksum of several arrays of 32-bit words, by which changes of their values are detected.
unsigned checksum(const unsigned* const* arrays, const ptrdiff_t* sizes, ptrdiff_t count, ptrdiff_t threads) {
    unsigned total = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(+ : total)
    for (ptrdiff_t a = 0; a < count; ++a)
        for (ptrdiff_t i = 0; i < sizes[a]; ++i) {
            unsigned mixed = (arrays[a][i] + unsigned(i)) * 0x9E3779B1u;  // position-dependent, spread over all bits
            mixed = (mixed ^ (mixed >> 15)) * (2 * unsigned(a) + 0x85EBCA6Bu);
            total += mixed ^ (mixed >> 13);
        }
    return total;
}

// Vectors of units in a block of the backward pass: the largest of 3, 2 and 1 that divides the number of vectors.
int vectors(ptrdiff_t D) {
    const ptrdiff_t blocks = (D + LANES - 1) / LANES;
    return blocks % 3 == 0 ? 3 : blocks % 2 == 0 ? 2 : 1;
}

void forward(const Forward* f) {
    for_each_tile(f->map, [&](ptrdiff_t, ptrdiff_t s, ptrdiff_t first, ptrdiff_t count) {
        forward_tile(*f, s, first, count);
    });
}

void backward(const Backward* b) {
    const int V = vectors(b->map.D);
    for_each_tile(b->map, [&](ptrdiff_t task, ptrdiff_t s, ptrdiff_t first, ptrdiff_t count) {
        if (V == 3) backward_tile<3>(*b, task, s, first, count);
        else if (V == 2) backward_tile<2>(*b, task, s, first, count);
        else backward_tile<1>(*b, task, s, first, count);
    });
}

}
