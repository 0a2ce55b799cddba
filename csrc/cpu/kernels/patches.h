// The input of a convolution, of any element type and strides, and which of its elements each product takes.
#pragma once

#include <cstdint>

#include "common/convert.h"

namespace statsmerge {

// Three spatial dimensions; a convolution of fewer has sizes of 1 in front. Strides are counted in elements.
struct Patches {
  const char* data;
  Storage storage;
  int64_t images, groups, channels;  // channels of one group
  int64_t image_stride, group_stride, channel_stride;
  int64_t size[3], element_stride[3];                             // of the input
  int64_t kernel[3], stride[3], padding[3], dilation[3], out[3];  // padding: in front of the first element

  int64_t rows() const { return images * out[0] * out[1] * out[2]; }             // patches
  int64_t columns() const { return channels * kernel[0] * kernel[1] * kernel[2]; }  // elements of one group's patch
};

}  // namespace statsmerge
