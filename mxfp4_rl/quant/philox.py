"""Random bits that depend on a seed and a position only: Philox4x32-10 (Salmon et al., 2011), in integer PyTorch.

Stochastic rounding needs bits that are the same however a tensor is cut into chunks, on whatever device, and in a Triton
kernel: element i of a tensor takes word i % 4 of Philox(key = seed, counter = (i // 4, stream)), which is what Triton's
`tl.randint4x(seed, offset)` computes for stream 0.
"""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox4x32(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Ten rounds over four words of counter, int64 tensors of one shape in [0, 2^32); returns four such words."""
    c, k = list(counter), list(key)
    for _ in range(10):
        # int64 wraps like uint64 does, and both 32-bit halves of a wrapped product are read with a mask.
        a, b = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = [((b >> 32) & _WORD) ^ c[1] ^ k[0], b & _WORD, ((a >> 32) & _WORD) ^ c[3] ^ k[1], a & _WORD]
        k = [(k[0] + _WEYL[0]) & _WORD, (k[1] + _WEYL[1]) & _WORD]
    return c


def random_words(seed: int, start: int, count: int, stream: int = 0, device=None) -> torch.Tensor:
    """Words start .. start + count - 1 of the stream: int64 (count,) in [0, 2^32).

    Args:
        seed: 64 bits, the key. start: of any alignment. stream: 32 bits, the counter's third word.
    """
    offset = torch.arange(start // 4, (start + count + 3) // 4, dtype=torch.int64, device=device)
    counter = [offset & _WORD, offset >> 32, torch.full_like(offset, stream & _WORD), torch.zeros_like(offset)]
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    return torch.stack(words, dim=-1).view(-1)[start % 4 : start % 4 + count]


def uniform(seed: int, start: int, count: int, stream: int = 0, device=None) -> torch.Tensor:
    """The words' upper 24 bits as float32 (count,) in [0, 1), multiples of 2^-24. Args as `random_words`."""
    return (random_words(seed, start, count, stream, device) >> 8).float() * 2.0**-24
