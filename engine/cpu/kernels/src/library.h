// The library's operations, which programs run too.
#pragma once

#include <cstdint>

#include "layers.h"

struct PagewireLibrary;

extern "C" {
void pagewire_multiply(PagewireLibrary* library, int kind, const uint8_t* panels, int64_t rows, int64_t columns,
                       int64_t group, const float* x, int64_t x_stride, int64_t tokens, const float* bias, float* out,
                       int64_t out_stride);
void pagewire_embed(PagewireLibrary* library, int kind, const uint8_t* panels, int64_t columns, int64_t group,
                    const int64_t* ids, int64_t tokens, float* out);
void pagewire_norm(PagewireLibrary* library, const pagewire::Norm* job);
void pagewire_gate(PagewireLibrary* library, const pagewire::Gating* job);
void pagewire_scale(PagewireLibrary* library, const pagewire::Scaling* job);
void pagewire_rotate(PagewireLibrary* library, const pagewire::Rotating* job);
void pagewire_adapt(PagewireLibrary* library, pagewire::Adapting* job);
void pagewire_attend(PagewireLibrary* library, pagewire::Attending* job);
}
