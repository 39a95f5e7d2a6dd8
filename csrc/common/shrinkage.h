// The formulas of the prox as small pure functions, for host and device: the one truth of all C++ executors.
// core/reference.py has the same functions in PyTorch, under the same names.
//
//   z = what the update rule would write (sgd.h);  a = lr*alpha, b = lr*beta, c = lr*gamma;  u = soft(z, c)
//   w = s * soft(z, t)
//   sequential:  s = max(1 - a/||u||_2, 0),  t = c + b*||u||_1
//   exact:       t = c + b * s(t) * ||soft(z, t)||_1,  solved by Newton's and Halley's steps in a bracket; small
//                groups have closed forms in part
//
// reference.py takes Newton's steps alone to find exact mode's t: both find the root of one equation, by other
// steps, so their t agree to rounding and their sweeps do not. All else is the same.
#pragma once
#include "common/arithmetic.h"

namespace cges {

// max(x, 0) that lets NaN through; written as the maximum instruction has it.
template <typename T>
CGES_FN T positive_part(T x) {
  return T(0) > x ? T(0) : x;
}

// |soft(z, t)|
template <typename T>
CGES_FN T soft_magnitude(T z, T t) {
  return positive_part(std::fabs(z) - t);
}

// Sums over one group of u = soft(z, t): how many are left, their l1 norm, their l2 norm squared.
template <typename T>
struct GroupStats {
  T count, l1, l2_squared;
};

template <typename T>
CGES_FN void group_stats(T z, T t, GroupStats<T>& sums) {
  const T u = std::fabs(z) - t;
  const bool left = !(u <= T(0));  // so that NaN counts
  sums.count = left ? sums.count + T(1) : sums.count;
  sums.l1 = left ? sums.l1 + u : sums.l1;
  sums.l2_squared = left ? multiply_add(u, u, sums.l2_squared) : sums.l2_squared;
}

// Of the penalty: alpha, beta and gamma.
template <typename T>
struct Coefficients {
  T group_lasso, exclusive_lasso, l1;
};

// Step size times coefficient.
template <typename T>
struct Thresholds {
  T a, b, c;
  CGES_FN bool any() const { return a != T(0) || b != T(0) || c != T(0); }
  CGES_FN bool need_norms() const { return a != T(0) || b != T(0); }

  template <typename U>
  CGES_FN Thresholds<U> as() const {
    return {U(a), U(b), U(c)};
  }
};

// a = lr*alpha (group lasso), b = lr*beta (exclusive lasso), c = lr*gamma (l1).
template <typename T>
CGES_FN Thresholds<T> form_thresholds(T lr, const Coefficients<T>& x) {
  return {lr * x.group_lasso, lr * x.exclusive_lasso, lr * x.l1};
}

template <typename T>
struct Shrinkage {
  T s, t;
};

// s = max(1 - a/||u||_2, 0); 1 where a = 0, whatever the norm.
template <typename T>
CGES_FN T group_scale(T l2, T a) {
  if (a == T(0)) return T(1);
  return l2 <= a ? T(0) : T(1) - a / l2;
}

// (s, t) of a group of one element, whose norms are both |u|: nothing to search for.
template <typename T>
CGES_FN Shrinkage<T> shrink_one(T z, const Thresholds<T>& h, bool exact) {
  const T u = soft_magnitude(z, h.c), s = group_scale(u, h.a);
  if (h.b == T(0)) return {s, h.c};
  if (!exact || s == T(0)) return {s, h.c + h.b * u};
  // t = c + b*(|z| - t - a), so from t = c on it rises by
  const T rise = h.b / (T(1) + h.b) * (u - h.a);
  return {group_scale(u - rise, h.a), h.c + rise};
}

// Without group lasso exact mode's equation t = c + b*sum(max(|z| - t, 0)) is linear between neighbouring |z|. The k
// largest alone, whose sum of |z| - c is given, have a root this far above c; t is the largest of these roots and c.
// The CPU's executor and reference.py sort groups of at most so many elements; the others search.
constexpr int kSorted = 16;  // reference.py's SORTED

template <typename T>
CGES_FN T rise_of_largest(T sum, int k, const Thresholds<T>& h) {
  return h.b * sum / (T(1) + h.b * T(k));
}

// One group's search for (s, t). Feed it the group's sums at `at.t`, from t = c on, until it is done.
template <typename T>
struct ShrinkageSolver {
  static constexpr int kMaxSweeps = 24;  // reference.py's MAX_SWEEPS
  static constexpr T kFew = 4;
  Shrinkage<T> at;
  T low, high;  // bracket of the root
  int sweeps;
  bool done;

  CGES_FN void start(const Thresholds<T>& h) {
    at = {T(1), h.c};
    sweeps = 0;
    done = false;
  }

  CGES_FN void solve_shrinkage(const GroupStats<T>& sums, const Thresholds<T>& h, bool exact, T epsilon) {
    if (h.b == T(0) || !exact) return settle(sums, h);
    if (sweeps == 0) bracket(sums, h, epsilon);
    sweep(sums, h, epsilon);
    done = done || ++sweeps == kMaxSweeps;
  }

  // Sequential mode, and exact mode where nothing depends on t.
  CGES_FN void settle(const GroupStats<T>& sums, const Thresholds<T>& h) {
    at.s = group_scale(std::sqrt(sums.l2_squared), h.a);
    if (h.b != T(0)) at.t = h.c + h.b * sums.l1;
    done = true;
  }

  // The root lies between c, where the sums are, and the sequential t; it may be that t itself, to rounding.
  CGES_FN void bracket(const GroupStats<T>& sums, const Thresholds<T>& h, T epsilon) {
    low = h.c;
    high = (h.c + h.b * sums.l1) * (T(1) + T(4) * epsilon);
  }

  // One step of the search.
  // excess(t) = t - c - b*s*||u||_1 rises through the root with slope 1 + b*(k*s + a*||u||_1^2/||u||_2^3),
  // ever more slowly. From the left Newton's steps are short, so there it is Halley's: as k elements fall below
  // t one by one, ||u||_1 bends by k^2/||u||_1 if |z| is spread exponentially, by half of that if evenly; we
  // take 0.8. Of a few elements each makes a corner of its own; there Newton's steps are the better ones.
  // Nothing branches here, so that loops over groups are vectorised. `few`: of at most kFew elements.
  template <bool few = false>
  CGES_FN void sweep(const GroupStats<T>& sums, const Thresholds<T>& h, T epsilon) {
    const T l2 = std::sqrt(sums.l2_squared), ratio = sums.l1 / l2, t = at.t;
    at.s = group_scale(l2, h.a);
    const T excess = t - h.c - h.b * at.s * sums.l1;
    const T bend = h.a != T(0) ? h.a / l2 * ratio * ratio : T(0);
    T slope = at.s == T(0) ? T(1) : T(1) + h.b * (sums.count * at.s + bend);
    if constexpr (!few) {
      const T most = h.b * at.s, part = -excess / sums.l1;  // at most that; NaN where both are infinite
      const T many = sums.count > kFew ? sums.count - kFew : T(0);
      const T less =
          T(0.4) * ((part < most ? part : most) * many) * (most * many / slope);  // neither overflows
      slope -= excess < T(0) ? less : T(0);
    }
    const T newton = t - excess / slope;
    low = excess < T(0) ? t : low;
    high = excess > T(0) ? t : high;
    // NaN counts as near, and stays.
    const T tolerance = T(4) * epsilon;
    const bool near = !(std::fabs(newton - t) > tolerance * std::fabs(newton));
    const bool inside = (newton > low) & (newton < high);
    at.t = near | inside ? newton : low + (high - low) / T(2);
    done = !(std::fabs(at.t - t) > tolerance * std::fabs(at.t));
  }
};

// s * soft(z, t), before it is rounded
template <typename T>
CGES_FN T shrink(T z, Shrinkage<T> h) {
  return h.s * std::copysign(soft_magnitude(z, h.t), z);
}

// s * soft(z, t) as it is stored: rounded to T, with every zero written +0.0.
template <typename T, typename Compute>
CGES_FN T apply_shrinkage(Compute z, Shrinkage<Compute> h) {
  const T w = T(shrink(z, h));
  return w == T(0) ? T(0) : w;
}

}  // namespace cges
