// The convolutions and batch norms of a step: explained in the chapter fast/arithmetic, called by fast/compiled.
#include "kernels.h"

// ---- 1x1 convolutions

// a 1x1 convolution: out [rows, F] = x [rows, C] times transposed w [F, C];
// backwards out [rows, C] = g [rows, F] w and d_w = transposed g times x
extern "C" void pointwise(i64 back, const float *x, const float *w, const float *g, float *out, float *d_w,
                          i64 n, i64 C, i64 F, i64 threads) {
  constexpr i64 BLOCK = 128; // rows that a cache holds
  i64 size = back ? F * up(C) : C * up(F), parts = std::max<i64>(1, std::min(threads, n / BLOCK));
  Floats b(size);
  for (i64 f = 0; f < F; f++) for (i64 i = 0; i < C; i++) b[back ? f * up(C) + i : i * up(F) + f] = w[f * C + i];
  std::vector<Floats> sums;
  for (int t = 0; t < (back ? parts : 0); t++) sums.emplace_back(size);
  parallel(parts, [&](int t) {
    Floats end(BLOCK * C);
    i64 to = t + 1 == parts ? n : n * (t + 1) / parts;
    for (i64 r = n * t / parts, m; r < to; r += m) {
      m = std::min(BLOCK, to - r);
      if (!back) { mix(x + r * C, b, out + r * F, m, F, C); continue; }
      const float *from = x + r * C;
      if (r + m == n) { memcpy(end, from, 4 * m * C); from = end; } // nothing is read behind a map
      if (out) mix(g + r * F, b, out + r * C, m, C, F);
      if (d_w) mix_outer(g + r * F, from, sums[t], F, C, m);
    }
  });
  for (size_t t = 0; d_w && t < sums.size(); t++) for (i64 f = 0; f < F; f++) for (i64 i = 0; i < C; i++)
    d_w[f * C + i] = (t ? d_w[f * C + i] : 0) + sums[t][f * up(C) + i];
}

// ---- Pairs of convolutions that read one map

// what a depthwise convolution runs on: stride 1; stride 2; dilation 2; the same in phases; the same with stride 2
enum Reads { MAP, HALF, DILATED, PHASES, SECOND };
struct Job {
  i64 side, reads, filters; // of the depthwise kernel; a `Reads`; of the result
  float *depth, *point;
  i64 *place, placed; // the filters that are computed, and how many; 0: all
  float *z, *g, *d_depth, *d_point; // the result; gradients: of the result, of both kernels
};

template<class V> struct Pairs {
  static constexpr int L = lanes<V>();
  int N, C, H, W, b; bool clip; std::vector<Job> jobs; int threads;
  int c = C / b, border = 0; // channels of an image
  i64 row; size_t area; // of a map with its border

  Pairs(int N, int C, int H, int W, int b, bool clip, int count, const Job *j, int threads)
    : N(N), C(C), H(H), W(W), b(b), clip(clip), jobs(j, j + count), threads(threads < N ? threads : N) {
    for (auto &j : jobs) border = std::max(border, reach(j) * (j.reads >= DILATED ? 2 : 1));
    row = (i64)(W + 2 * border) * C;
    area = (size_t)(H + 2 * border) * row;
  }
  static int reach(const Job &j) { return j.side / 2; }
  static int phases(const Job &j) { return j.reads == PHASES ? 4 : 1; }
  static int out(const Job &j, int side) {
    return j.reads == MAP || j.reads == DILATED ? side : j.reads == PHASES ? side / 2 : (side + 1) / 2;
  }
  int taps(const Job &j) { return j.side * j.side; }
  size_t deep(const Job &j) { return (size_t)taps(j) * up(C); } // numbers in a packed depthwise kernel
  int first(int t) { return (i64)N * t / threads; } // image of a thread

  void open(float *to, const float *x) { // a copy of an image in its border
    for (int y = 0, n = W * C; y < H; y++) {
      float *o = to + (y + border) * row + border * C;
      const float *s = x + (size_t)y * n;
      int i = 0;
      if (!clip) { memcpy(o, s, 4 * (size_t)n); continue; }
      for (; i + L <= n; i += L) store(o + i, relu(load<V>(s + i)));
      for (; i < n; i++) o[i] = relu(s[i]);
    }
  }
  void close(float *to, const float *x, const float *g) { // the gradient of an image from the one in its border
    for (int y = 0, n = W * C; y < H; y++) {
      i64 at = (y + border) * row + border * C;
      float *o = to + (size_t)y * n;
      int i = 0;
      if (!clip) { memcpy(o, g + at, 4 * (size_t)n); continue; }
      for (; i + L <= n; i += L) store(o + i, where(load<V>(x + at + i), load<V>(g + at + i)));
      for (; i < n; i++) o[i] = where(x[at + i], g[at + i]);
    }
  }
  // a depthwise kernel; turned round for the backward pass, and without what the last block repeats, since it is added
  Floats packed(const Job &j, bool back) {
    Floats w(deep(j));
    int n = taps(j);
    for (int i = 0; i < blocks<V>(C); i++) for (int t = 0; t < n; t++) for (int l = 0; l < L; l++) {
      int ch = block<V>(i, C) + l, to = back && j.reads != HALF ? n - 1 - t : t;
      w[(i * n + to) * L + l] = back && ch < i * L ? 0 : j.depth[(size_t)ch * n + t];
    }
    return w;
  }
  // a pointwise kernel with rows of zeros for filters that are not computed: [c, filters], backwards [filters, c]
  Floats mixing(const Job &j, bool back) {
    int n = up(back ? c : j.filters);
    Floats w((size_t)n * (back ? j.filters : c));
    for (int f = 0; f < (j.place ? j.placed : j.filters); f++) for (int i = 0; i < c; i++) {
      int to = j.place ? j.place[f] : f;
      w[back ? (size_t)to * n + i : (size_t)i * n + to] = j.point[(size_t)f * c + i];
    }
    return w;
  }
  const float *corner(const float *x, const Job &j, int phase) { // the window of the first pixel
    int r = border - reach(j) * (j.reads >= DILATED ? 2 : 1);
    return x + (r + phase / 2) * row + (r + phase % 2) * C;
  }

  // calls f with the side of a kernel as a type, where there is code for just this side
  template<class F> static void by_side(const Job &j, F f) {
    if (j.side == 3) f(std::integral_constant<int, 3>());
    else if (j.side == 5) f(std::integral_constant<int, 5>());
    else if (j.side == 7) f(std::integral_constant<int, 7>());
    else f(std::integral_constant<int, 0>());
  }
  template<int K> void convolved(const float *x, const Job &j, const float *k, float *u, int y, int w) {
    switch (j.reads) {
      case MAP: return line<V, K, 1, 1, false>(x + y * row, row, C, k, u, C, w, C, j.side);
      case HALF: return line<V, K, 2, 1, false>(x + 2 * y * row, row, C, k, u, C, w, C, j.side);
      case DILATED: return line<V, K, 1, 2, false>(x + y * row, row, C, k, u, C, w, C, j.side);
      default: return line<V, K, 2, 2, false>(x + 2 * y * row, row, C, k, u, C, w, C, j.side);
    }
  }
  void convolve(const float *x, const Job &j, const float *k, float *u, int y, int w) {
    by_side(j, [&](auto K) { convolved<K>(x, j, k, u, y, w); });
  }
  void forward(const float *x) {
    std::vector<Floats> deep, flat;
    for (auto &j : jobs) { deep.push_back(packed(j, false)); flat.push_back(mixing(j, false)); }
    parallel(threads, [&](int t) {
      Floats map(area), u((size_t)W * C);
      for (int n = first(t); n < first(t + 1); n++) {
        open(map, x + (size_t)n * H * W * C);
        for (size_t i = 0; i < jobs.size(); i++) {
          const Job &j = jobs[i];
          int h = out(j, H), w = out(j, W);
          for (int phase = 0; phase < phases(j); phase++) for (int y = 0; y < h; y++) {
            size_t pixel = (((size_t)phase * N + n) * h + y) * w;
            convolve(corner(map, j, phase), j, deep[i], u, y, w);
            mix(u, flat[i], j.z + pixel * b * j.filters, w * b, j.filters, c);
          }
        }
      }
    });
  }

  // a line of the gradient g of a depthwise result, which has a border of its own: to the kernel and to the map
  template<int K> void back(const float *x, float *gx, const float *g, i64 grow, const Job &j, const float *k, float *d,
                            int phase, int y, int w) {
    int e = reach(j) * (j.reads == DILATED ? 2 : 1);
    const float *inner = g + (y + e) * grow + e * C, *around = g + y * grow, *s = corner(x, j, phase);
    float *here = gx + (y + border) * row + border * C;
    switch (j.reads) {
      case MAP:
        line_taps<V, K, 1, 1>(s + y * row, row, C, inner, d, w, C, j.side);
        return line<V, K, 1, 1, true>(around, grow, C, k, here, C, w, C, j.side);
      case HALF:
        line_taps<V, K, 2, 1>(s + 2 * y * row, row, C, inner, d, w, C, j.side);
        return scatter<V, K>(gx + (s - x) + 2 * y * row, row, C, k, inner, w, C, j.side);
      case DILATED:
        line_taps<V, K, 1, 2>(s + y * row, row, C, inner, d, w, C, j.side);
        return line<V, K, 1, 2, true>(around, grow, C, k, here, C, w, C, j.side);
      default: // to every second pixel
        line_taps<V, K, 2, 2>(s + 2 * y * row, row, C, inner, d, w, C, j.side);
        here = gx + (2 * y + phase / 2 + border) * row + (phase % 2 + border) * C;
        return line<V, K, 1, 1, true>(around, grow, C, k, here, 2 * C, w, C, j.side);
    }
  }
  void backward(const float *x, float *d_x) {
    std::vector<Floats> deep, turned, flat;
    std::vector<std::vector<Floats>> d_deep(threads), d_flat(threads);
    for (auto &j : jobs) {
      deep.push_back(packed(j, false)); turned.push_back(packed(j, true)); flat.push_back(mixing(j, true));
      for (int t = 0; t < threads; t++) {
        d_deep[t].emplace_back(this->deep(j));
        d_flat[t].emplace_back((size_t)j.filters * up(c));
      }
    }
    parallel(threads, [&](int t) {
      Floats map(area), gx(area), u((size_t)W * C), gu(area);
      for (int n = first(t); n < first(t + 1); n++) {
        open(map, x + (size_t)n * H * W * C);
        memset(gx, 0, 4 * area);
        for (size_t i = 0; i < jobs.size(); i++) {
          const Job &j = jobs[i];
          if (!j.g) continue;
          int h = out(j, H), w = out(j, W), e = reach(j) * (j.reads == DILATED ? 2 : 1);
          i64 grow = (i64)(w + 2 * e) * C;
          memset(gu, 0, 4 * (size_t)e * grow);
          memset(gu + (h + e) * grow, 0, 4 * (size_t)e * grow);
          for (int y = e; y < h + e; y++) for (i64 side : {(i64)0, (i64)(e + w) * C})
            memset(gu + y * grow + side, 0, 4 * (size_t)e * C);
          // a line goes on once those around it are there
          for (int phase = 0; phase < phases(j); phase++) for (int y = 0; y < h + e; y++) {
            if (y < h) {
              size_t pixel = (((size_t)phase * N + n) * h + y) * w;
              const float *g = j.g + pixel * b * j.filters;
              mix(g, flat[i], gu + (y + e) * grow + e * C, w * b, c, j.filters);
              convolve(corner(map, j, phase), j, deep[i], u, y, w);
              mix_outer(g, u, d_flat[t][i], j.filters, c, w * b);
            }
            if (y < e) continue;
            by_side(j, [&](auto K) { back<K>(map, gx, gu, grow, j, turned[i], d_deep[t][i], phase, y - e, w); });
          }
        }
        close(d_x + (size_t)n * H * W * C, map, gx);
      }
    });
    for (size_t i = 0; i < jobs.size(); i++) {
      const Job &j = jobs[i];
      float *d = d_deep[0][i], *f = d_flat[0][i];
      for (int t = 1; t < threads; t++) {
        for (size_t k = 0; k < this->deep(j); k++) d[k] += d_deep[t][i][k];
        for (size_t k = 0; k < (size_t)j.filters * up(c); k++) f[k] += d_flat[t][i][k];
      }
      int n = taps(j);
      for (int k = 0; k < blocks<V>(C); k++) for (int p = 0; p < n; p++) for (int l = 0; l < L; l++)
        j.d_depth[(size_t)(block<V>(k, C) + l) * n + p] = d[(k * n + p) * L + l];
      for (int k = 0; k < (j.place ? j.placed : j.filters); k++)
        memcpy(j.d_point + (size_t)k * c, f + (size_t)(j.place ? j.place[k] : k) * up(c), 4 * (size_t)c);
    }
  }
};

extern "C" void pairs(i64 back, const float *x, float *d_x, i64 N, i64 C, i64 H, i64 W, i64 b, i64 clip,
                      i64 count, const Job *jobs, i64 threads) {
  auto go = [&](auto &&p) { if (back) p.backward(x, d_x); else p.forward(x); };
  if (C < WIDE) go(Pairs<float>(N, C, H, W, b, clip, count, jobs, threads));
  else go(Pairs<wide>(N, C, H, W, b, clip, count, jobs, threads));
}

// ---- Batch norms

// a map of F norms for b images abreast; `at`: the place of the first in vectors of all norms
struct Map { i64 F, at; const float *z; float *y; const float *g; float *d_z; };
struct Vectors {
  const float *scale, *shift;
  float *mean, *var, *inv, *a, *d_scale, *d_shift;
  const float *base; float *total; // maps: added as it is; the sum of all, where it is asked for
};

template<class V> struct Norms {
  static constexpr int L = lanes<V>(), BLOCK = 64; // pixels whose channels a cache holds
  i64 rows; int b; std::vector<Map> maps; Vectors v; bool training, clip; float eps; int threads, most = 0;
  Norms(i64 rows, int b, int count, const Map *m, const Vectors &v, bool training, bool clip, float eps, int threads)
    : rows(rows), b(b), maps(m, m + count), v(v), training(training), clip(clip), eps(eps),
      threads(std::max<i64>(1, std::min<i64>(threads, rows / BLOCK))) {
    for (auto &m : maps) most = std::max(most, channels(m));
  }
  int channels(const Map &m) { return m.F * b; }
  i64 first(int t) { return rows / BLOCK * t / threads * BLOCK; }
  i64 last(int t) { return t + 1 == threads ? rows : first(t + 1); }
  void spread(const Map &m, const float *from, float *to) {
    for (int i = 0; i < b; i++) memcpy(to + i * m.F, from + m.at, 4 * m.F);
  }

  // two sums over n pixels of what f adds to them, for every channel
  template<class F> INLINE inline void sums(int n, int C, float *s, float *q, F f) {
    for (int i = 0; i < blocks<V>(C); i++) {
      int c = block<V>(i, C), r = 0;
      V s0 = zero<V>(), q0 = s0, s1 = s0, q1 = s0;
      for (; r + 2 <= n; r += 2) { f((i64)r * C + c, c, s0, q0); f((i64)(r + 1) * C + c, c, s1, q1); }
      if (r < n) f((i64)r * C + c, c, s0, q0);
      store(s + c, s0 + s1); store(q + c, q0 + q1);
    }
  }
  // means and sums of squares around them: a block around its first pixel, then block by block
  // (Chan, Golub and LeVeque 1983)
  struct Moments {
    double n = 0; std::vector<double> mean, square;
    explicit Moments(int C) : mean(C), square(C) {}
    void add(int c, double count, double m, double q) {
      double d = m - mean[c];
      mean[c] += d * count / (n + count);
      square[c] += q + d * d * n * count / (n + count);
    }
  };
  void statistics(const Map &m) {
    int C = channels(m);
    std::vector<Moments> parts(threads, Moments(C));
    parallel(threads, [&](int t) {
      Floats s(C), q(C);
      Moments &own = parts[t];
      for (i64 r = first(t); r < last(t); r += BLOCK) {
        int n = std::min<i64>(BLOCK, last(t) - r);
        const float *x = m.z + r * C;
        sums(n, C, s, q, [=](i64 at, int c, V &s, V &q) INLINE {
          V e = load<V>(x + at) - load<V>(x + c);
          s += e; q += e * e;
        });
        for (int c = 0; c < C; c++) { double e = s[c] / (double)n; own.add(c, n, x[c] + e, q[c] - e * s[c]); }
        own.n += n;
      }
    });
    Moments &all = parts[0], copies(m.F);
    for (int t = 1; t < threads; t++) {
      for (int c = 0; c < C; c++) all.add(c, parts[t].n, parts[t].mean[c], parts[t].square[c]);
      all.n += parts[t].n;
    }
    for (int i = 0; i < b; i++) {
      for (int f = 0; f < m.F; f++) copies.add(f, rows, all.mean[i * m.F + f], all.square[i * m.F + f]);
      copies.n += rows;
    }
    for (int f = 0; f < m.F; f++) { v.mean[m.at + f] = copies.mean[f]; v.var[m.at + f] = copies.square[f] / copies.n; }
  }
  void forward() {
    size_t n = maps.size() * (size_t)most, count = maps.size();
    std::vector<float> A(n), S(n), all(most), shift(maps.back().at + maps.back().F);
    for (size_t k = 0; k < count; k++) {
      const Map &m = maps[k];
      if (training) statistics(m);
      for (i64 f = m.at; f < m.at + m.F; f++) {
        v.inv[f] = 1 / std::sqrt(v.var[f] + eps); v.a[f] = v.scale[f] * v.inv[f];
        shift[f] = v.shift[f] - v.mean[f] * v.a[f];
      }
      float *a = &A[k * most], *o = &S[k * most];
      spread(m, v.a, a); spread(m, shift.data(), o);
      if (!v.total) parallel(threads, [&](int t) {
        int C = channels(m);
        for (i64 r = first(t); r < last(t); r++) for (int i = 0; i < blocks<V>(C); i++) {
          int c = block<V>(i, C);
          V y = load<V>(m.z + r * C + c) * load<V>(a + c) + load<V>(o + c);
          store(m.y + r * C + c, clip ? relu(y) : y);
        }
      });
      else for (int c = 0; c < most; c++) all[c] += o[c];
    }
    if (v.total) parallel(threads, [&](int t) {
      int C = most;
      for (i64 r = first(t); r < last(t); r++) for (int i = 0; i < blocks<V>(C); i++) {
        int c = block<V>(i, C);
        V y = load<V>(&all[c]);
        for (size_t k = 0; k < count; k++) y += load<V>(maps[k].z + r * C + c) * load<V>(&A[k * C + c]);
        if (v.base) y += load<V>(v.base + r * C + c);
        store(v.total + r * C + c, y);
      }
    });
  }
  void backward() {
    size_t n = maps.size() * (size_t)most, count = maps.size();
    // sums over the batch of g, and of g (z - mean)
    std::vector<std::vector<double>> parts(threads, std::vector<double>(2 * n));
    std::vector<float> mean(n), A(n), K1(n), K0(n);
    for (size_t k = 0; k < count; k++) spread(maps[k], v.mean, &mean[k * most]);
    parallel(threads, [&](int t) {
      Floats s(most), q(most);
      for (i64 r = first(t); r < last(t); r += BLOCK) for (size_t k = 0; k < count; k++) {
        const Map &m = maps[k];
        if (!m.g) continue;
        int C = channels(m), n = std::min<i64>(BLOCK, last(t) - r);
        const float *z = m.z + r * C, *g = m.g + r * C, *y = m.y + r * C, *mu = &mean[k * most];
        if (clip) sums(n, C, s, q, [=](i64 at, int c, V &s, V &q) INLINE {
          V e = where(load<V>(y + at), load<V>(g + at));
          s += e; q += e * (load<V>(z + at) - load<V>(mu + c));
        });
        else sums(n, C, s, q, [=](i64 at, int c, V &s, V &q) INLINE {
          V e = load<V>(g + at);
          s += e; q += e * (load<V>(z + at) - load<V>(mu + c));
        });
        double *sum = &parts[t][2 * k * most];
        for (int c = 0; c < C; c++) { sum[c] += s[c]; sum[most + c] += q[c]; }
      }
    });
    for (size_t k = 0; k < count; k++) for (int f = 0; f < maps[k].F; f++) {
      double shift = 0, scale = 0, N = (double)rows * b;
      for (auto &p : parts) for (int i = 0; i < b; i++) {
        shift += p[2 * k * most + i * maps[k].F + f];
        scale += p[(2 * k + 1) * most + i * maps[k].F + f];
      }
      i64 at = maps[k].at + f;
      double a = v.a[at], k1, k0;
      scale *= v.inv[at];
      k1 = -a * v.inv[at] * scale / N; k0 = -a * shift / N - k1 * v.mean[at];
      v.d_shift[at] = shift; v.d_scale[at] = scale;
      for (int i = 0; i < b; i++) { size_t to = k * most + i * maps[k].F + f; A[to] = a; K1[to] = k1; K0[to] = k0; }
    }
    // perhaps in the place of z: so the last block, which overlaps, is worked out before the others are written
    parallel(threads, [&](int t) {
      for (i64 r0 = first(t); r0 < last(t); r0 += BLOCK) for (size_t k = 0; k < count; k++) {
        const Map &m = maps[k];
        int C = channels(m), B = blocks<V>(C);
        const float *a = &A[k * most], *k1 = &K1[k * most], *k0 = &K0[k * most];
        auto value = [=](i64 at, int c) INLINE {
          V e = m.g ? load<V>(m.g + at) : zero<V>();
          if (clip) e = where(load<V>(m.y + at), e);
          e *= load<V>(a + c);
          return training ? e + load<V>(m.z + at) * load<V>(k1 + c) + load<V>(k0 + c) : e;
        };
        for (i64 r = r0; r < std::min(r0 + BLOCK, last(t)); r++) {
          V end = value(r * C + C - L, C - L);
          for (int i = 0; i + 1 < B; i++) store(m.d_z + r * C + i * L, value(r * C + i * L, i * L));
          store(m.d_z + r * C + C - L, end);
        }
      }
    });
  }
};

extern "C" void norms(i64 back, i64 rows, i64 b, i64 count, const Map *maps, const Vectors *v,
                      i64 training, i64 clip, float eps, i64 threads) {
  auto go = [&](auto &&n) { if (back) n.backward(); else n.forward(); };
  bool narrow = false;
  for (int k = 0; k < count; k++) narrow |= maps[k].F * b < WIDE;
  if (narrow) go(Norms<float>(rows, b, count, maps, *v, training, clip, eps, threads));
  else go(Norms<wide>(rows, b, count, maps, *v, training, clip, eps, threads));
}
