// Control of the emulated device for tests, also through ctypes. These names can be set and read:
//
//   seed               decides the order of blocks and threads; two launches with one seed still differ
//   blocks_in_flight   the number of blocks that run interleaved (all of a cluster or a cooperative grid run)
//   launches           the number of kernels launched since it was last set to 0
//   fail_launch        n > 0 makes the n-th launch from now fail without running
//   multiprocessors, shared_memory_per_block (opt-in limit), shared_memory_per_multiprocessor,
//   reserved_shared_memory, l2_bytes, compute_capability (major), cluster_launch (0: no clusters),
//   cooperative_launch (0: none), driver_version, runtime_version (12080 is 12.8)
#pragma once

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

EMULATOR_API int emulator_set(const char* name, long long value);  // 0, or -1 where the name is unknown
EMULATOR_API long long emulator_get(const char* name);             // -1 where the name is unknown
EMULATOR_API void emulator_reset();                                // sets every name to its initial value
EMULATOR_API const char* emulator_message();                       // why the last failed launch failed

// A log of what kernels read and write through __ldg, __ldcg, __ldcs, __stcg, __stcs and asynchronous copies.
// `out` gets up to `most` rows, in the order of the accesses. Each is five numbers: address, bytes, 0 for a
// read or 1 for a write, blockIdx.x, threadIdx.x.
EMULATOR_API void emulator_trace(int on);                                  // 1: begin a new log; 0: stop
EMULATOR_API long long emulator_accesses(long long* out, long long most);  // returns the number of all rows
