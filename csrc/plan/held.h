// The one truth about skip_dead, for both executors: when the list of groups that the last step held at zero
// still holds. The lists themselves belong to the executors, because one of them lies on a GPU.
#pragma once
#include <utility>

#include "common/step.h"

namespace cges {

// Follows the list of one tensor from step to step.
class HeldList {
 public:
  // What the coming step does with its list: it has none, begins an empty one, or goes on with the last step's
  // and skips the groups on it. With a list it records the groups that it holds itself.
  enum class Use { none, begin, go_on };

  // Call it once for each step of the tensor that is not skipped. `can_skip`: whether the executor can pass
  // over single groups of the tensor at all.
  Use before(const Hyperparameters& h, const TensorInStep& tensor, bool can_skip) {
    const Phase last = std::exchange(phase_, Phase::skipped);
    if (!h.skip_dead || h.freeze != Freeze::group || !can_skip) return Use::none;
    phase_ = tensor.phase;
    return tensor.as_left && tensor.phase == last ? Use::go_on : Use::begin;
  }

 private:
  // The phase of the step that left the list, as another one keeps other states; skipped if there is no list.
  Phase phase_ = Phase::skipped;
};

}  // namespace cges
