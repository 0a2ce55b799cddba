// What lets one header be compiled by nvcc for a kernel and by any C++ compiler for its test on the CPU.
#pragma once

#ifdef __CUDACC__
#define STATSMERGE_HD __host__ __device__ __forceinline__
#define STATSMERGE_UNROLL _Pragma("unroll")
#else
#define STATSMERGE_HD inline
#define STATSMERGE_UNROLL
#endif
