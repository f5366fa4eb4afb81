// What the processor has, and the system lets be used.
#pragma once

namespace pagewire {

bool has_avx2();     // with FMA and conversions of half precision
bool has_avxvnni();  // with the above
bool has_avx512();   // F, BW, VL, DQ and VNNI, with has_avx2's
bool has_amx();      // tiles of bytes and of bf16, with the above; asks the system for them

}  // namespace pagewire
