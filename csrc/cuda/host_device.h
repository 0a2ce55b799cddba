// What lets one header be compiled by nvcc for a kernel and by any C++ compiler for its test on the CPU.
#pragma once

// STATSMERGE_HD is for what is small and inlined always, STATSMERGE_HD_PHASE for whole phases of a kernel, which are
// inlined where the compiler sees fit.
#ifdef __CUDACC__
#define STATSMERGE_HD __host__ __device__ __forceinline__
#define STATSMERGE_HD_PHASE __host__ __device__ inline
#define STATSMERGE_UNROLL _Pragma("unroll")
#define STATSMERGE_UNROLL_4 _Pragma("unroll 4")
#else
#define STATSMERGE_HD inline
#define STATSMERGE_HD_PHASE inline
#define STATSMERGE_UNROLL
#define STATSMERGE_UNROLL_4
#endif
