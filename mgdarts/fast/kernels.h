// Vectors, threads, products of small matrices, depthwise convolutions of a line: what the kernels are made of.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>
#define INLINE __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 64")
typedef int64_t i64;
#ifdef __AVX512F__
constexpr int WIDE = 16;
#else
constexpr int WIDE = 8;
#endif
typedef float wide __attribute__((vector_size(4 * WIDE)));

// V is `wide`, or `float` for maps that have fewer channels than it has lanes
template<class V> constexpr int lanes() { return sizeof(V) / sizeof(float); }
template<class V> INLINE static inline V load(const float *p) { V v; memcpy(&v, p, sizeof v); return v; }
template<class V> INLINE static inline void store(float *p, V v) { memcpy(p, &v, sizeof v); }
template<class V> INLINE static inline V zero() { V v; memset(&v, 0, sizeof v); return v; }
template<class V> INLINE static inline V relu(V x) { V o = zero<V>(); return x < o ? o : x; } // NaN stays NaN
template<class V> INLINE static inline V where(V x, V g) { V o = zero<V>(); return x > o ? g : o; }

// C channels in blocks; the last one is moved back so that it ends where the pixel does
template<class V> static inline int blocks(int C) { return (C + lanes<V>() - 1) / lanes<V>(); }
template<class V> static inline int block(int i, int C) {
  int c = i * lanes<V>();
  return c + lanes<V>() > C ? C - lanes<V>() : c;
}
static inline int up(int n) { return (n + WIDE - 1) / WIDE * WIDE; }

// zeros, with some more behind for loads of whole vectors
struct Floats {
  std::unique_ptr<float, void (*)(void *)> p;
  explicit Floats(size_t n) : p((float *)calloc(n + WIDE, sizeof(float)), free) { if (!p) throw std::bad_alloc(); }
  operator float *() const { return p.get(); }
};

// f(t) for t < n, each in a thread of its own
template<class F> static void parallel(int n, F f) {
  std::vector<std::thread> others;
  for (int t = 1; t < n; t++) others.emplace_back(f, t);
  f(0);
  for (auto &o : others) o.join();
}

// ---- Products of small matrices

// out[i][j] (+)= sum over k of a[i ai + k ak] b[k bk + j], for M rows and N vectors;
// of the last vector `rest` lanes are written
template<class V, int M, int N, bool ADD> INLINE static inline
void tile(const float *a, i64 ai, i64 ak, const float *b, i64 bk, float *out, i64 oi, int K, int rest) {
  constexpr int L = lanes<V>();
  V s[M][N];
  UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < N; j++) s[i][j] = zero<V>();
  for (int k = 0; k < K; k++) {
    V w[N];
    UNROLL for (int j = 0; j < N; j++) w[j] = load<V>(b + k * bk + j * L);
    UNROLL for (int i = 0; i < M; i++) {
      float x = a[i * ai + k * ak];
      UNROLL for (int j = 0; j < N; j++) s[i][j] += x * w[j];
    }
  }
  UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < N; j++) {
    float *o = out + i * oi + j * L;
    if (ADD) s[i][j] += load<V>(o);
    if (rest < L) memcpy(o, &s[i][j], 4 * rest); else store(o, s[i][j]);
  }
}
template<class V, int N, bool ADD> INLINE static inline
void rows(const float *a, i64 ai, i64 ak, const float *b, i64 bk, float *out, i64 oi, int M, int K, int rest) {
  int i = 0;
  for (; i + 4 <= M; i += 4) tile<V, 4, N, ADD>(a + i * ai, ai, ak, b, bk, out + i * oi, oi, K, rest);
  for (; i < M; i++) tile<V, 1, N, ADD>(a + i * ai, ai, ak, b, bk, out + i * oi, oi, K, rest);
}

// out [M, N] = a [M, K] b [K, N]; the rows of b are `up(N)` apart
template<class V> static void product(const float *a, const float *b, float *out, int M, int N, int K) {
  constexpr int L = lanes<V>();
  int j = 0, bk = up(N);
  for (; j + 2 * L <= N; j += 2 * L) rows<V, 2, false>(a, K, 1, b + j, bk, out + j, N, M, K, L);
  for (; j + L <= N; j += L) rows<V, 1, false>(a, K, 1, b + j, bk, out + j, N, M, K, L);
  if (j < N && N > L) rows<V, 1, false>(a, K, 1, b + N - L, bk, out + N - L, N, M, K, L);
  else if (j < N) rows<V, 1, false>(a, K, 1, b, bk, out, N, M, K, N);
}
// out [M, up(N)] += transposed a [K, M] times b [K, N]; whole vectors of b are read
template<class V> static void outer(const float *a, const float *b, float *out, int M, int N, int K) {
  constexpr int L = lanes<V>();
  int j = 0;
  for (; j + L < N; j += 2 * L) rows<V, 2, true>(a, 1, M, b + j, N, out + j, up(N), M, K, L);
  if (j < N) rows<V, 1, true>(a, 1, M, b + j, N, out + j, up(N), M, K, L);
}
// with fewer columns than a vector has lanes, one by one
static void mix(const float *a, const float *b, float *out, int M, int N, int K) {
  N < WIDE ? product<float>(a, b, out, M, N, K) : product<wide>(a, b, out, M, N, K);
}
static void mix_outer(const float *a, const float *b, float *out, int M, int N, int K) {
  N < WIDE ? outer<float>(a, b, out, M, N, K) : outer<wide>(a, b, out, M, N, K);
}

// ---- Depthwise convolutions

// kernels of side K, stride S, dilation D lie by block of channels, tap and lane; K = 0: of any side k, but slower
template<int K, int S, int D> constexpr bool meets(int p, int j, int T) {
  return p >= j * D && (p - j * D) % S == 0 && (p - j * D) / S < T;
}

// T pixels of a line, one block; x: the window of the first, `row` and `pix`: steps to the next row and pixel
template<class V, int K, int S, int D, int T, bool ADD> INLINE static inline
void window(const float *x, i64 row, i64 pix, const float *w, float *out, i64 opix) {
  constexpr int L = lanes<V>();
  V s[T];
  UNROLL for (int t = 0; t < T; t++) s[t] = ADD ? load<V>(out + t * opix) : zero<V>();
  UNROLL for (int i = 0; i < K; i++) {
    V f[K];
    UNROLL for (int j = 0; j < K; j++) f[j] = load<V>(w + (i * K + j) * L);
    UNROLL for (int p = 0; p <= (T - 1) * S + (K - 1) * D; p++) { // each pixel is read once, for all that it adds to
      V v = load<V>(x + i * D * row + p * pix);
      UNROLL for (int j = 0; j < K; j++) if (meets<K, S, D>(p, j, T)) s[(p - j * D) / S] += v * f[j];
    }
  }
  UNROLL for (int t = 0; t < T; t++) store(out + t * opix, s[t]);
}
template<class V, int K, int S, int D, int T, bool ADD> INLINE static inline
int windows(int t, const float *x, i64 row, i64 pix, const float *w, float *out, i64 opix, int n, int C) {
  for (; t + T <= n; t += T) for (int b = 0; b < blocks<V>(C); b++) {
    int c = block<V>(b, C);
    window<V, K, S, D, T, ADD>(x + t * S * pix + c, row, pix, w + b * K * K * lanes<V>(), out + t * opix + c, opix);
  }
  return t;
}
template<class V, int K, int S, int D, bool ADD> static
void line(const float *x, i64 row, i64 pix, const float *w, float *out, i64 opix, int n, int C, int k) {
  if constexpr (K > 0) {
    int t = windows<V, K, S, D, 8, ADD>(0, x, row, pix, w, out, opix, n, C);
    t = windows<V, K, S, D, 4, ADD>(t, x, row, pix, w, out, opix, n, C);
    windows<V, K, S, D, 1, ADD>(t, x, row, pix, w, out, opix, n, C);
  } else for (int t = 0; t < n; t++) for (int b = 0; b < blocks<V>(C); b++) {
    int c = block<V>(b, C);
    const float *from = x + t * S * pix + c, *f = w + b * k * k * lanes<V>();
    V s = ADD ? load<V>(out + t * opix + c) : zero<V>();
    for (int i = 0; i < k; i++) for (int j = 0; j < k; j++, f += lanes<V>())
      s += load<V>(from + i * D * row + j * D * pix) * load<V>(f);
    store(out + t * opix + c, s);
  }
}

// gradient of R rows of a kernel from T pixels
template<class V, int K, int S, int D, int T, int R> INLINE static inline
void taps(const float *x, i64 row, i64 pix, const float *g, V *s) {
  V f[T];
  UNROLL for (int t = 0; t < T; t++) f[t] = load<V>(g + t * pix);
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int p = 0; p <= (T - 1) * S + (K - 1) * D; p++) {
    V v = load<V>(x + i * D * row + p * pix);
    UNROLL for (int j = 0; j < K; j++) if (meets<K, S, D>(p, j, T)) s[i * K + j] += v * f[(p - j * D) / S];
  }
}
template<class V, int K, int S, int D> static
void line_taps(const float *x, i64 row, i64 pix, const float *g, float *w, int n, int C, int k) {
  constexpr int L = lanes<V>();
  if constexpr (K > 0) {
    constexpr int R = K == 3 ? 3 : 1, T = K == 3 ? 4 : 8; // so many sums as registers hold
    for (int b = 0; b < blocks<V>(C); b++) for (int i = 0; i < K; i += R) {
      int c = block<V>(b, C), t = 0;
      float *o = w + (b * K + i) * K * L;
      const float *from = x + i * D * row + c;
      V s[R * K];
      UNROLL for (int j = 0; j < R * K; j++) s[j] = load<V>(o + j * L);
      for (; t + T <= n; t += T) taps<V, K, S, D, T, R>(from + t * S * pix, row, pix, g + t * pix + c, s);
      for (; t < n; t++) taps<V, K, S, D, 1, R>(from + t * S * pix, row, pix, g + t * pix + c, s);
      UNROLL for (int j = 0; j < R * K; j++) store(o + j * L, s[j]);
    }
  } else for (int b = 0; b < blocks<V>(C); b++) for (int i = 0; i < k; i++) for (int j = 0; j < k; j++) {
    int c = block<V>(b, C);
    float *o = w + ((b * k + i) * k + j) * L;
    const float *from = x + i * D * row + j * D * pix + c;
    V s = load<V>(o);
    for (int t = 0; t < n; t++) s += load<V>(from + t * S * pix) * load<V>(g + t * pix + c);
    store(o, s);
  }
}

// gradient of the map from a line of a convolution with stride 2: each pixel adds to its window
template<class V, int K> static
void scatter(float *x, i64 row, i64 pix, const float *w, const float *g, int n, int C, int k) {
  constexpr int L = lanes<V>();
  for (int t = 0; t < n; t++) for (int b = 0; b < blocks<V>(C); b++) {
    int c = block<V>(b, C);
    V v = load<V>(g + t * pix + c);
    auto add = [=](int i, int j, int side) INLINE {
      float *o = x + i * row + (t * 2 + j) * pix + c;
      store(o, load<V>(o) + v * load<V>(w + (b * side * side + i * side + j) * L));
    };
    if constexpr (K > 0) UNROLL for (int i = 0; i < K; i++) UNROLL for (int j = 0; j < K; j++) add(i, j, K);
    else for (int i = 0; i < k; i++) for (int j = 0; j < k; j++) add(i, j, k);
  }
}
