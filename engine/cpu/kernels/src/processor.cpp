#include "processor.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pagewire {
namespace {

struct Registers {
    uint32_t a, b, c, d;
};

// All zero where the processor has no such leaf.
Registers leaf(uint32_t number, uint32_t part) {
    Registers found = {};
    __get_cpuid_count(number, part, &found.a, &found.b, &found.c, &found.d);
    return found;
}

constexpr uint32_t bit(int index) { return 1u << index; }

// Whether the system keeps these parts of the state (bits of XCR0) when it changes threads.
bool keeps(uint64_t wanted) {
    if (!(leaf(1, 0).c & bit(27))) return false;
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((static_cast<uint64_t>(high) << 32 | low) & wanted) == wanted;
}

constexpr uint64_t YMM = 0x6, ZMM = 0xe6, TILES = 0x60000;

}  // namespace

bool has_avx2() {
    const uint32_t fma_avx_f16c = bit(12) | bit(28) | bit(29);
    return (leaf(1, 0).c & fma_avx_f16c) == fma_avx_f16c && leaf(7, 0).b & bit(5) && keeps(YMM);
}

bool has_avxvnni() { return has_avx2() && leaf(7, 1).a & bit(4); }

bool has_avx512() {
    const uint32_t f_dq_bw_vl = bit(16) | bit(17) | bit(30) | bit(31), vnni = bit(11);
    const Registers found = leaf(7, 0);
    return has_avx2() && (found.b & f_dq_bw_vl) == f_dq_bw_vl && found.c & vnni && keeps(ZMM);
}

bool has_amx() {
#if defined(__linux__)
    const uint32_t bf16_tile_int8 = bit(22) | bit(24) | bit(25);
    if (!has_avx512() || (leaf(7, 0).d & bf16_tile_int8) != bf16_tile_int8 || !keeps(TILES)) return false;
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, for this process and its threads
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

}  // namespace pagewire
#endif

// Also built alone, to ask which instruction sets to compile for.
extern "C" int pagewire_processor_has([[maybe_unused]] const char* instructions) {
#if defined(__x86_64__)
    using namespace pagewire;
    if (!strcmp(instructions, "avx2")) return has_avx2();
    if (!strcmp(instructions, "avxvnni")) return has_avxvnni();
    if (!strcmp(instructions, "avx512")) return has_avx512();
    if (!strcmp(instructions, "amx")) return has_amx();
#endif
    return 0;
}
