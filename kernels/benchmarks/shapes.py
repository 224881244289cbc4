"""The projections that are measured, out x in, as inference engines fuse them."""

DENSE = {
    "Qwen2.5-3B qkv": (2560, 2048),
    "Qwen2.5-3B o": (2048, 2048),
    "Qwen2.5-3B gate_up": (22016, 2048),
    "Qwen2.5-3B down": (2048, 11008),
    "Llama-3.1-8B qkv": (6144, 4096),
    "Llama-3.1-8B o": (4096, 4096),
    "Llama-3.1-8B gate_up": (28672, 4096),
    "Llama-3.1-8B down": (4096, 14336),
}
SMALL = {"Qwen2.5-3B k": (256, 2048), "Qwen3-30B-A3B qkv": (5120, 2048), "Qwen3-30B-A3B o": (2048, 4096)}
SQUARE = {"8192 x 8192": (8192, 8192)}
# One expert of Qwen3-30B-A3B; 128 experts, 8 a token.
EXPERTS = {"Qwen3-30B-A3B expert gate_up": (1536, 2048), "Qwen3-30B-A3B expert down": (2048, 768)}
EXPERT_COUNT, EXPERTS_PER_TOKEN = 128, 8
TOKENS = 8192
SWEEP = (1, 16, 64, 256, 1024, 4096, 8192, 16384)  # tokens

TINY = {"tiny": (48, 64)}
