"""Which attention probabilities dropout keeps: Philox4x32-10 over the coordinates of a score (csrc/common/philox.h)."""

import torch

_LOW = 0xFFFFFFFF


def philox4x32(counter, key):
    """Ten rounds (Salmon et al. 2011) on int64 tensors or ints that hold 32-bit words: counter 4, key 2 -> 4 words."""
    (x, y, z, w), (low, high) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * x, 0xCD9E8D57 * z  # in int64 the upper half is right once the sign is masked off
        x, y, z, w = (b >> 32 & _LOW) ^ y ^ low, b & _LOW, (a >> 32 & _LOW) ^ w ^ high, a & _LOW
        low, high = low + 0x9E3779B9 & _LOW, high + 0xBB67AE85 & _LOW
    return x, y, z, w


def dropout_threshold(p):
    """A uniform 32-bit word is below it with probability p."""
    return min(int(p * 2**32 + 0.5), _LOW)


def keep_mask(rng, p, b, heads, lq, lk):
    """(H, lq, lk) bool, True = keep, for sequence b: word j % 4 of philox(key = seed, counter = (j // 4, i, b H + h,
    offset)) must be at least p 2^32. rng (2,) int64 holds seed and offset; of the offset the low 32 bits count."""
    device = rng.device
    h, i, group = (torch.arange(n, device=device) for n in (heads, lq, (lk + 3) // 4))
    stream = (b * heads + h)[:, None, None]
    counter = (group, i[:, None], stream, rng[1] & _LOW)
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, (rng[0] & _LOW, rng[0] >> 32 & _LOW))), -1)
    return words.flatten(-2)[..., :lk] >= dropout_threshold(p)
