// Compiled once per instruction set: CMakeLists.txt sets the flags and TK_ISA, the namespace.
#include "common/isa/kl.h"
#include "common/isa/rows.h"

namespace tk {
namespace TK_ISA {

extern const TileKernels kFloatKernels;
const TileKernels kFloatKernels = {"fp32",
                                   false,
                                   kNR,
                                   24,
                                   &pack_a<false>,
                                   &pack_bt<false>,
                                   &pack_b<false>,
                                   &pack_both<false>,
                                   &gemm_simd<false>,
                                   &softmax_tile<false>,
                                   &known_tile<false>,
                                   &gradient_tile<false>,
                                   &unstash<false>,
                                   &set_targets<false>,
                                   &kl_tile<false>,
                                   &kl_combine<false>,
                                   &kl_gradient_tile<false>,
                                   &store_rows,
                                   &combine_row};

extern const RowKernels kRowKernels;
const RowKernels kRowKernels = {&row_log_sum, &row_gradient, &row_logit};

#if defined(__AVX512BF16__)
extern const TileKernels kPairKernels;
const TileKernels kPairKernels = {"bf16 pairs",
                                  true,
                                  kNR,
#if defined(__AMX_BF16__)
                                  256,
#else
                                  24,
#endif
                                  &pack_a<true>,
                                  &pack_bt<true>,
                                  &pack_b<true>,
                                  &pack_both<true>,
#if defined(__AMX_BF16__)
                                  &gemm_amx,
#else
                                  &gemm_simd<true>,
#endif
                                  &softmax_tile<true>,
                                  &known_tile<true>,
                                  &gradient_tile<true>,
                                  &unstash<true>,
                                  &set_targets<true>,
                                  &kl_tile<true>,
                                  &kl_combine<true>,
                                  &kl_gradient_tile<true>,
                                  &store_rows,
                                  &combine_row};
#endif

}  // namespace TK_ISA
}  // namespace tk
