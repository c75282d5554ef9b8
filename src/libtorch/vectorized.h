#pragma once

// For the inner loops of operators on the CPU: compiled for registers of several widths, of which the widest that the processor
// has are used.
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
