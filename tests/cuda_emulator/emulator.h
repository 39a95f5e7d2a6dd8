// Control of the emulated device, for tests (through ctypes too). Names that can be set and read:
//
//   seed               decides the order of blocks and threads; launches with one seed still differ
//   blocks_in_flight   how many blocks run interleaved (a cluster and a cooperative grid always run whole)
//   launches           kernels launched since it was last set to 0
//   fail_launch        n > 0: the n-th launch from now fails without having run
//   multiprocessors, shared_memory_per_block (opt-in limit), shared_memory_per_multiprocessor,
//   reserved_shared_memory, l2_bytes, compute_capability (major), cluster_launch (0: no clusters),
//   cooperative_launch (0: none), driver_version, runtime_version (12080 is 12.8)
#pragma once

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

EMULATOR_API int emulator_set(const char* name, long long value);  // 0, or -1 where the name is unknown
EMULATOR_API long long emulator_get(const char* name);             // -1 where the name is unknown
EMULATOR_API void emulator_reset();                                // every name as it was at first
EMULATOR_API const char* emulator_message();                       // why the last failed launch failed

// A log of what kernels read and write through __ldg, __ldcg, __ldcs, __stcg, __stcs and asynchronous copies.
// `out` gets up to `most` rows of five numbers, in the order of the accesses: address, bytes, 0 for a read or
// 1 for a write, blockIdx.x, threadIdx.x.
EMULATOR_API void emulator_trace(int on);                                  // 1: from now on, anew; 0: no more
EMULATOR_API long long emulator_accesses(long long* out, long long most);  // how many there are in all
