// The formulas of the prox as small pure functions, for host and device. The CPU and the CUDA executor both
// take them from here. core/shrinkage.py has the same functions in PyTorch, under the same names.
//
// z is the result of the update rule (sgd.h, adamw.h), the thresholds are a = lr*alpha, b = lr*beta and
// c = lr*gamma, and u = soft(z, c). Then every group ends as
//   w = s * soft(z, t)
// and the modes differ in s and t:
//   sequential:  s = max(1 - a/||u||_2, 0),  t = c + b*||u||_1
//   exact:       t solves t = c + b * s(t) * ||soft(z, t)||_1,  with s(t) = max(1 - a/||soft(z, t)||_2, 0)
// ShrinkageSolver searches for exact mode's t with Newton's and Halley's steps inside a bracket. Groups of
// one element have a closed form (shrink_one). Small groups without group lasso have one too, once they are
// sorted (rise_of_largest); the CPU executor uses it.
//
// shrinkage.py searches with Newton's steps alone. Both find the root of the same equation, so their t agree
// to rounding, but not after the same number of steps. Everything else is the same.
#pragma once
#include "common/arithmetic.h"

namespace cges {

// max(x, 0), except that NaN stays NaN. The comparison is written the way the processor's maximum instruction
// treats its operands, so it compiles to that one instruction.
template <typename T>
CGES_FN T positive_part(T x) {
  return T(0) > x ? T(0) : x;
}

// |soft(z, t)|
template <typename T>
CGES_FN T soft_magnitude(T z, T t) {
  return positive_part(std::fabs(z) - t);
}

// Sums over one group of u = soft(z, t): the number of nonzeros, the l1 norm, the l2 norm squared.
template <typename T>
struct GroupStats {
  T count, l1, l2_squared;
};

// Adds one element to the sums.
template <typename T>
CGES_FN void group_stats(T z, T t, GroupStats<T>& sums) {
  const T u = std::fabs(z) - t;
  const bool left = !(u <= T(0));  // so that NaN counts
  sums.count = left ? sums.count + T(1) : sums.count;
  sums.l1 = left ? sums.l1 + u : sums.l1;
  sums.l2_squared = left ? multiply_add(u, u, sums.l2_squared) : sums.l2_squared;
}

// The penalty's coefficients alpha, beta and gamma.
template <typename T>
struct Coefficients {
  T group_lasso, exclusive_lasso, l1;
};

// The step size times each coefficient; see form_thresholds.
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

// (s, t) of a group of one element. Both of its norms are |u|, so exact mode has a closed form.
template <typename T>
CGES_FN Shrinkage<T> shrink_one(T z, const Thresholds<T>& h, bool exact) {
  const T u = soft_magnitude(z, h.c), s = group_scale(u, h.a);
  if (h.b == T(0)) return {s, h.c};
  if (!exact || s == T(0)) return {s, h.c + h.b * u};
  // With s > 0 the equation is t = c + b*(|z| - t - a). Its solution lies above c by this rise.
  const T rise = h.b / (T(1) + h.b) * (u - h.a);
  return {group_scale(u - rise, h.a), h.c + rise};
}

// The most elements of a group that the CPU executor and shrinkage.py sort in order to solve exact mode
// without group lasso. The other executors search for these groups too. shrinkage.py calls it SORTED.
constexpr int kSorted = 16;

// Without group lasso exact mode's equation t = c + b*sum(max(|z| - t, 0)) is linear in t between
// neighbouring |z|. If only the k largest |z| counted, whose |z| - c add up to `sum`, its root would lie this
// far above c. The group's t is the largest of these roots, or c if all lie below it.
template <typename T>
CGES_FN T rise_of_largest(T sum, int k, const Thresholds<T>& h) {
  return h.b * sum / (T(1) + h.b * T(k));
}

// One group's search for (s, t). After start(), give solve_shrinkage() the group's sums at the threshold
// at.t, again and again until `done`. Sequential mode is done after the first time.
template <typename T>
struct ShrinkageSolver {
  static constexpr int kMaxSweeps = 24;  // shrinkage.py calls it MAX_SWEEPS
  static constexpr T kFew = 4;           // a number of elements, see sweep()
  Shrinkage<T> at;
  T low, high;  // the root lies between these
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

  // The closed form of sequential mode. It serves exact mode too where b = 0, because t is c then.
  CGES_FN void settle(const GroupStats<T>& sums, const Thresholds<T>& h) {
    at.s = group_scale(std::sqrt(sums.l2_squared), h.a);
    if (h.b != T(0)) at.t = h.c + h.b * sums.l1;
    done = true;
  }

  // The root lies between c, where `sums` were taken, and sequential mode's t. It may be that t itself, so
  // the upper end is some roundings higher.
  CGES_FN void bracket(const GroupStats<T>& sums, const Thresholds<T>& h, T epsilon) {
    low = h.c;
    high = (h.c + h.b * sums.l1) * (T(1) + T(4) * epsilon);
  }

  // One step of the search for the root of excess(t) = t - c - b*s*||u||_1, where u = soft(z, t).
  //
  // The excess rises in t with slope 1 + b*(k*s + a*||u||_1^2/||u||_2^3), k being the number of nonzero u,
  // and this slope falls as t grows. So from the left of the root Newton's steps are too short, and there a
  // step of Halley's method is taken instead, which makes the slope smaller by -excess/2 * curvature/slope.
  // The curvature is an estimate: as elements fall below t one by one, ||u||_1 has the second derivative
  // k^2/||u||_1 if |z| is distributed exponentially, and half of that if it is distributed uniformly. We take
  // 0.8 of it. With few elements the excess is a polygon and no smooth curve, and Newton's steps are better.
  // Therefore kFew elements are not counted in the estimate, and `few` (a group of at most kFew) leaves it
  // out.
  //
  // Nothing here branches, so that the CPU's loops over groups are vectorised.
  template <bool few = false>
  CGES_FN void sweep(const GroupStats<T>& sums, const Thresholds<T>& h, T epsilon) {
    const T l2 = std::sqrt(sums.l2_squared), ratio = sums.l1 / l2, t = at.t;
    at.s = group_scale(l2, h.a);
    const T excess = t - h.c - h.b * at.s * sums.l1;
    const T bend = h.a != T(0) ? h.a / l2 * ratio * ratio : T(0);
    T slope = at.s == T(0) ? T(1) : T(1) + h.b * (sums.count * at.s + bend);
    if constexpr (!few) {
      // As t >= c, part <= most up to rounding. It is NaN where both sums are infinite, and then `most` is
      // taken.
      const T most = h.b * at.s, part = -excess / sums.l1;
      const T many = sums.count > kFew ? sums.count - kFew : T(0);
      const T less =
          T(0.4) * ((part < most ? part : most) * many) * (most * many / slope);  // no factor overflows
      slope -= excess < T(0) ? less : T(0);
    }
    const T newton = t - excess / slope;
    low = excess < T(0) ? t : low;
    high = excess > T(0) ? t : high;
    // If Newton's step is NaN, the search counts as converged: t becomes NaN, and so does w.
    const T tolerance = T(4) * epsilon;
    const bool near = !(std::fabs(newton - t) > tolerance * std::fabs(newton));
    const bool inside = (newton > low) & (newton < high);
    at.t = near | inside ? newton : low + (high - low) / T(2);
    done = !(std::fabs(at.t - t) > tolerance * std::fabs(at.t));
  }
};

// s * soft(z, t) in the compute type.
template <typename T>
CGES_FN T shrink(T z, Shrinkage<T> h) {
  return h.s * std::copysign(soft_magnitude(z, h.t), z);
}

// s * soft(z, t) as it is stored: rounded to T, and every zero is +0.0.
template <typename T, typename Compute>
CGES_FN T apply_shrinkage(Compute z, Shrinkage<Compute> h) {
  const T w = T(shrink(z, h));
  return w == T(0) ? T(0) : w;
}

}  // namespace cges
