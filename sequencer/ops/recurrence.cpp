// Recurrences along the columns and rows of a token map, forward and backward through time.
//
// The input projection and the gradients of the weights are plain matrix products, which the caller computes with
// torch. This file contains the scans over time. A thread processes all steps of a tile of sequences, with its state in
// cache. The product with the recurrent weights and the activations are fused in registers. The token map is indexed in
// place, so that no direction needs a transposed or flipped copy.
//
// Compiled once for each cell and type of the arrays: -DCELL=LSTM, GRU and so on, and -DSCALAR=float or
// bfloat16. The latter needs instructions for its products: AVX512-BF16, and AMX where there is one. State, biases, sums
// and arithmetic are float32.
//
// Layouts, for S directions of D units and a cell of G gates and J biases:
//   gates [tokens, S, G, D], in the order i, f, g, o of an LSTM or r, z, n of a GRU      cells, out [tokens, S, D]
//   bias [S, J, D], one a gate; those of a GRU are r, z, n of the input, n of the recurrent term; of an LSTM with
//   peepholes, their weights of i, f, o follow
// Directions: 0 scans the columns from top to bottom, 1 from bottom to top, 2 scans the rows from left to right, 3 from
// right to left.
#include <algorithm>
#include <vector>

#include "vectors.h"

enum Cell { LSTM, PEEPHOLE_LSTM, INDYLSTM, LSTM1997, GRU, RNN, RNN_RELU };
typedef SCALAR T;
constexpr bool PLAIN = CELL == RNN || CELL == RNN_RELU, LSTM_LIKE = CELL <= LSTM1997;
constexpr bool FORGETS = LSTM_LIKE && CELL != LSTM1997, PEEPHOLES = CELL == PEEPHOLE_LSTM;
constexpr int G = PLAIN ? 1 : CELL == GRU || CELL == LSTM1997 ? 3 : 4, J = PEEPHOLES ? 7 : CELL == GRU ? 4 : G;
constexpr int DEPTH = Operand<T>::DEPTH;
// The LSTM of 1997 squashes its cell input g to [-2, 2] by 2 tanh(x / 2), and its state by tanh(x / 2).
constexpr float SLOPE = CELL == LSTM1997 ? 0.5f : 1.0f;
constexpr bool TILES = HAVE_TILES && CELL != INDYLSTM;  // recurrent products by the tile registers of AMX
constexpr int MAX_TILE = TILES ? 32 : 24, UNIT = TILES ? 32 : LANES;

// The members of the following structures and their order must equal those of the ctypes structures in cpu.py.
struct Map {
    ptrdiff_t B, H, W, D, S, tile, threads;
    const ptrdiff_t* directions;

    ptrdiff_t padded() const { return (D + UNIT - 1) / UNIT * UNIT; }
    ptrdiff_t depth() const { return TILES ? padded() : (D + DEPTH - 1) / DEPTH * DEPTH; }
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
    const float* bias;
    const void* weight;  // layout [S, P / LANES, depth() / DEPTH, G, LANES, DEPTH]; or diagonals [S, G, D], float
    T *gates, *out;      // gates: in, the projected inputs; out, the activated gates where cells is not null
    T* cells;            // the cell state, or the recurrent term of n of a GRU; null in inference and for a plain RNN
};

struct Backward {
    Map map;
    const void* weight;  // layout [S, P / (V * LANES), G P / DEPTH, V, LANES, DEPTH], V = vectors(D); or diagonals
    const float* bias;
    const T *gates, *cells, *out, *grad_out;
    T *grad_gates, *grad_recurrent;     // of the projected inputs; of the recurrent term of n of a GRU, [tokens, S, D]
    T* previous;                        // out: the outputs of each token's previous step, [tokens, S, D]
    float *grad_bias, *grad_diagonal;   // [tiles of all directions, J, D], partial sums, one a tile
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
        if constexpr (TILES) configure_tiles();
        body(task, s, first, std::min(m.tile, m.sequences(s) - first));
        if constexpr (TILES) release_tiles();
    }
}

template <int V, int R>
INLINE void multiply(vec (&acc)[V][R], const T* w, const T* x, ptrdiff_t row, ptrdiff_t depth) {
    if constexpr (TILES) product_by_tiles(acc, w, x, row, depth);
    else product<T>(acc, w, x, row, depth);
}

// Calls body(first, rows) for the blocks of R sequences of a tile, and for the rest one by one, or as a partial block
// where products are by tiles.
template <int R, typename Block, typename Single>
INLINE void for_each_block(ptrdiff_t count, Block block, Single single) {
    ptrdiff_t r = 0;
    for (; r + R <= count; r += R) block(r, R);
    if (TILES && r < count) return block(r, int(count - r));
    for (; r < count; ++r) single(r);
}

// Advances LANES units of R sequences by one step; of the first `rows` of R where the product is one by tiles.
template <int R>
INLINE void forward_block(
    const Forward& f, ptrdiff_t s, ptrdiff_t unit, const ptrdiff_t* token, const T* h, T* h_next, float* state,
    int rows = R) {
    const int count = TILES ? rows : R;
    const ptrdiff_t D = f.map.D, S = f.map.S, P = f.map.padded(), n = D - unit;
    T* const gates = f.gates + unit;
    const float* bias = f.bias + s * J * D + unit;
    vec acc[G][R];
    for (int q = 0; q < G; ++q) {
        const bool recurrent = CELL == GRU && q == 2;  // the reset gate scales this term before the input is added
        const vec b = load(bias + (recurrent ? 3 : q) * D, n);
        for (int r = 0; r < count; ++r) {
            const T* gate = gates + ((token[r] * S + s) * G + q) * D;
            acc[q][r] = recurrent ? b : b + load(gate, n);
        }
    }
    if constexpr (CELL == INDYLSTM) {
        for (int q = 0; q < G; ++q) {
            const vec w = load(static_cast<const float*>(f.weight) + (s * G + q) * D + unit, n);
            for (int r = 0; r < count; ++r) acc[q][r] += w * load(h + r * P + unit);
        }
    } else {
        const ptrdiff_t depth = f.map.depth();
        multiply(acc, static_cast<const T*>(f.weight) + (s * P + unit) * G * depth, h, P, depth);
    }
    for (int r = 0; r < count; ++r) {
        T* gate = gates + (token[r] * S + s) * G * D;
        vec y, kept = {};
        if constexpr (LSTM_LIKE) {
            const vec before = load(state + r * P + unit);
            if constexpr (PEEPHOLES)
                for (int q = 0; q < 2; ++q) acc[q][r] += load(bias + (4 + q) * D, n) * before;
            const vec i = acc[0][r] = sigmoid<T>(acc[0][r]);
            const vec g = acc[G - 2][r] = hyperbolic_tangent<T>(SLOPE * acc[G - 2][r]) / SLOPE;
            kept = (FORGETS ? (acc[1][r] = sigmoid<T>(acc[1][r])) * before : before) + i * g;
            if constexpr (PEEPHOLES) acc[3][r] += load(bias + 6 * D, n) * kept;
            y = (acc[G - 1][r] = sigmoid<T>(acc[G - 1][r])) * hyperbolic_tangent<T>(SLOPE * kept);
            store(state + r * P + unit, kept);
        } else if constexpr (CELL == GRU) {
            kept = acc[2][r];
            const vec reset = sigmoid<T>(acc[0][r]), z = sigmoid<T>(acc[1][r]);
            const vec g = hyperbolic_tangent<T>(load(gate + 2 * D, n) + load(bias + 2 * D, n) + reset * kept);
            y = g + z * (load(state + r * P + unit) - g);
            store(state + r * P + unit, y);
            acc[0][r] = reset, acc[1][r] = z, acc[2][r] = g;
        } else {
            y = CELL == RNN ? hyperbolic_tangent<T>(acc[0][r]) : acc[0][r] < 0.0f ? vec{} : acc[0][r];
        }
        store(h_next + r * P + unit, y);
        store(f.out + (token[r] * S + s) * D + unit, y, n);
        if (f.cells) {
            for (int q = 0; q < G; ++q) store(gate + q * D, acc[q][r], n);
            store(f.cells + (token[r] * S + s) * D + unit, kept, n);
        }
    }
}

static void forward_tile(const Forward& f, ptrdiff_t s, ptrdiff_t first, ptrdiff_t count) {
    constexpr int R = TILES ? 16 : REGISTERS / G;
    const ptrdiff_t P = f.map.padded(), steps = f.map.steps(s), stride = f.map.stride(s);
    const ptrdiff_t rows = TILES ? (count + R - 1) / R * R : count;  // a product by tiles reads whole blocks
    std::vector<T> outputs(2 * rows * P);
    std::vector<float> states(count * P);
    T *h = outputs.data(), *h_next = h + rows * P;
    float* state = states.data();
    ptrdiff_t token[MAX_TILE];
    for (ptrdiff_t r = 0; r < count; ++r) token[r] = f.map.start(s, first + r);
    for (ptrdiff_t t = 0; t < steps; ++t) {
        for (ptrdiff_t unit = 0; unit < f.map.D; unit += LANES) {
            const auto block = [&](ptrdiff_t r, int n) {
                forward_block<R>(f, s, unit, token + r, h + r * P, h_next + r * P, state + r * P, n);
            };
            for_each_block<R>(count, block, [&](ptrdiff_t r) {
                if constexpr (!TILES)
                    forward_block<1>(f, s, unit, token + r, h + r * P, h_next + r * P, state + r * P);
            });
        }
        for (ptrdiff_t r = 0; r < count; ++r) token[r] += stride;
        std::swap(h, h_next);
    }
}

// The values that the backward pass of a tile carries from a step to the previous one.
struct Carry {
    ptrdiff_t direction, before;  // before: token index of the previous step minus this one's; 0 at the first step
    ptrdiff_t token[MAX_TILE];    // token of the current step of each sequence
    T *grad, *grad_next;          // gradients of the recurrent products of the next step and this one, [count, G, P]
    float* state;                 // what reaches the state without them: of c of an LSTM, of h of a GRU
    float *bias, *diagonal;       // partial sums of grad_bias and grad_diagonal, [J, P]
};

// Propagates gradients through one step, for V * LANES units of R sequences starting at sequence `row` of the tile.
template <int V, int R>
INLINE void backward_block(const Backward& b, const Carry& carry, ptrdiff_t unit, ptrdiff_t row, int rows = R) {
    const int count = TILES ? rows : R;
    const ptrdiff_t D = b.map.D, S = b.map.S, P = b.map.padded(), s = carry.direction;
    vec dh[V][R];
    for (int v = 0; v < V; ++v)
        for (int r = 0; r < count; ++r) {
            const ptrdiff_t at = carry.token[row + r] * S + s, u = unit + v * LANES;
            dh[v][r] = load(b.grad_out + at * D + u, D - u);
        }
    if constexpr (CELL != INDYLSTM) {
        const T* weight = static_cast<const T*>(b.weight) + (s * P + unit) * G * P;
        multiply(dh, weight, carry.grad + row * G * P, G * P, G * P);
    }
    for (int v = 0; v < V; ++v) {
        const ptrdiff_t u = unit + v * LANES, n = D - u;
        vec w[4] = {}, bias[J] = {}, diagonal[4] = {};
        if constexpr (CELL == INDYLSTM)
            for (int q = 0; q < G; ++q) w[q] = load(static_cast<const float*>(b.weight) + (s * G + q) * D + u, n);
        for (int r = 0; r < count; ++r) {
            const ptrdiff_t at = carry.token[row + r] * S + s, before = at + carry.before * S;
            const T* gate = b.gates + at * G * D + u;
            const vec h_before = carry.before ? load(b.out + before * D + u, n) : vec{};
            float* state = carry.state + (row + r) * P + u;
            vec d = dh[v][r], grad[J];  // by bias
            if constexpr (LSTM_LIKE) {
                if constexpr (CELL == INDYLSTM)
                    for (int q = 0; q < G; ++q) d += w[q] * load(carry.grad + ((row + r) * G + q) * P + u);
                const vec i = load(gate, n), g = load(gate + (G - 2) * D, n), o = load(gate + (G - 1) * D, n);
                const vec c = load(b.cells + at * D + u, n), tanh_c = hyperbolic_tangent<T>(SLOPE * c);
                const vec c_before = carry.before ? load(b.cells + before * D + u, n) : vec{};
                const float* bias = b.bias + s * J * D + u;
                grad[G - 1] = d * tanh_c * o * (1.0f - o);
                vec dc = load(state) + d * o * (1.0f - tanh_c * tanh_c) * SLOPE;
                if constexpr (PEEPHOLES) dc += grad[3] * load(bias + 6 * D, n);
                grad[0] = dc * g * i * (1.0f - i);
                grad[G - 2] = dc * i * (1.0f - g * g * (SLOPE * SLOPE));
                if constexpr (FORGETS) {
                    const vec f = load(gate + D, n);
                    grad[1] = dc * c_before * f * (1.0f - f);
                    dc *= f;
                }
                if constexpr (PEEPHOLES) {
                    for (int q = 0; q < 2; ++q) {
                        dc += grad[q] * load(bias + (4 + q) * D, n);
                        grad[4 + q] = grad[q] * c_before;
                    }
                    grad[6] = grad[3] * c;
                }
                store(state, dc);
            } else if constexpr (CELL == GRU) {
                const vec reset = load(gate, n), z = load(gate + D, n), g = load(gate + 2 * D, n);
                d += load(state);
                store(state, d * z);
                grad[2] = d * (1.0f - z) * (1.0f - g * g);
                grad[1] = d * (h_before - g) * z * (1.0f - z);
                grad[0] = grad[2] * load(b.cells + at * D + u, n) * reset * (1.0f - reset);
                grad[3] = grad[2] * reset;
                store(b.grad_recurrent + at * D + u, grad[3], n);
            } else {
                const vec y = load(b.out + at * D + u, n);
                grad[0] = CELL == RNN ? d * (1.0f - y * y) : y > 0.0f ? d : vec{};
            }
            for (int q = 0; q < G; ++q) {
                store(b.grad_gates + (at * G + q) * D + u, grad[q], n);
                store(carry.grad_next + ((row + r) * G + q) * P + u, grad[CELL == GRU && q == 2 ? 3 : q]);
                if constexpr (CELL == INDYLSTM) diagonal[q] += grad[q] * h_before;
            }
            for (int j = 0; j < J; ++j) bias[j] += grad[j];
            if constexpr (CELL != INDYLSTM) store(b.previous + at * D + u, h_before, n);
        }
        for (int j = 0; j < J; ++j) store(carry.bias + j * P + u, load(carry.bias + j * P + u) + bias[j]);
        if constexpr (CELL == INDYLSTM)
            for (int q = 0; q < G; ++q) {
                float* sum = carry.diagonal + q * P + u;
                store(sum, load(sum) + diagonal[q]);
            }
    }
}

template <int V>
static void backward_tile(const Backward& b, ptrdiff_t task, ptrdiff_t s, ptrdiff_t first, ptrdiff_t count) {
    constexpr int R = TILES ? 16 : REGISTERS / V;
    const ptrdiff_t D = b.map.D, P = b.map.padded(), steps = b.map.steps(s), stride = b.map.stride(s);
    const ptrdiff_t rows = TILES ? (count + R - 1) / R * R : count;
    std::vector<T> grads(2 * G * rows * P);
    std::vector<float> memory((count + 2 * J) * P);
    Carry carry = {};
    carry.direction = s;
    carry.grad = grads.data();
    carry.grad_next = carry.grad + G * rows * P;
    carry.state = memory.data();
    carry.bias = carry.state + count * P;
    carry.diagonal = carry.bias + J * P;
    for (ptrdiff_t r = 0; r < count; ++r) carry.token[r] = b.map.start(s, first + r) + (steps - 1) * stride;
    for (ptrdiff_t t = steps - 1; t >= 0; --t) {
        carry.before = t ? -stride : 0;
        for (ptrdiff_t unit = 0; unit < D; unit += V * LANES) {
            for_each_block<R>(
                count, [&](ptrdiff_t r, int n) { backward_block<V, R>(b, carry, unit, r, n); },
                [&](ptrdiff_t r) { if constexpr (!TILES) backward_block<V, 1>(b, carry, unit, r); });
        }
        for (ptrdiff_t r = 0; r < count; ++r) carry.token[r] -= stride;
        std::swap(carry.grad, carry.grad_next);
    }
    for (int j = 0; j < J; ++j) {
        std::memcpy(b.grad_bias + (task * J + j) * D, carry.bias + j * P, D * sizeof(float));
        if (CELL == INDYLSTM)
            std::memcpy(b.grad_diagonal + (task * J + j) * D, carry.diagonal + j * P, D * sizeof(float));
    }
}

extern "C" {

int lanes() { return LANES; }

// Units are padded to a multiple of this number.
int padding() { return UNIT; }

// Units of the previous step that a product reads.
int depth(ptrdiff_t D) { return Map{0, 0, 0, D}.depth(); }

int max_tile() { return MAX_TILE; }

// Checksum of the bytes of several arrays, by which changes of their values are detected.
unsigned checksum(const char* const* arrays, const ptrdiff_t* sizes, ptrdiff_t count, ptrdiff_t threads) {
    unsigned total = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(+ : total)
    for (ptrdiff_t a = 0; a < count; ++a) {
        const auto mix = [a](unsigned word, ptrdiff_t i) {
            unsigned mixed = (word + unsigned(i)) * 0x9E3779B1u;  // position-dependent, spread over all bits
            mixed = (mixed ^ (mixed >> 15)) * (2 * unsigned(a) + 0x85EBCA6Bu);
            return mixed ^ (mixed >> 13);
        };
        const unsigned* words = reinterpret_cast<const unsigned*>(arrays[a]);
        const ptrdiff_t whole = sizes[a] / 4;
        for (ptrdiff_t i = 0; i < whole; ++i) total += mix(words[i], i);
        if (sizes[a] % 4) {
            unsigned rest = 0;
            std::memcpy(&rest, words + whole, sizes[a] % 4);
            total += mix(rest, whole);
        }
    }
    return total;
}

// Vectors of units in a block of the backward pass: the largest of 3, 2 and 1 that divides the number of vectors.
int vectors(ptrdiff_t D) {
    const ptrdiff_t blocks = (D + UNIT - 1) / UNIT * (UNIT / LANES);
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
