"""A kernel for test_varlen_attention_dropout: the words of a block of scores. Importing it needs Triton."""

import triton
import triton.language as tl

from flowattn.triton_kernels.attention_scores import Head, dropout_words


@triton.jit
def words_kernel(words, rng, row, key, stream, BM: tl.constexpr, BN: tl.constexpr):
    head = Head(0, 0, 0, 0, 0, 0, tl.load(rng), tl.load(rng + 1).to(tl.int32), stream, 0)
    block = dropout_words(row, key, head, BM, BN).to(tl.int32, bitcast=True)
    tl.store(words + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], block)
