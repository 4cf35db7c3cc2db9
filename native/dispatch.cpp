// Which instruction set runs: decided once, from the processor and PLAIT_NATIVE_ISA.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dispatch.h"

#if defined(PLAIT_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace plait {
namespace {

#if defined(PLAIT_X86)
// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avxvnni() {
#if defined(PLAIT_AVXVNNI)
    return has_avx2() && __builtin_cpu_supports("avxvnni");
#else
    return false;
#endif
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
#elif defined(PLAIT_NEON)
// Every 64-bit ARM processor has NEON; the rest is for the operating system to say.
bool has_dotprod() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return false;
#endif
}
#endif

const Kernels* choose() {
    const char* wanted = std::getenv("PLAIT_NATIVE_ISA");
    if (wanted == nullptr || *wanted == '\0') return available().front();
    for (const Kernels* table : available())
        if (std::strcmp(table->name, wanted) == 0) return table;
    std::string known;
    for (const Kernels* table : available()) known += std::string(known.empty() ? "" : ", ") + table->name;
    throw std::invalid_argument("PLAIT_NATIVE_ISA is '" + std::string(wanted) + "'. This machine has: " + known + ".");
}

const Kernels* current = nullptr;

}  // namespace

std::vector<const Kernels*> available() {
    std::vector<const Kernels*> tables;
#if defined(PLAIT_X86)
    __builtin_cpu_init();
    if (has_avx512()) tables.push_back(avx512_kernels());
#if defined(PLAIT_AVXVNNI)
    if (has_avxvnni()) tables.push_back(avxvnni_kernels());
#endif
    if (has_avx2()) tables.push_back(avx2_kernels());
#elif defined(PLAIT_NEON)
    if (has_dotprod()) tables.push_back(dotprod_kernels());
    tables.push_back(neon_kernels());
#endif
    tables.push_back(scalar_kernels());
    return tables;
}

const Kernels& kernels() {
    if (current == nullptr) current = choose();
    return *current;
}

void use_kernels(const char* name) {
    for (const Kernels* table : available()) {
        if (std::strcmp(table->name, name) == 0) {
            current = table;
            return;
        }
    }
    throw std::invalid_argument("This machine has no instruction set '" + std::string(name) + "'.");
}

}  // namespace plait
