// The part of cooperative groups that the kernels use: clusters.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void sync() const { emulator::barrier(emulator::Stop::cluster_sync); }
  unsigned block_rank() const { return emulator::cluster_rank(); }
  unsigned num_blocks() const { return emulator::cluster_size(); }
  template <typename T>
  T* map_shared_rank(T* p, unsigned rank) const {
    const auto offset = reinterpret_cast<unsigned char*>(p) - emulator::shared_memory();
    return reinterpret_cast<T*>(emulator::shared_memory(rank) + offset);
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
